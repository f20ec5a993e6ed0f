/*
 * Stands in for libxenctrl, libxenforeignmemory and libxenstore where there is no Xen: each function prints how it was
 * called. It includes their headers, so it can only be built with the real prototypes.
 *
 * FAIL=function ERRNO=number: that function fails. MISSING=n: page n of a foreign mapping is not there.
 */
#define XC_WANT_COMPAT_DEVICEMODEL_API 1
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xenctrl.h>
#include <xenforeignmemory.h>
#include <xenstore.h>

static char guest[4 * 4096];

static int fails(const char *function)
{
    const char *fail = getenv("FAIL");

    fflush(stdout);
    if (!fail || strcmp(fail, function))
        return 0;
    errno = atoi(getenv("ERRNO"));
    return -1;
}

#define CALLED(format, ...) (printf("%s(" format ")\n", __func__, ##__VA_ARGS__), fails(__func__))

xc_interface *xc_interface_open(xentoollog_logger *logger, xentoollog_logger *builder, unsigned flags)
{
    return CALLED("%u", flags) ? NULL : (xc_interface *)guest;
}

int xc_interface_close(xc_interface *xch)
{
    return CALLED("");
}

struct xenforeignmemory_handle *xc_interface_fmem_handle(xc_interface *xch)
{
    return (struct xenforeignmemory_handle *)xch;
}

int xc_domain_iomem_permission(xc_interface *xch, uint32_t domid, unsigned long mfn, unsigned long count, uint8_t allow)
{
    return CALLED("%u, %#lx, %lu, %u", domid, mfn, count, allow);
}

int xc_domain_memory_mapping(xc_interface *xch, uint32_t domid, unsigned long gfn, unsigned long mfn,
                             unsigned long count, uint32_t add)
{
    int rc = CALLED("%u, %#lx, %#lx, %lu, %u", domid, gfn, mfn, count, add);

    /* tools/libs/ctrl/xc_domain.c: this, and no errno, when the domain is not found */
    return rc && !errno ? -EINVAL : rc;
}

int xc_get_paging_mempool_size(xc_interface *xch, uint32_t domid, uint64_t *size)
{
    *size = 5ull << 32;
    return CALLED("%u", domid);
}

int xc_set_paging_mempool_size(xc_interface *xch, uint32_t domid, uint64_t size)
{
    return CALLED("%u, %llu", domid, (unsigned long long)size);
}

int xc_domain_pin_memory_cacheattr(xc_interface *xch, uint32_t domid, uint64_t first, uint64_t last, uint32_t type)
{
    return CALLED("%u, %#llx, %#llx, %u", domid, (unsigned long long)first, (unsigned long long)last, type);
}

int xc_get_machine_memory_map(xc_interface *xch, struct e820entry entries[], uint32_t max)
{
    entries[0] = (struct e820entry){ 0, 0x9fc00, 1 };
    entries[1] = (struct e820entry){ 0x140000000, 0x40000000, 12 };
    return CALLED("%u", max) ? -1 : 2;
}

/* Weak: xen_with_domains.c has one that knows the domains. */
__attribute__((weak)) int xc_domain_maximum_gpfn(xc_interface *xch, uint32_t domid, xen_pfn_t *gfn)
{
    *gfn = 0xfefff;
    return CALLED("%u", domid);
}

static void print_frames(const xen_pfn_t *gfns, size_t count)
{
    for (size_t n = 0; n < count; n++)
        printf(" %#lx", gfns[n]);
    printf(")\n");
}

int xc_domain_populate_physmap_exact(xc_interface *xch, uint32_t domid, unsigned long count, unsigned order,
                                     unsigned flags, xen_pfn_t *gfns)
{
    printf("%s(%u, %lu, %u, %u:", __func__, domid, count, order, flags);
    print_frames(gfns, count);
    return fails(__func__);
}

void *xenforeignmemory_map(xenforeignmemory_handle *handle, uint32_t domid, int protection, size_t pages,
                           const xen_pfn_t gfns[], int errors[])
{
    const char *missing = getenv("MISSING");

    printf("%s(%u, %d, %zu:", __func__, domid, protection, pages);
    print_frames(gfns, pages);
    memset(errors, 0, pages * sizeof(*errors));
    if (missing)
        errors[atoi(missing)] = -ENOENT;
    return fails(__func__) ? NULL : guest;
}

int xenforeignmemory_unmap(xenforeignmemory_handle *handle, void *address, size_t pages)
{
    return CALLED("%zu", pages) || address != guest;
}

struct xs_handle *xs_open(unsigned long flags)
{
    return CALLED("%lu", flags) ? NULL : (struct xs_handle *)guest;
}

void xs_close(struct xs_handle *handle)
{
    CALLED("");
}

__attribute__((weak)) void *xs_read(struct xs_handle *handle, xs_transaction_t transaction, const char *path,
                                    unsigned *length)
{
    char *value = malloc(100);

    if (CALLED("%u, %s", transaction, path)) {
        free(value);
        return NULL;
    }
    /* the value's end is where the length says, not at a NUL */
    *length = snprintf(value, 100, "value of %s", path);
    value[*length] = '!';
    return value;
}

bool xs_write(struct xs_handle *handle, xs_transaction_t transaction, const char *path, const void *data,
              unsigned length)
{
    return !CALLED("%u, %s, %.*s, %u", transaction, path, (int)length, (const char *)data, length);
}
