/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Direct I/O between a disk and memory that is persistent memory.
 *
 * directio FILE DISK LENGTH SECONDS: maps FILE, which is on a DAX file system, and has it be the buffer with which DISK
 * is read and written with O_DIRECT. Prints a line for each direction: what it did, compared with what an ordinary
 * buffer shows: WORKS, ERROR and its errno, HANG after SECONDS, or WRONG BYTES. The status is 0 if it printed both.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <sys/wait.h>
#include <unistd.h>

static size_t length;
static char *persistent, *ordinary;

static void fill(char *buffer, int seed)
{
    for (size_t n = 0; n < length; n++)
        buffer[n] = (n * 7 + n / 512 + seed) | 1;
}

static void must(int good, const char *what)
{
    if (!good) {
        printf("cannot %s: %s\n", what, strerror(errno));
        exit(3);
    }
}

static void told(const char *direction, long done)
{
    if (done < 0)
        printf("%s: ERROR %s\n", direction, strerror(errno));
    else if ((size_t)done != length)
        printf("%s: ERROR only %ld bytes\n", direction, done);
}

/* The first wrong byte, how many there are, and what is there instead. */
static void compare(const char *direction, const char *found, const char *right)
{
    size_t wrong = 0, first = 0;

    for (size_t n = length; n--;)
        if (found[n] != right[n])
            wrong++, first = n;
    if (wrong)
        printf("%s: WRONG BYTES %zu of %zu, from %zu on %02x instead of %02x\n", direction, wrong, length, first,
               found[first] & 255, right[first] & 255);
    else
        printf("%s: WORKS\n", direction);
}

static void disk_to_memory(int disk)
{
    long done;

    fill(ordinary, 3);
    must(pwrite(disk, ordinary, length, 0) == (long)length, "prepare the disk");
    memset(persistent, 0xaa, length);
    done = pread(disk, persistent, length, 0);
    if (done != (long)length)
        told("read", done);
    else
        compare("read", persistent, ordinary);
}

static void memory_to_disk(int disk)
{
    long done;

    fill(ordinary, 5);
    must(pwrite(disk, ordinary, length, 0) == (long)length, "prepare the disk");
    fill(persistent, 8);
    done = pwrite(disk, persistent, length, 0);
    if (done != (long)length) {
        told("write", done);
        return;
    }
    must(pread(disk, ordinary, length, 0) == (long)length, "read the disk");
    compare("write", ordinary, persistent);
}

/* A process whose disk never answers cannot be killed, so do not wait for it. */
static int within(const char *direction, void (*step)(int), int disk, int seconds)
{
    int status;
    pid_t child;

    fflush(stdout);
    child = fork();
    must(child >= 0, "fork");
    if (!child) {
        step(disk);
        exit(0);
    }
    for (int tenths = 0; tenths < seconds * 10; tenths++) {
        if (waitpid(child, &status, WNOHANG) == child)
            return WIFEXITED(status) && !WEXITSTATUS(status);
        nanosleep(&(struct timespec){ .tv_nsec = 100000000 }, NULL);
    }
    printf("%s: HANG, no answer within %d s\n", direction, seconds);
    return 1;
}

int main(int argc, char **argv)
{
    int file, disk, seconds, good;

    if (argc != 5)
        return 2;
    length = atol(argv[3]);
    seconds = atoi(argv[4]);
    file = open(argv[1], O_RDWR | O_CREAT, 0600);
    must(file >= 0 && !posix_fallocate(file, 0, length), argv[1]);
    disk = open(argv[2], O_RDWR | O_DIRECT);
    must(disk >= 0, argv[2]);
    persistent = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    ordinary = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    must(persistent != MAP_FAILED && ordinary != MAP_FAILED, "map memory");
    good = within("read", disk_to_memory, disk, seconds);
    good &= within("write", memory_to_disk, disk, seconds);
    return !good;
}
