/*
 * Measures for how long the guest did not run.
 *
 * Its own clocks show that it had to wait (for a page, for the host's CPU), but stand still while
 * the machine is stopped. The mainboard's clock follows the host's; it counts whole seconds, so the
 * moment is measured at which its seconds change: when the guest's clock finds a second too short
 * by B, the machine was stopped for B in it. A stop that spans a change of seconds shows in two
 * lines, which add up to it.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <sys/io.h>
#include <time.h>

#include "workload.h"

enum { RTC_SECONDS = 0, RTC_MINUTES = 2, RTC_HOURS = 4, RTC_ADDRESS = 0x70, RTC_DATA = 0x71, DAY_SECONDS = 86400 };

static int64_t now_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000LL + now.tv_nsec / 1000;
}

static int rtc(int part)
{
    outb((unsigned char)part, RTC_ADDRESS);
    int bcd = inb(RTC_DATA);
    return (bcd >> 4) * 10 + (bcd & 15);
}

static void *watch(void *unused)
{
    struct sched_param realtime = {.sched_priority = 50};
    pthread_setschedparam(pthread_self(), SCHED_FIFO, &realtime);
    if (ioperm(RTC_ADDRESS, 2, 1))
        fail("ioperm");
    int64_t last = now_us(), changed = 0, longest = 0;
    int second = rtc(RTC_SECONDS), time_of_day = 0;
    for (;;) {
        struct timespec nap = {.tv_nsec = (long)setting("stall_us") * 1000};
        nanosleep(&nap, NULL);
        int64_t now = now_us();
        int second_now = rtc(RTC_SECONDS);
        if (now - last > longest)
            longest = now - last;
        last = now;
        if (second_now == second)
            continue;
        int time_now = rtc(RTC_HOURS) * 3600 + rtc(RTC_MINUTES) * 60 + second_now;
        if (changed) {
            int64_t passed = (time_now - time_of_day + DAY_SECONDS) % DAY_SECONDS * 1000000LL;
            say("STALL max_us=%lld stopped_us=%lld", (long long)longest, (long long)(passed - (now - changed)));
        }
        second = second_now;
        time_of_day = time_now;
        changed = now;
        longest = 0;
    }
    return unused;
}

void watch_stalls(void)
{
    pthread_t thread;
    if (pthread_create(&thread, NULL, watch, NULL))
        fail("pthread_create");
}
