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
    MAX_DISKS = 4,
    RING_OFFSET = 1 << 20,
    LOG_OFFSET = 64 << 20,
    LOG_PAGES = 16,
    LOG_ENTRIES = (LOG_PAGES - 1) * WORDS,
};

static const uint64_t RECORD_MAGIC = 0x3144524f43455256ULL; /* "VRECORD1" */
static const uint64_t LOG_MAGIC = 0x3153474f4c4d5356ULL;    /* "VSMLOGS1" */

/* The truth that a disk is held against. The record of `started` may be on the disk, that of `completed` must be. */
struct disk {
    int fd;
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

/* Fills `expected` with record n of a disk; there is no record 0, its slot was never written. */
static void expect(uint64_t n, unsigned disk)
{
    memset(expected, 0, PAGE);
    if (n == 0)
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

unsigned open_disks(void)
{
    slots = setting("slots");
    found = pages(slots);
    expected = pages(1);
    log_pages = pages(LOG_PAGES);
    for (; disk_count < MAX_DISKS && disk_count + 1 != setting("ext4_disk"); disk_count++) {
        char path[] = "/dev/vda";
        path[7] = (char)('a' + disk_count);
        int fd = open(path, O_RDWR | O_DIRECT | O_DSYNC);
        if (fd < 0)
            break;
        disks[disk_count].fd = fd;
        write_all(fd, found, slots * PAGE, RING_OFFSET); /* each boot counts anew */
        if (disk_count == 0)
            write_all(fd, log_pages, LOG_PAGES * PAGE, LOG_OFFSET);
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
