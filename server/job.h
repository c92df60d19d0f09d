/*
 * job.h - one request on its way through the server, and the bounded queue that all of them wait in.
 *
 * Jobs are entries of a fixed array. Who may touch a job follows from its state alone; the transitions are these functions:
 *
 *      FREE --job_reserve--> RESERVED --job_submit--> QUEUED --job_take--> RUNNING --job_drawn--> DRAWN --job_finish--> DONE
 *       ^                       | |                   ^ |                   | |                                          |
 *       |                       | +-job_prepare-> PREPARING <-job_prepare---+ |                                          |
 *       |                       |                       | job_stop        job_fail (PREPARING too)                       |
 *       |                       |                       +---------------------+------------------------------> DONE      |
 *       +---------------------- job_release -----------------------------------------------------------------------------+
 *
 *      RESERVED --job_read--> READING --job_was_read--> RESERVED, of a request with a first picture
 *
 *      state     belongs to       what may be trusted
 *      FREE      the table        nothing
 *      RESERVED  its owner        it counts against the queue's bound; the owner (HTTP thread, jobs service) decodes the body into it
 *      READING   reader thread    the first picture's files become pixels, and the rest is prepared; stop may be set; nobody sees it in job_look
 *      PREPARING loader thread    request, pictures and recipe are complete; the generation that it needs is being composed; stop may be set
 *      QUEUED    the queue        request, pictures and recipe are complete; nothing is started
 *      RUNNING   device thread    its pictures pass between device and stage thread; stop may be set by others and is obeyed at the next step
 *      DRAWN     encoder thread   every draw is closed; all pixels are there unless err says why not; it can no longer be stopped
 *      DONE      its owner        either err.code or the answer in body and file; the owner was woken once
 *
 * There is one queue and one device thread or more. A job belongs to the device that took it until it is DRAWN, with all its pictures: the device with
 * the fewest pictures takes the next job, so that an idle one never waits for work that another one has in stock.
 *
 * A request of n pictures is one job with n pictures that are drawn and scheduled one by one. Each running picture belongs to one thread of its device:
 *
 *      device --pic_send(START)--> stage --pic_return--> device (steps) --pic_send(DECODE or CLOSE)--> stage --pic_return--> device
 *
 * What others may see of a running job, they see through job_look: counters that are atomic, and previews that are counted blobs. They
 * are told of news by listeners.
 *
 * Shared between threads: state, links, share and previews under the table's lock; stop, cut, steps_done, drawn and wants_preview, which are atomic. wake is
 * called once per job, without the lock, by whoever makes it DONE.
 *
 * Called by http.c and its surfaces, worker.c, device.c, stage.c, encode.c, reader.c, watch.c, serve.c. Threads: as the states say.
 */
#ifndef SAFELIGHT_SERVER_JOB_H
#define SAFELIGHT_SERVER_JOB_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>

#include "base/buf.h"
#include "base/err.h"
#include "models/pipeline.h"
#include "proto/first.h"
#include "proto/openai.h"
#include "proto/request.h"
#include "proto/sdapi.h"
#include "server/devices.h"
#include "server/fair.h"
#include "server/limits.h"
#include "server/safety.h"
#include "server/store.h"
#include "server/thread.h"

enum job_state { JOB_FREE, JOB_RESERVED, JOB_READING, JOB_PREPARING, JOB_QUEUED, JOB_RUNNING, JOB_DRAWN, JOB_DONE };

enum { JOB_ID_MAX = 64, JOB_BASE = 288, JOB_PREVIEWS = 4, JOB_ALIVE_MAX = 64 /* pictures with the device and stage threads of one device */ };

/* How a running job ends before its time with what there is. */
enum job_cut {
  CUT_NOTHING,
  CUT_PICTURES, /* those that were started end as they are; the others are drawn */
  CUT_JOB       /* and no other is started */
};

struct job;
struct surface;

/* Bytes that several readers share: a preview's file. */
struct blob {
  _Atomic int refs;
  int number;        /* of the preview in its job, from 1 */
  int picture, step; /* what it shows */
  enum image_format format;
  size_t len;
  char data[];
};
struct blob *blob_ref(struct blob *b);
void blob_unref(struct blob *b); /* takes NULL */

/* What the stage thread is asked to do with a picture. */
enum stage_work {
  STAGE_START,   /* encode the prompts, first noise */
  STAGE_DECODE,  /* pixels; then the draw is closed */
  STAGE_CLOSE,   /* the draw is closed without a picture */
  STAGE_PREVIEW  /* decode the snapshot; the picture itself stays with the device thread */
};

