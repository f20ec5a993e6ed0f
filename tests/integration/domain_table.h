/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The domains of a host without Xen: what its stand-in libraries share.
 *
 * All is at a fixed place, because libvirt gives its hooks none of its environment but PATH, HOME, LD_LIBRARY_PATH and
 * a few more (src/util/vircommand.c:virCommandAddEnvPassCommon). The place is in a mount namespace of the test's own.
 */
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <unistd.h>

#define FOLDER "/run/xen-stand-in/"

#define DOMAINS 64
#define RUNS (-1)

struct domain {
    uint32_t domid; /* 0: no domain */
    uint8_t uuid[16];
    char name[64];
    int paused;
    int booted;
    int shutdown_reason; /* or RUNS */
    int watched;
    pid_t device_model;
    uint64_t memory_kib;
};

struct domain_table {
    uint32_t last_domid;
    uint32_t last_image;
    struct domain domains[DOMAINS];
};

/* The table is in a file: domains outlive libvirtd, and its hooks ask for them. NULL when there is none. */
static inline struct domain_table *domain_table(void)
{
    static struct domain_table *table;
    int fd;

    if (!table && (fd = open(FOLDER "domains", O_RDWR | O_CLOEXEC)) >= 0) {
        void *memory = mmap(NULL, sizeof(*table), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

        close(fd);
        if (memory != MAP_FAILED)
            table = memory;
    }
    return table;
}

/* A guest's memory below 4 GiB is a sparse file. */
#define MEMORY_SIZE (1ull << 32)

static inline void memory_path(char path[64], uint32_t domid)
{
    snprintf(path, 64, FOLDER "memory-%u", domid);
}

/* Domid 0 finds a free entry. */
static inline struct domain *find_domain(uint32_t domid)
{
    struct domain_table *table = domain_table();

    for (size_t n = 0; table && n < DOMAINS; n++)
        if (table->domains[n].domid == domid)
            return &table->domains[n];
    return NULL;
}
