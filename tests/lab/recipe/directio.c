/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Direct I/O between a disk and memory that is persistent memory.
 *
 * directio FILE DISK LENGTH: maps FILE, which is on a DAX file system, and has it be the buffer with which /dev/DISK
 * is read and written with O_DIRECT. Prints a line for each direction: what it did, compared with what an ordinary
 * buffer shows: WORKS, ERROR and its errno, WRONG BYTES, or HANG if the device says that it answers nothing any more.
 * The status is 0 if it printed both.
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
static char *persistent, *ordinary, *result;

static void fill(char *buffer, int seed)
{
    for (size_t n = 0; n < length; n++)
        buffer[n] = (n * 7 + n / 512 + seed) | 1;
}

static void must(int good, const char *what)
{
    if (!good) {
        printf("cannot %s: %s\n", what, strerror(errno));
        sprintf(result, "cannot %s: %s", what, strerror(errno));
        exit(3);
    }
}

static void failed(long done)
{
    if (done < 0)
        sprintf(result, "ERROR %s", strerror(errno));
    else
        sprintf(result, "ERROR only %ld bytes", done);
}

/* The first wrong byte, how many there are, and what is there instead. */
static void compare(const char *found, const char *right)
{
    size_t wrong = 0, first = 0;

    for (size_t n = length; n--;)
        if (found[n] != right[n])
            wrong++, first = n;
    if (wrong)
        sprintf(result, "WRONG BYTES %zu of %zu, from %zu on %02x instead of %02x", wrong, length, first,
                found[first] & 255, right[first] & 255);
    else
        strcpy(result, "WORKS");
}

static void disk_to_memory(int disk)
{
    long done;

    fill(ordinary, 3);
    must(pwrite(disk, ordinary, length, 0) == (long)length, "prepare the disk");
    memset(persistent, 0xaa, length);
    done = pread(disk, persistent, length, 0);
    if (done != (long)length)
        failed(done);
    else
        compare(persistent, ordinary);
}

static void memory_to_disk(int disk)
{
    long done;

    fill(ordinary, 5);
    must(pwrite(disk, ordinary, length, 0) == (long)length, "prepare the disk");
    fill(persistent, 8);
    done = pwrite(disk, persistent, length, 0);
    if (done != (long)length) {
        failed(done);
        return;
    }
    must(pread(disk, ordinary, length, 0) == (long)length, "read the disk");
    compare(ordinary, persistent);
}

/* Return true if a virtio device answers nothing until it is reset: bit 6 of its status (Virtio 1.2, 2.1). */
static int needs_reset(const char *name)
{
    char path[64];
    unsigned status = 0;
    FILE *file;

    snprintf(path, sizeof(path), "/sys/block/%s/device/status", name);
    file = fopen(path, "r");
    if (!file)
        return 0;
    if (fscanf(file, "%x", &status) != 1)
        status = 0;
    fclose(file);
    return status & 0x40;
}

/* Return the status of a child that has done the step. One whose disk never answers cannot be killed, so do not wait for
 * it; it has no output open, which others would wait for. */
static int follow(const char *direction, void (*step)(int), int disk, const char *name)
{
    int status = 0;
    pid_t child = fork();

    must(child >= 0, "fork");
    if (!child) {
        for (int each = 0; each < 3; each++)
            close(each);
        step(disk);
        _exit(0);
    }
    while (waitpid(child, &status, WNOHANG) != child) {
        if (needs_reset(name)) {
            strcpy(result, "HANG, the device needs a reset");
            break;
        }
        nanosleep(&(struct timespec){ .tv_nsec = 100000000 }, NULL);
    }
    printf("%s: %s\n", direction, result);
    return status;
}

int main(int argc, char **argv)
{
    char path[64];
    int file, disk, status;

    if (argc != 4)
        return 2;
    length = atol(argv[3]);
    result = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    file = open(argv[1], O_RDWR | O_CREAT, 0600);
    must(file >= 0 && !posix_fallocate(file, 0, length), argv[1]);
    snprintf(path, sizeof(path), "/dev/%s", argv[2]);
    disk = open(path, O_RDWR | O_DIRECT);
    must(disk >= 0, path);
    persistent = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    ordinary = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    must(persistent != MAP_FAILED && ordinary != MAP_FAILED, "map memory");
    setvbuf(stdout, NULL, _IOLBF, 0);
    status = follow("read", disk_to_memory, disk, argv[2]);
    status |= follow("write", memory_to_disk, disk, argv[2]);
    return !!status;
}
