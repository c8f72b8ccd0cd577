/* What the parts of the lab guest's workload share; workload.c tells what it is about. */
#ifndef WORKLOAD_H
#define WORKLOAD_H

#include <stdint.h>

enum { PAGE = 4096, WORDS = PAGE / 8 };

/* workload.c */
extern uint64_t count; /* what has been counted so far */
extern uint64_t seed;  /* of this boot, in everything that is written */

uint64_t setting(const char *name);
void say(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* RAM or disk holds `got` where `wanted` must be: says so and waits for the end, counting no more. */
void fault(const char *what, uint64_t where, uint64_t wanted, uint64_t got) __attribute__((noreturn));
/* A system call failed: says so and ends. */
void fail(const char *what) __attribute__((noreturn));
/* The newest number up to `last` that leaves `remainder` when divided by `period`; 0 where there is none. */
uint64_t newest(uint64_t last, uint64_t remainder, uint64_t period);

/* disks.c */
unsigned open_disks(void); /* returns how many there are */
void adopt_disks(void);    /* those that came since */
void write_records(void);  /* of the current count, to each disk in order */
void check_disks(void);
void flush_log(void);

/* memory.c */
uint64_t *pages(uint64_t number); /* of zeros, never given back */
void fill_memory(void);
void write_stamps(void); /* of the current count */
void check_stamps(void);
void check_some_bulk(void);

/* stalls.c */
void watch_stalls(void); /* starts a thread that prints STALL lines */

#endif
