/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Built together with xen_stand_in.c: shows the domains of libxl_stand_in.c through libxenctrl and libxenstore, and
 * their memory through libxenforeignmemory.
 */
#include <errno.h>
#include <stdlib.h>
#include <xenctrl.h>
#include <xenforeignmemory.h>
#include <xenstore.h>

#include "domain_table.h"

/*
 * FOLDER/fail, "FUNCTION ERRNO", sets the variables that xen_stand_in.c reads: libvirt does not pass them on.
 */
__attribute__((constructor)) static void read_failure(void)
{
    FILE *file = fopen(FOLDER "fail", "re");
    char function[64], number[16];

    if (!file)
        return;
    if (fscanf(file, "%63s %15s", function, number) == 2) {
        setenv("FAIL", function, 1);
        setenv("ERRNO", number, 1);
    }
    fclose(file);
}

int xc_domain_maximum_gpfn(xc_interface *xch, uint32_t domid, xen_pfn_t *gfn)
{
    if (domid && find_domain(domid))
        return 0;
    errno = ESRCH;
    return -1;
}

/* The frames are consecutive: the driver maps no others. */
void *xenforeignmemory_map(xenforeignmemory_handle *handle, uint32_t domid, int protection, size_t pages,
                           const xen_pfn_t gfns[], int errors[])
{
    char path[64];
    int fd;
    void *memory;

    memset(errors, 0, pages * sizeof(*errors));
    memory_path(path, domid);
    fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0 || ftruncate(fd, MEMORY_SIZE))
        return NULL;
    memory = mmap(NULL, pages * 4096, protection, MAP_SHARED, fd, gfns[0] * 4096);
    close(fd);
    return memory == MAP_FAILED ? NULL : memory;
}

int xenforeignmemory_unmap(xenforeignmemory_handle *handle, void *address, size_t pages)
{
    return munmap(address, pages * 4096);
}

char **xs_directory(struct xs_handle *handle, xs_transaction_t transaction, const char *path, unsigned *number)
{
    errno = ENOENT;
    return NULL;
}

/* Only /local/domain/N/vm exists, which libxl writes when it makes the domain (libxl_create.c:libxl__domain_make). */
void *xs_read(struct xs_handle *handle, xs_transaction_t transaction, const char *path, unsigned *length)
{
    unsigned domid, end = 0;
    struct domain *domain;
    char *value;

    sscanf(path, "/local/domain/%u/vm%n", &domid, &end);
    domain = end && !path[end] && domid ? find_domain(domid) : NULL;
    if (!domain) {
        errno = ENOENT;
        return NULL;
    }
    value = malloc(64);
    *length = sprintf(value, "/vm/");
    for (size_t n = 0; n < sizeof(domain->uuid); n++) {
        const char *dash = n == 4 || n == 6 || n == 8 || n == 10 ? "-" : "";

        *length += sprintf(value + *length, "%s%02x", dash, domain->uuid[n]);
    }
    return value;
}