struct stage_item {
  struct stage_item *next;
  struct picture *pic;
  enum stage_work work;
};

struct picture {
  struct job *job;
  struct draw *draw;       /* prepared by the owner, NULL once closed; those of a job share what does not depend on the seed */
  uint8_t *rgb;            /* width*height*3, inside job.pixels */
  uint64_t seed;
  int is_cut;              /* it ends at the step it has come to; device thread */
  int cut_at;              /* the step that it ended at; 0: it was finished */
  int has_pixels;          /* or will have, when the draw is closed; device thread, then encoder */
  struct err err;          /* why it has no pixels; code 0 without any: it was cut before its first step */
  uint64_t last;           /* its last turn; device thread */
  struct stage_item item, preview_item;
  struct picture *next;    /* lock: pictures that come back to the device thread */
};

/* Someone who wants to hear of news of one job. wake is called with the table's lock held: it may resume a connection and nothing else. */
struct listener {
  struct listener *next;
  struct job *job;         /* lock; NULL: not listening (any more) */
  void (*wake)(struct listener *l);
};

/* What the encoder thread gets: a job that is drawn, or a preview of one that runs. */
struct parcel {
  struct parcel *next;
  struct job *job;
  int is_preview;
};

struct job {
  enum job_state state;           /* lock */
  struct jobs *jobs;              /* the table that it is in */
  struct job *next;               /* lock: free list or queue */
  uint64_t serial;                /* changes with every use of the entry, so that a late job_stop meets no stranger */
  _Atomic int stop;               /* 0, or the E_* why it must end */
  _Atomic int cut;                /* enum job_cut: set under the lock, taken by the device thread */
  int is_cut;                     /* no picture is started any more; device thread */
  enum job_cut ending;            /* lock: how it was cut; from CUT_PICTURES on until its next picture starts */

  char id[JOB_ID_MAX + 1];        /* x-request-id, or the durable job's own */
  const struct surface *surface;  /* how its answer is written */
  char caller[FAIR_NAME];         /* tenant, or "peer ADDRESS" of who has no key: whose job it is */
  double weight;                  /* of its tenant; 1 unless the policy says otherwise */
  int priority;                   /* of its tenant; 0 unless the policy says otherwise */
  struct limits_ticket ticket;    /* what it holds of its tenant's limits */
  struct share *share;            /* lock */
  int steps;                      /* of each picture; fewer than req.steps when it starts from another one */
  double work;                    /* of one step of one picture, in pixels and rows */
  int64_t due_ns;                 /* see fair.h */

  struct request req;
  struct sdapi_extra sdapi;       /* of A1111's surface alone */
  struct first first;             /* files of a first picture, until they are read; they may borrow from upload */
  struct buf upload;              /* the request's body, while the reader has the job */
  enum sampler_kind sampler;
  int karras;
  int is_durable;                 /* id is that of a job in the store */
  int wants_file;                 /* the picture itself instead of JSON */
  char base[JOB_BASE];            /* "https://pictures.example": what addresses in the answer begin with */
  char file_name[REQUEST_N_MAX][STORE_NAME]; /* of REPLY_URL: in the store; encoder */
  char styles[REQUEST_LORAS_MAX * (REQUEST_LORA_NAME + 16)]; /* "name:weight name:weight", for people */
  struct picture pic[REQUEST_N_MAX];
  uint8_t *pixels;
  int tokens;                     /* of the prompt */
  struct safety_target *target;   /* what it is to be drawn under; a reference */
  int device;                     /* that took it: its desk; set once, before it is RUNNING */
  struct generation *generation;  /* pinned by the device thread when it starts the job, a reference until the job is drawn */
  struct safety_stamp stamp;      /* of what was pinned; id "" before */
  int started, live;              /* pictures; device thread */
  _Atomic int drawn;              /* pictures that have pixels */
  _Atomic int steps_done;         /* of all pictures */

  _Atomic int wants_preview;      /* set by who looks, cleared by the device thread when it takes a snapshot */
  int previews_planned;           /* device thread: how many of req.previews were taken */
  int64_t preview_ns;             /* device thread: when the last snapshot was taken */
  int preview_step, preview_picture; /* what the preview on its way shows; device thread until it is sent */
  _Atomic int is_previewing;      /* one is on its way: the device thread takes no other */
  uint8_t *preview_rgb;           /* stage thread, then encoder */
  struct blob *preview[JOB_PREVIEWS]; /* lock: number k at k % JOB_PREVIEWS */
  int previews;                   /* lock: how many were made */
  int is_preview_recorded;        /* encoder thread */
  struct listener *listeners;     /* lock */

