/*
 * The records and the log on the disks. See disk_records.py, which reads and forges them, for the
 * layout.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "workload.h"

enum {
    MAX_DISKS = 8,
    LETTERS = 4,
    FIND_SECONDS = 20,
    RING_OFFSET = 1 << 20,
    LOG_OFFSET = 64 << 20,
    LOG_PAGES = 16,
    LOG_ENTRIES = (LOG_PAGES - 1) * WORDS,
};

static const uint64_t RECORD_MAGIC = 0x3144524f43455256ULL; /* "VRECORD1" */
static const uint64_t LOG_MAGIC = 0x3153474f4c4d5356ULL;    /* "VSMLOGS1" */

/*
 * The truth that a disk is held against. The record of `started` may be on the disk, that of `completed` must be. There
 * is none of `since` or before: the disk was not there yet.
 */
struct disk {
    int fd;
    char name[4];
    uint64_t since;
    uint64_t started;
    uint64_t completed;
};

static struct disk disks[MAX_DISKS];
static unsigned disk_count;
static uint64_t slots, *found, *expected, *log_pages;

static void write_all(int fd, const void *data, size_t length, off_t offset)
{
    if (pwrite(fd, data, length, offset) != (ssize_t)length)
        fail("write");
}

static void read_all(int fd, void *data, size_t length, off_t offset)
{
    if (pread(fd, data, length, offset) != (ssize_t)length)
        fail("read");
}

static off_t slot_offset(uint64_t n)
{
    return RING_OFFSET + (off_t)(n % slots) * PAGE;
}

/* Fills `expected` with record n of a disk; there is none that is too old, its slot was never written. */
static void expect(uint64_t n, unsigned disk)
{
    memset(expected, 0, PAGE);
    if (n <= disks[disk].since)
        return;
    expected[0] = RECORD_MAGIC;
    expected[1] = seed;
    expected[2] = n;
    expected[3] = disk;
    for (uint64_t i = 4; i < WORDS; i++)
        expected[i] = (n * 0x9e3779b97f4a7c15ULL) ^ (i * 0xbf58476d1ce4e5b9ULL) ^ seed;
}

static void verify(const uint64_t *page, uint64_t n, unsigned disk)
{
    expect(n, disk);
    if (!memcmp(page, expected, PAGE))
        return;
    if (page[0] == RECORD_MAGIC && page[2] > n)
        fault("too new a record on disk", disk, n, page[2]);
    if (page[0] == RECORD_MAGIC && page[2] < n)
        fault("too old a record on disk", disk, n, page[2]);
    fault("damaged record on disk", disk, n, page[2]);
}

void write_records(void)
{
    for (unsigned d = 0; d < disk_count; d++) {
        struct disk *disk = &disks[d];
        read_all(disk->fd, found, PAGE, slot_offset(count));
        verify(found, count > slots ? count - slots : 0, d);
        expect(count, d);
        __atomic_store_n(&disk->started, count, __ATOMIC_SEQ_CST);
        write_all(disk->fd, expected, PAGE, slot_offset(count));
        __atomic_store_n(&disk->completed, count, __ATOMIC_SEQ_CST);
    }
    log_pages[WORDS + count % LOG_ENTRIES] = count;
}

void check_disks(void)
{
    for (unsigned d = 0; d < disk_count; d++) {
        if (disks[d].started != count || disks[d].completed != count)
            fault("own book-keeping of disk", d, count, disks[d].completed);
        read_all(disks[d].fd, found, slots * PAGE, RING_OFFSET);
        for (uint64_t slot = 0; slot < slots; slot++)
            verify(found + slot * WORDS, newest(disks[d].completed, slot, slots), d);
    }
}

static int known(const char *name)
{
    for (unsigned d = 0; d < disk_count; d++)
        if (!strcmp(disks[d].name, name))
            return 1;
    return 0;
}

/* Takes a disk of that name if there is one that can be written and is not known yet. */
static void adopt(const char *name)
{
    char path[] = "/dev/vda";
    memcpy(path + 5, name, 3);
    if (disk_count == MAX_DISKS || known(name))
        return;
    int fd = open(path, O_RDWR | O_DIRECT | O_DSYNC);
    if (fd < 0)
        return;
    struct disk *disk = &disks[disk_count];
    *disk = (struct disk){.fd = fd, .since = count, .started = count, .completed = count};
    memcpy(disk->name, name, 3);
    memset(found, 0, slots * PAGE);
    write_all(fd, found, slots * PAGE, RING_OFFSET); /* each boot counts anew */
    if (disk_count++ == 0)
        write_all(fd, log_pages, LOG_PAGES * PAGE, LOG_OFFSET);
    if (count)
        say("DISK %s at %llu", name, (unsigned long long)count);
}

void adopt_disks(void)
{
    char name[] = "vda";
    for (char kind = 'v';; kind = 's') {
        name[0] = kind;
        for (unsigned letter = 0; letter < LETTERS; letter++) {
            name[2] = (char)('a' + letter);
            if (kind == 's' || letter + 1 != setting("ext4_disk"))
                adopt(name);
        }
        if (kind == 's' || !setting("controllers"))
            return;
    }
}

unsigned open_disks(void)
{
    slots = setting("slots");
    found = pages(slots);
    expected = pages(1);
    log_pages = pages(LOG_PAGES);
    adopt_disks();
    /* SCSI disks are found after their driver is loaded. */
    for (unsigned i = 0; disk_count < setting("controllers") && i < FIND_SECONDS * 100; i++) {
        usleep(10000);
        adopt_disks();
    }
    return disk_count;
}

void flush_log(void)
{
    log_pages[0] = LOG_MAGIC;
    log_pages[1] = seed;
    log_pages[2] = count;
    if (disk_count)
        write_all(disks[0].fd, log_pages, LOG_PAGES * PAGE, LOG_OFFSET);
}
