/*
 * crew.h - helper threads, each with a lane, that do pieces of work beside the thread that owns the crew.
 *
 * A piece is done whole by one thread on its lane, so that its bits do not depend on who does it. Between runs the helpers sleep on a condition:
 * they take no time from anybody. Which piece goes to whom is decided when it is taken, in order: the largest should come first.
 *
 * Called by batch.c and the benchmark. Threads: a crew belongs to one thread; crew_run returns when every helper is idle again.
 */
#ifndef SAFELIGHT_MODELS_CREW_H
#define SAFELIGHT_MODELS_CREW_H

#include "models/lane.h"

struct crew;

/* helpers >= 0 threads, each with a lane for that work (enum lane_work). After model_reserve. On failure *c is NULL. */
MUST_CHECK int crew_open(struct crew **c, struct model *m, int helpers, int lane_work, struct err *e);
void crew_close(struct crew *c); /* takes NULL */
/* Calls work(arg, lane, i) once for each i of 0..n-1, on this thread with `own` and on helpers with theirs, and waits for all. Every lane computes
 * with `threads` threads meanwhile, and `own` with as many as before afterwards. */
void crew_run(struct crew *c, struct lane *own, int n, int threads, void (*work)(void *arg, struct lane *l, int i), void *arg);

#endif