  int64_t submitted_ns, taken_ns; /* clock_ns() */
  struct stage_times times;       /* ms; text and vae by the stage thread, unet by the device thread, summed over the pictures */

  struct err err;
  struct buf file[REQUEST_N_MAX]; /* the encoded pictures */
  struct buf body;                /* the answer */
  struct parcel parcel, preview_parcel;

  void (*read)(void *arg);        /* lock, which is held: the reader has handed it back; may resume a connection and nothing else. NULL: the owner has left */
  void (*taken)(void *arg);       /* device thread: it begins; NULL: nobody minds. With wake_arg */
  void (*wake)(void *arg);
  void *wake_arg;
};

/* Where one device finds its work: what passes between its device thread and its stage thread, and how much it has. */
struct desk {
  pthread_cond_t has_work, has_stage;
  struct picture *back, **back_end; /* lock: pictures that the stage thread hands back */
  struct stage_item *stage, **stage_end; /* lock */
  int pictures;                   /* lock: of the jobs that it took, those that have not ended */
  int room;                       /* lock: pictures that it draws at once */
  int is_out;                     /* lock: it failed: it takes nothing more while another one can */
  _Atomic int stepping, staging;  /* its device thread, its stage thread is computing: who shares a processor leaves the other room */
};

struct jobs {
  struct lock lock;
  struct limits *limits;          /* where tickets go back to; NULL: no job has one */
  pthread_cond_t has_parcel, has_reading;
  struct desk desk[DEVICES_MAX];  /* `devices` entries */
  int devices;
  struct job *job;                /* n entries */
  int n;
  struct job *free;
  struct job *reading, **reading_end; /* READING, in order of arrival, without the one that the reader has */
  struct job *queue, **queue_end; /* QUEUED, in order of arrival */
  struct parcel *parcel, **parcel_end;
  struct shares shares;
  int waiting, max_waiting;       /* RESERVED, READING, PREPARING and QUEUED */
  int running;                    /* RUNNING */
  int active;                     /* everything that is not FREE */
  int is_closed;                  /* job_reserve refuses with E_NOTREADY */
  int is_over;                    /* whoever waits for work returns when there is nothing left */
  uint64_t serial;
  double ns_per_work;             /* what a device takes, smoothed; 0: nothing was measured yet */
};

/* max_waiting jobs may wait while `running` pictures are drawn on each of 1 to DEVICES_MAX devices. E_NOMEM. jobs_close after. */
MUST_CHECK int jobs_open(struct jobs *js, int max_waiting, int running, int devices, struct err *e);
void jobs_close(struct jobs *js); /* takes zeroed; every job is FREE and no thread uses it */

/* ---- owner: HTTP thread or jobs service ---- */

/* E_BUSY when the queue is full, E_NOTREADY when the server stops. On success the job is the caller's until job_submit or job_release. */
MUST_CHECK int job_reserve(struct jobs *js, struct job **j, struct err *e);
/* The reader is asked to read the first picture; it calls j->read when the job is the owner's again, j->err then says why it cannot be drawn. */
void job_read(struct jobs *js, struct job *j);
void job_submit(struct jobs *js, struct job *j); /* loader thread: what it was given to prepare */
/* The owner, or the device thread with a job that it cannot start yet: the loader is asked next, and hands it to job_submit or job_fail. */
void job_prepare(struct jobs *js, struct job *j);
/* Frees pixels, files, body and draws that never started. */
void job_release(struct jobs *js, struct job *j);

/* ---- reader thread ---- */

struct job *reading_next(struct jobs *js);          /* sleeps; NULL: it is all over */
void job_was_read(struct jobs *js, struct job *j);  /* frees it when its owner has left */

/* ---- device thread; device: which one, from 0 ---- */

/* Who is next (fair.h), now RUNNING and this device's. NULL: none waits, or a device with fewer pictures is to take it. */
struct job *job_take(struct jobs *js, int device);
/* Sleeps until a picture came back, or until there is a job for this device to take if may_take. 0: it is all over, and nothing came. */
int jobs_wait(struct jobs *js, int device, int may_take);
struct picture *pics_returned(struct jobs *js, int device); /* all that came back, linked by next; NULL: none */
void pic_send(struct jobs *js, struct picture *p, enum stage_work work); /* to its device's stage thread */
/* Whose turn it is: up to cap of n pictures, into p (fair.h). Returns how many. */
int jobs_choose(struct jobs *js, struct picture *const *ready, int n, int cap, struct picture **p);
/* Pictures had a turn of ns nanoseconds together: their shares, and what a step takes, are known better. Listeners hear of it. */
void jobs_stepped(struct jobs *js, struct picture *const *p, int n, int64_t ns);
void job_drawn(struct jobs *js, struct job *j);     /* every picture has ended; j->err says whether as wished */
void job_fail(struct jobs *js, struct job *j);      /* no picture was started; j->err says why; loader thread too */
/* Before the device takes a job: it draws so many pictures at once, fewer than jobs_open was told. */
void jobs_set_room(struct jobs *js, int device, int room);
/* The device failed: others finish what waits. The last one goes on taking jobs, which fail with it. */
void jobs_leave(struct jobs *js, int device);

