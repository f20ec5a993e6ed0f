/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A guest that means harm: asks its label server for everything, right and wrong.
 *
 * hostile COUNT SEED: writes COUNT requests to the page at MEMA and to the ports of the label server, most of them as
 * QEMU's SSDT does, with every function, handle, offset and length at and past the limits, the others with any value, in
 * any width, to any of the ports. Half of the time a second process changes the page meanwhile. In the end the server
 * has to give an answer of the right form to a right request.
 */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/io.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define MEMA 0xFD000000u
#define PORT 0xA18
#define PAGE 4096

static volatile uint32_t *page;
static uint32_t state;

static uint32_t any(void)
{
    state = state * 1664525 + 1013904223;
    return state >> 8 | state << 24;
}

static uint32_t below(uint32_t limit)
{
    return any() % limit;
}

/* 0, small, the sizes of things and one more or less, or anything */
static uint32_t number(void)
{
    static const uint32_t limits[] = { 0, 4076, 4084, 4096, 128 << 10, 2 << 20, 1u << 31, 0xFFFFFFFF };

    return below(4) ? limits[below(8)] + below(3) - 1 : any();
}

static void fill(void)
{
    page[0] = below(4) ? below(5) : any();
    page[1] = below(4) ? 1 : any();
    page[2] = below(4) ? below(9) : any();
    page[3] = number();
    page[4] = number();
    for (int n = 5; n < 5 + (int)below(40); n++)
        page[n] = any();
}

static void knock(void)
{
    uint32_t value = below(8) ? MEMA : any();
    int port = PORT + (below(8) ? 0 : below(4));

    switch (below(8)) {
    case 0:
        outb(value, port);
        break;
    case 1:
        outw(value, port & ~1);
        break;
    case 2:
        (void)inl(PORT);
        break;
    case 3: {
        uint32_t values[4] = { MEMA, any(), MEMA, any() };

        outsl(PORT, values, 4);
        break;
    }
    default:
        outl(value, PORT);
    }
}

int main(int argc, char **argv)
{
    long count = argc > 2 ? atol(argv[1]) : 0;
    int memory = open("/dev/mem", O_RDWR | O_SYNC);
    pid_t scribbler;

    state = argc > 2 ? atol(argv[2]) : 1;
    page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, memory, MEMA);
    if (memory < 0 || page == MAP_FAILED || iopl(3)) {
        perror("hostile");
        return 1;
    }
    scribbler = fork();
    if (!scribbler) {
        for (;;) {
            usleep(1 + below(300));
            page[below(8)] = number();
        }
    }
    for (long n = 0; n < count; n++) {
        if (n == count / 2) {
            kill(scribbler, SIGKILL);
            waitpid(scribbler, NULL, 0);
        }
        fill();
        knock();
    }
    memset((void *)page, 0, PAGE);
    page[0] = 1;
    page[1] = 1;
    page[2] = 4;
    outl(MEMA, PORT);
    printf("%ld requests; then label size: length %u, status %u, size %u\n", count, page[0], page[1], page[2]);
    return page[0] != 16 || page[1];
}
