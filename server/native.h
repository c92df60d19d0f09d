/*
 * native.h - the native surface: /v1/jobs and what belongs to it. proto/jobs.h has the wire format, async.h the life of a job.
 *
 * Called by http.c's table of routes, async.c (native_drawing). Threads: the HTTP thread.
 */
#ifndef SAFELIGHT_SERVER_NATIVE_H
#define SAFELIGHT_SERVER_NATIVE_H

#include "server/exchange.h"

extern const struct surface surface_native;
extern const struct drawing native_drawing;             /* POST /v1/jobs */

enum MHD_Result answer_job_post(struct exchange *x);
enum MHD_Result answer_job_list(struct exchange *x);    /* GET /v1/jobs */
enum MHD_Result answer_job_get(struct exchange *x);     /* GET /v1/jobs/ID */
enum MHD_Result answer_job_cancel(struct exchange *x);  /* DELETE /v1/jobs/ID, POST /v1/jobs/ID/cancel */
enum MHD_Result answer_job_events(struct exchange *x);  /* GET /v1/jobs/ID/events */
enum MHD_Result answer_job_picture(struct exchange *x); /* GET /v1/jobs/ID/pictures/N */
enum MHD_Result answer_file(struct exchange *x);        /* GET /v1/files/NAME */
void native_close(struct exchange *x);                  /* what was asked of the store is not waited for any more */

#endif
