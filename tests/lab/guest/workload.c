/*
 * The lab guest's one program: counts, and proves at every count that its RAM and its disks are of
 * one instant.
 *
 * Count n writes record n to slot n % slots of each disk, disk after disk, and RAM knows for each
 * disk which record was started and which completed. It stamps some pages of RAM with n, too.
 * Whatever is overwritten is read first and must be what RAM says it is: a disk that is older than
 * RAM, a disk that is newer than RAM, and RAM whose pages are of different instants all show up
 * within one turn of the ring. Full checks of everything come on top.
 *
 * Prints on its standard output (the serial console):
 *   READY disks=D seed=S          everything is set up, counting begins
 *   COUNT n ok                    several times a second
 *   CHECK n ok                    all slots of all disks and all stamped pages were verified at n
 *   DISK name at n                a disk that was plugged in is used from count n + 1 on
 *   BULK n ok                     all of the bulk memory was verified since the last such line
 *   STALL max_us=A stopped_us=B   each second: A the longest time that a real-time thread had to
 *                                 wait in guest time, B how long the machine was stopped
 *   FAULT: text                   RAM and disks disagree; counting ends
 *   FLUSHED n                     SIGTERM came, the log kept in RAM is on disk 0; then it ends
 *
 * Kernel command line: vmsnap.NAME=NUMBER, names and defaults in `settings` below.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

#include "workload.h"

struct setting {
    const char *name;
    uint64_t value;
    uint64_t least;
};

static struct setting settings[] = {
    {"slots", 256, 1},       /* records in each disk's ring */
    {"stamp_mib", 8, 1},     /* RAM that is stamped in turn */
    {"dirty_pages", 8, 1},   /* pages stamped by each count */
    {"touch_mib", 0, 0},     /* bulk RAM filled once with incompressible data, and verified */
    {"pause_us", 25000, 0},  /* sleep after each count */
    {"stall_us", 10000, 1},  /* how long the thread that watches for stalls sleeps */
    {"count_every", 5, 1},   /* counts from one COUNT line to the next */
    {"check_every", 40, 1},  /* counts from one full check to the next */
    {"ext4_disk", 0, 0},     /* the number, from 1 on, of a disk, the last one, that is left to programs/application.c */
    {"packets", 0, 0},       /* not 0: programs/packets.c runs */
    {"controllers", 0, 0},   /* SCSI and IDE drivers are loaded, so many disks awaited, and later ones taken, too */
    {"tpm", 0, 0},           /* not 0: the TPM's PCR 16 is extended each second */
    {"deaf", 0, 0},          /* not 0: the power button does nothing */
    {"agent", 0, 0},         /* not 0: QEMU's guest agent runs */
};

uint64_t count, seed;
static volatile sig_atomic_t end_asked;

void say(const char *format, ...)
{
    char line[256];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(line, sizeof line - 1, format, arguments);
    va_end(arguments);
    if (length > (int)sizeof line - 2)
        length = sizeof line - 2;
    line[length++] = '\n';
    if (write(STDOUT_FILENO, line, (size_t)length) < 0) /* one write: lines of two threads never mix */
        _exit(3);
}

void fault(const char *what, uint64_t where, uint64_t wanted, uint64_t got)
{
    say("FAULT: %s %llu at count %llu: holds %llu, RAM says %llu", what, (unsigned long long)where,
        (unsigned long long)count, (unsigned long long)got, (unsigned long long)wanted);
    while (!end_asked)
        usleep(10000);
    exit(2);
}

void fail(const char *what)
{
    say("FAULT: %s: %s", what, strerror(errno));
    exit(3);
}

uint64_t setting(const char *name)
{
    for (size_t i = 0; i < sizeof settings / sizeof *settings; i++)
        if (!strcmp(settings[i].name, name))
            return settings[i].value;
    abort();
}

static void set(const char *name, const char *number)
{
    for (size_t i = 0; i < sizeof settings / sizeof *settings; i++) {
        if (strcmp(settings[i].name, name))
            continue;
        settings[i].value = strtoull(number, NULL, 10);
        if (settings[i].value >= settings[i].least)
            return;
    }
    say("FAULT: setting vmsnap.%s=%s: no such name, or too small", name, number);
    exit(3);
}

static void read_settings(void)
{
    static const char prefix[] = "vmsnap.";
    char line[4096];
    int fd = open("/proc/cmdline", O_RDONLY);
    ssize_t length = fd < 0 ? -1 : read(fd, line, sizeof line - 1);
    if (length < 0)
        fail("/proc/cmdline");
    close(fd);
    line[length] = 0;
    for (char *word = strtok(line, " \n"); word; word = strtok(NULL, " \n")) {
        char *number = strchr(word, '=');
        if (strncmp(word, prefix, strlen(prefix)) || !number)
            continue;
        *number++ = 0;
        set(word + strlen(prefix), number);
    }
}

uint64_t newest(uint64_t last, uint64_t remainder, uint64_t period)
{
    uint64_t n = last - last % period + remainder;
    if (n <= last)
        return n;
    return n < period ? 0 : n - period;
}

static void ask_end(int signal_number)
{
    (void)signal_number;
    end_asked = 1;
}

static void count_on(void)
{
    count++;
    write_records();
    write_stamps();
    if (count % setting("check_every") == 0) {
        if (setting("controllers"))
            adopt_disks();
        check_disks();
        check_stamps();
        check_some_bulk();
        say("CHECK %llu ok", (unsigned long long)count);
    }
    if (count % setting("count_every") == 0)
        say("COUNT %llu ok", (unsigned long long)count);
}

int main(void)
{
    read_settings();
    signal(SIGTERM, ask_end);
    if (getrandom(&seed, sizeof seed, GRND_INSECURE) != sizeof seed)
        fail("getrandom");
    fill_memory();
    unsigned disks = open_disks();
    say("READY disks=%u seed=%llu", disks, (unsigned long long)seed);
    watch_stalls();
    while (!end_asked) {
        count_on();
        usleep((useconds_t)setting("pause_us"));
    }
    flush_log();
    say("FLUSHED %llu", (unsigned long long)count);
    return 0;
}