/* ---- stage thread ---- */

struct stage_item *stage_next(struct jobs *js, int device); /* sleeps; NULL: it is all over */
void pic_return(struct jobs *js, struct picture *p); /* to its device thread; one whose draw is closed has ended */
void job_send_preview(struct jobs *js, struct job *j); /* preview_rgb holds pixels */

/* ---- encoder thread ---- */

struct parcel *parcel_next(struct jobs *js);        /* sleeps; NULL: it is all over */
/* b may be NULL: there is none after all. b's reference goes over. */
void job_add_preview(struct jobs *js, struct job *j, struct blob *b);
void job_finish(struct jobs *js, struct job *j);    /* body and file are the answer, unless j->err says what went wrong */

/* ---- any thread ---- */

/* The owner of a submitted job leaves: it is stopped, and released when it is DONE. 0: it is DONE, or was never submitted; the owner releases it. */
int job_disown(struct jobs *js, struct job *j);
/* Ends the job that had this serial, now when it waits, at the next step when it runs. */
void job_stop(struct jobs *js, struct job *j, uint64_t serial, int code);

/* What one may know of a job. */
struct job_view {
  enum job_state state;
  char id[JOB_ID_MAX + 1];
  int64_t submitted_ns;
  int steps, steps_done;   /* of all pictures */
  int pictures, drawn;
  enum job_cut ending;     /* its pictures at hand are coming to their end so */
  int position;            /* 1: the next to start; 0: it does not wait */
  double wait_s;           /* until it is done, by what the device took so far; 0 when nothing is known */
  struct blob *preview;    /* the oldest after the number that was asked for, a reference; NULL: none */
};
/* 0 when the entry is no longer this job. wants_preview: the device is asked for one. */
int job_look(struct jobs *js, struct job *j, uint64_t serial, int after_preview, int wants_preview, struct job_view *v);
/* The durable job with this id (a client may choose any for the others); of several that are the same the newest. NULL: none. */
struct job *job_find(struct jobs *js, const char *id, uint64_t *serial);
/* The job at hand of this caller on this surface: a running one, else the one that waits longest. NULL: none that is not DONE. */
struct job *job_find_caller(struct jobs *js, const char *caller, const struct surface *surface, uint64_t *serial);
/* The job that had this serial is done with what there is of its pictures: the answer has those that had a step at least, as they are. One that waits ends as
 * by job_stop with E_CANCEL, one that is drawn stays as it is. */
void job_cut(struct jobs *js, struct job *j, uint64_t serial, enum job_cut how);
/* All of this caller's jobs, by CUT_JOB. How many there were. */
int jobs_cut_caller(struct jobs *js, const char *caller, const struct surface *surface);
/* From now on l->wake is called when there is news of the job. 0 when the entry is no longer this job. */
int job_listen(struct jobs *js, struct job *j, uint64_t serial, struct listener *l);
void job_unlisten(struct jobs *js, struct listener *l); /* takes one that does not listen */

/* Main thread, at the end: admit no more; stop all with E_NOTREADY; let device, stage and encoder threads return. */
void jobs_refuse(struct jobs *js);
int jobs_are_refused(struct jobs *js); /* any thread */
void jobs_stop_all(struct jobs *js, int code);
void jobs_end(struct jobs *js);

/* job_desk.c, for job.c; the caller holds the lock. */
void desk_open(struct desk *d, int room);
void desk_close(struct desk *d);
int desk_may_take(const struct jobs *js, int device); /* none that has room has fewer pictures */
void desks_wake(struct jobs *js);                     /* a job waits: those that may take it look */

struct jobs_count {
  int waiting, running, active;
  int room; /* pictures that all devices together draw at once */
};
struct jobs_count jobs_count(struct jobs *js);
int jobs_retry_after(struct jobs *js);   /* seconds until a place is likely, 1..60 */
/* The sentence for a client whose job was stopped with this code. */
int job_stop_reason(struct err *e, int code);

#endif
