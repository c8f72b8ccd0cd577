/* RAM that the workload can vouch for: pages stamped in turn, and bulk pages filled once. */
#define _GNU_SOURCE
#include <string.h>
#include <sys/mman.h>

#include "workload.h"

enum { BULK_PAGES_PER_CHECK = 2048 };

static uint64_t *stamps, stamp_groups, group_pages;
static uint64_t *bulk, bulk_pages, bulk_next;

uint64_t *pages(uint64_t number)
{
    if (!number)
        return NULL;
    void *memory = mmap(NULL, number * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        fail("mmap");
    memset(memory, 0, number * PAGE);
    return memory;
}

static uint64_t next_random(uint64_t x)
{
    x ^= x << 13;
    x ^= x >> 7;
    return x ^ x << 17;
}

void fill_memory(void)
{
    group_pages = setting("dirty_pages");
    stamp_groups = (setting("stamp_mib") << 20) / PAGE / group_pages;
    if (!stamp_groups)
        fail("stamp_mib is too small for dirty_pages");
    stamps = pages(stamp_groups * group_pages);
    bulk_pages = (setting("touch_mib") << 20) / PAGE;
    bulk = pages(bulk_pages);
    for (uint64_t page = 0; page < bulk_pages; page++) {
        uint64_t x = seed ^ (page + 1);
        for (uint64_t i = 0; i < WORDS; i++)
            bulk[page * WORDS + i] = x = next_random(x);
    }
}

static void verify_stamp(uint64_t page, uint64_t n)
{
    const uint64_t *at = stamps + page * WORDS;
    uint64_t last = n ? n ^ page ^ seed : 0;
    if (at[0] != n || at[WORDS / 2] != n || at[WORDS - 1] != last)
        fault("stamp of page", page, n, at[0] != n ? at[0] : at[WORDS / 2]);
}

void write_stamps(void)
{
    uint64_t first = count % stamp_groups * group_pages;
    for (uint64_t page = first; page < first + group_pages; page++) {
        uint64_t *at = stamps + page * WORDS;
        verify_stamp(page, count > stamp_groups ? count - stamp_groups : 0);
        at[0] = at[WORDS / 2] = count;
        at[WORDS - 1] = count ^ page ^ seed;
    }
}

void check_stamps(void)
{
    for (uint64_t page = 0; page < stamp_groups * group_pages; page++)
        verify_stamp(page, newest(count, page / group_pages, stamp_groups));
}

void check_some_bulk(void)
{
    for (int i = 0; i < BULK_PAGES_PER_CHECK && bulk_pages; i++) {
        uint64_t x = seed ^ (bulk_next + 1);
        for (uint64_t word = 0; word < WORDS; word++) {
            x = next_random(x);
            if (bulk[bulk_next * WORDS + word] != x)
                fault("bulk page", bulk_next, x, bulk[bulk_next * WORDS + word]);
        }
        if (++bulk_next == bulk_pages) {
            bulk_next = 0;
            say("BULK %llu ok", (unsigned long long)count);
            return;
        }
    }
}
