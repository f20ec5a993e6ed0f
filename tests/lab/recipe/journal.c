/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A journal as a database keeps one: records in a ring, each durable before it is acknowledged.
 *
 * journal write FILE map|block NAME: goes on after the newest record of FILE, for ever. `map` stores into a mapping of
 * FILE and calls msync; `block` writes with O_DIRECT and O_DSYNC. After each record, it writes to the console, for
 * guest.py, the answer NAME, whose result is the record's number.
 * journal check FILE: prints the number of the newest record if all before it, as many as the ring has, are whole; the
 * one after it may be torn. 0 for a FILE without records. Status 1 if a record is missing or wrong.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define RECORDS 256
#define WORDS 512 /* of a record: 4096 bytes, what O_DIRECT needs */

static uint64_t record[WORDS] __attribute__((aligned(4096)));

static void must(int good, const char *what)
{
    if (!good) {
        perror(what);
        exit(2);
    }
}

static void fill(uint64_t *target, uint64_t number)
{
    uint64_t state = number;

    for (int n = 0; n < WORDS; n++) {
        target[n] = state;
        state = state * 6364136223846793005u + 1442695040888963407u;
    }
}

static int whole(const uint64_t *found)
{
    fill(record, found[0]);
    return found[0] && !memcmp(found, record, sizeof record);
}

/* The newest record; all before it must be whole. */
static uint64_t newest(const uint64_t *ring)
{
    uint64_t last = 0;

    for (int n = 0; n < RECORDS; n++)
        if (whole(ring + n * WORDS) && ring[n * WORDS] > last)
            last = ring[n * WORDS];
    for (uint64_t number = last > RECORDS - 1 ? last - (RECORDS - 2) : 1; number <= last; number++) {
        const uint64_t *found = ring + number % RECORDS * WORDS;

        if (!whole(found) || found[0] != number) {
            printf("newest %llu, but %llu is not whole\n", (unsigned long long)last, (unsigned long long)number);
            exit(1);
        }
    }
    return last;
}

int main(int argc, char **argv)
{
    int check = argc == 3 && !strcmp(argv[1], "check");
    int block = argc == 5 && !strcmp(argv[3], "block");
    int fd, console = -1;
    uint64_t *ring, number;
    char line[160];

    must(check || argc == 5, "usage");
    fd = open(argv[2], O_RDWR | (block ? O_DIRECT | O_DSYNC : 0));
    must(fd >= 0, "open");
    if (check || block) { /* not a mapping: that of a block device is in the page cache */
        ring = aligned_alloc(4096, RECORDS * sizeof record);
        must(ring && pread(fd, ring, RECORDS * sizeof record, 0) == RECORDS * sizeof record, "read");
    } else {
        ring = mmap(NULL, RECORDS * sizeof record, PROT_READ | PROT_WRITE, MAP_SHARED_VALIDATE | MAP_SYNC, fd, 0);
        must(ring != MAP_FAILED, "mmap with MAP_SYNC");
    }
    number = newest(ring);
    if (check) {
        printf("%llu\n", (unsigned long long)number);
        return 0;
    }
    console = open("/dev/console", O_WRONLY | O_NOCTTY);
    must(console >= 0, "open the console");
    for (;;) {
        uint64_t *target = ring + ++number % RECORDS * WORDS;
        int length;

        fill(record, number);
        if (block) {
            must(pwrite(fd, record, sizeof record, number % RECORDS * sizeof record) == sizeof record, "write");
        } else {
            memcpy(target, record, sizeof record);
            must(!msync(target, sizeof record, MS_SYNC), "msync");
        }
        length = snprintf(line, sizeof line,
                          "@nvdimm-lab {\"kind\":\"answer\",\"id\":\"%s\",\"rc\":0,\"result\":\"%llu\"}\n", argv[4],
                          (unsigned long long)number);
        must(write(console, line, length) == length, "write to the console");
    }
}
