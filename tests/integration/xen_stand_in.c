/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Stands in for Xen's libraries where there is no Xen: each function prints its call. It includes their headers, so it
 * can only be built with the real prototypes.
 *
 * FAIL=function ERRNO=number: that function fails. MISSING=n: page n of a foreign mapping is missing. SLOTS=file: the
 * requests for an ioreq server; each xenevtchn_pending puts the next one into slot 1, and fails after the last.
 */
#define XC_WANT_COMPAT_DEVICEMODEL_API 1
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <xenctrl.h>
#include <xendevicemodel.h>
#include <xenevtchn.h>
#include <xenforeignmemory.h>
#include <xenstore.h>
#include <xentoolcore.h>
#include <xen/hvm/ioreq.h>

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

    /* tools/libs/ctrl/xc_domain.c: when the domain is not found, it returns this and sets no errno */
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

int xc_physinfo(xc_interface *xch, xc_physinfo_t *info)
{
    *info = (xc_physinfo_t){ .cpu_khz = -1, .capabilities = XEN_SYSCTL_PHYSCAP_hvm | XEN_SYSCTL_PHYSCAP_hap };
    return CALLED("");
}

int xc_version(xc_interface *xch, int what, void *answer)
{
    strcpy(answer, what == 9 ? "dom0_mem=4G mmio-relax" : "xen-3.0-x86_64 hvm-3.0-x86_64");
    return CALLED("%d", what);
}

int xc_domain_getinfolist(xc_interface *xch, uint32_t first, unsigned int count, xc_domaininfo_t *info)
{
    *info = (xc_domaininfo_t){ .domain = 7, .flags = XEN_DOMINF_hvm_guest | XEN_DOMINF_hap };
    return CALLED("%u, %u", first, count) ? -1 : 1;
}

/* Weak: xen_with_domains.c has a version that knows the domains. */
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

/* Weak, and so is unmap: xen_with_domains.c has versions that keep the memory of each domain. */
__attribute__((weak)) void *xenforeignmemory_map(xenforeignmemory_handle *handle, uint32_t domid, int protection,
                                                 size_t pages, const xen_pfn_t gfns[], int errors[])
{
    const char *missing = getenv("MISSING");

    printf("%s(%u, %d, %zu:", __func__, domid, protection, pages);
    print_frames(gfns, pages);
    memset(errors, 0, pages * sizeof(*errors));
    if (missing)
        errors[atoi(missing)] = -ENOENT;
    return fails(__func__) ? NULL : guest;
}

__attribute__((weak)) int xenforeignmemory_unmap(xenforeignmemory_handle *handle, void *address, size_t pages)
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

__attribute__((weak)) char **xs_directory(struct xs_handle *handle, xs_transaction_t transaction, const char *path,
                                          unsigned *number)
{
    char **names;

    if (CALLED("%u, %s", transaction, path))
        return NULL;
    names = malloc(2 * sizeof(*names) + 8);
    names[0] = strcpy((char *)(names + 2), "one");
    names[1] = strcpy(names[0] + 4, "two");
    *number = 2;
    return names;
}

__attribute__((weak)) void *xs_read(struct xs_handle *handle, xs_transaction_t transaction, const char *path,
                                    unsigned *length)
{
    char *value = malloc(100);

    if (CALLED("%u, %s", transaction, path)) {
        free(value);
        return NULL;
    }
    /* the length, not a NUL, ends the value */
    *length = snprintf(value, 100, "value of %s", path);
    value[*length] = '!';
    return value;
}

bool xs_write(struct xs_handle *handle, xs_transaction_t transaction, const char *path, const void *data,
              unsigned length)
{
    return !CALLED("%u, %s, %.*s, %u", transaction, path, (int)length, (const char *)data, length);
}

/* In a file, because each library has its own copy of the variables here. */
static ioreq_t *shared(void)
{
    static ioreq_t *page;
    char path[4096];

    if (!page) {
        snprintf(path, sizeof(path), "%s.page", getenv("SLOTS"));
        page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, open(path, O_RDWR), 0);
    }
    return page;
}

xenforeignmemory_handle *xenforeignmemory_open(xentoollog_logger *logger, unsigned flags)
{
    return CALLED("%u", flags) ? NULL : (xenforeignmemory_handle *)guest;
}

xenforeignmemory_resource_handle *xenforeignmemory_map_resource(xenforeignmemory_handle *handle, domid_t domid,
                                                                unsigned type, unsigned id, unsigned long frame,
                                                                unsigned long frames, void **address, int protection,
                                                                int flags)
{
    shared()[0].vp_eport = 5;
    shared()[1].vp_eport = 6;
    shared()[1].state = STATE_IOREQ_INPROCESS;
    *address = shared();
    return CALLED("%u, %u, %u, %lu, %lu, %d, %d", domid, type, id, frame, frames, protection, flags) ? NULL
           : (xenforeignmemory_resource_handle *)guest;
}

xendevicemodel_handle *xendevicemodel_open(xentoollog_logger *logger, unsigned flags)
{
    return CALLED("%u", flags) ? NULL : (xendevicemodel_handle *)guest;
}

int xendevicemodel_create_ioreq_server(xendevicemodel_handle *handle, domid_t domid, int buffered, ioservid_t *id)
{
    *id = 3;
    return CALLED("%u, %d", domid, buffered);
}

int xendevicemodel_get_ioreq_server_info(xendevicemodel_handle *handle, domid_t domid, ioservid_t id, xen_pfn_t *gfn,
                                         xen_pfn_t *buffered, evtchn_port_t *port)
{
    return CALLED("%u, %u, %d", domid, id, gfn || buffered || port);
}

int xendevicemodel_map_io_range_to_ioreq_server(xendevicemodel_handle *handle, domid_t domid, ioservid_t id,
                                                int is_mmio, uint64_t first, uint64_t last)
{
    return CALLED("%u, %u, %d, %#lx, %#lx", domid, id, is_mmio, (long)first, (long)last);
}

int xendevicemodel_set_ioreq_server_state(xendevicemodel_handle *handle, domid_t domid, ioservid_t id, int enabled)
{
    return CALLED("%u, %u, %d", domid, id, enabled);
}

xenevtchn_handle *xenevtchn_open(xentoollog_logger *logger, unsigned flags)
{
    return CALLED("%u", flags) ? NULL : (xenevtchn_handle *)guest;
}

int xenevtchn_fd(xenevtchn_handle *handle)
{
    return open("/dev/null", O_RDONLY);
}

xenevtchn_port_or_error_t xenevtchn_bind_interdomain(xenevtchn_handle *handle, uint32_t domid, evtchn_port_t remote)
{
    return CALLED("%u, %u", domid, remote) ? -1 : 100 + (int)remote;
}

xenevtchn_port_or_error_t xenevtchn_pending(xenevtchn_handle *handle)
{
    static FILE *slots;

    if (!slots)
        slots = fopen(getenv("SLOTS"), "r");
    if (fread(&shared()[1], sizeof(ioreq_t), 1, slots) == 1)
        return 106;
    errno = ENODATA;
    return -1;
}

int xenevtchn_unmask(xenevtchn_handle *handle, evtchn_port_t port)
{
    return 0;
}

int xenevtchn_notify(xenevtchn_handle *handle, evtchn_port_t port)
{
    ioreq_t *slot = &shared()[port - 105];

    return CALLED("%u: state %u, type %u, data %#lx", port, slot->state, slot->type, (long)slot->data);
}

int xentoolcore_restrict_all(domid_t domid)
{
    return CALLED("%u", domid);
}
