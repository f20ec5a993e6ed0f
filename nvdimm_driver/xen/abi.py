# SPDX-License-Identifier: Apache-2.0
"""Declarations of the functions of Xen's C libraries that the driver calls. setup.py makes xen/_xen.py of them.

cffi's out-of-line ABI mode needs no compiler at installation, and at run time only ``_cffi_backend``. That loads in
2 ms; cffi itself, which parses C, takes 60. Both build and run time need cffi 1.15 or newer.
"""

from cffi import FFI

DECLARATIONS = """
typedef unsigned long xen_pfn_t;
typedef uint16_t domid_t;
typedef uint16_t ioservid_t;
typedef uint32_t evtchn_port_t;
typedef int xenevtchn_port_or_error_t;

/* libxenctrl.so.MAJOR.MINOR (xenctrl.h, xenctrl_compat.h of Xen 4.17 to 4.22) */
typedef struct xc_interface_core xc_interface;
typedef struct xentoollog_logger xentoollog_logger;
typedef struct xenforeignmemory_handle xenforeignmemory_handle;
xc_interface *xc_interface_open(xentoollog_logger *, xentoollog_logger *, unsigned);
int xc_interface_close(xc_interface *);
xenforeignmemory_handle *xc_interface_fmem_handle(xc_interface *);
int xc_domain_iomem_permission(xc_interface *, uint32_t domid, unsigned long mfn, unsigned long count, uint8_t allow);
int xc_domain_memory_mapping(
    xc_interface *, uint32_t domid, unsigned long gfn, unsigned long mfn, unsigned long count, uint32_t add);
int xc_domain_maximum_gpfn(xc_interface *, uint32_t domid, xen_pfn_t *gfn);
int xc_domain_populate_physmap_exact(
    xc_interface *, uint32_t domid, unsigned long count, unsigned order, unsigned flags, xen_pfn_t *gfns);
int xc_domain_pin_memory_cacheattr(xc_interface *, uint32_t domid, uint64_t first, uint64_t last, uint32_t type);
int xc_get_paging_mempool_size(xc_interface *, uint32_t domid, uint64_t *bytes);
int xc_set_paging_mempool_size(xc_interface *, uint32_t domid, uint64_t bytes);
int xc_get_machine_memory_map(xc_interface *, struct e820entry *, uint32_t count);
typedef struct xen_sysctl_physinfo xc_physinfo_t;
int xc_physinfo(xc_interface *, xc_physinfo_t *);
int xc_version(xc_interface *, int what, void *answer);
typedef struct xen_domctl_getdomaininfo xc_domaininfo_t;
int xc_domain_getinfolist(xc_interface *, uint32_t first, unsigned int count, xc_domaininfo_t *);

/* libxenforeignmemory.so.1 (xenforeignmemory.h) */
void *xenforeignmemory_map(
    xenforeignmemory_handle *, uint32_t domid, int protection, size_t pages, const xen_pfn_t *gfns, int *errors);
int xenforeignmemory_unmap(xenforeignmemory_handle *, void *, size_t pages);
xenforeignmemory_handle *xenforeignmemory_open(xentoollog_logger *, unsigned);
struct xenforeignmemory_resource_handle *xenforeignmemory_map_resource(
    xenforeignmemory_handle *, domid_t, unsigned type, unsigned id, unsigned long frame, unsigned long frames,
    void **address, int protection, int flags);

/* libxendevicemodel.so.1 (xendevicemodel.h) */
typedef struct xendevicemodel_handle xendevicemodel_handle;
xendevicemodel_handle *xendevicemodel_open(xentoollog_logger *, unsigned);
int xendevicemodel_create_ioreq_server(xendevicemodel_handle *, domid_t, int handle_bufioreq, ioservid_t *id);
int xendevicemodel_get_ioreq_server_info(
    xendevicemodel_handle *, domid_t, ioservid_t id, xen_pfn_t *gfn, xen_pfn_t *buffered_gfn, evtchn_port_t *);
int xendevicemodel_map_io_range_to_ioreq_server(
    xendevicemodel_handle *, domid_t, ioservid_t id, int is_mmio, uint64_t first, uint64_t last);
int xendevicemodel_set_ioreq_server_state(xendevicemodel_handle *, domid_t, ioservid_t id, int enabled);
int xendevicemodel_set_pci_intx_level(
    xendevicemodel_handle *, domid_t, uint16_t segment, uint8_t bus, uint8_t device, uint8_t intx, unsigned level);
int xendevicemodel_close(xendevicemodel_handle *);

/* libxenevtchn.so.1 (xenevtchn.h) */
typedef struct xenevtchn_handle xenevtchn_handle;
xenevtchn_handle *xenevtchn_open(xentoollog_logger *, unsigned);
int xenevtchn_fd(xenevtchn_handle *);
xenevtchn_port_or_error_t xenevtchn_bind_interdomain(xenevtchn_handle *, uint32_t domid, evtchn_port_t remote);
xenevtchn_port_or_error_t xenevtchn_pending(xenevtchn_handle *);
int xenevtchn_unmask(xenevtchn_handle *, evtchn_port_t);
int xenevtchn_notify(xenevtchn_handle *, evtchn_port_t);

/* libxentoolcore.so.1 (xentoolcore.h) */
int xentoolcore_restrict_all(domid_t);

/* libxenstore.so.4 (xenstore.h) */
struct xs_handle *xs_open(unsigned long flags);
void xs_close(struct xs_handle *);
void *xs_read(struct xs_handle *, uint32_t transaction, const char *path, unsigned *length);
char **xs_directory(struct xs_handle *, uint32_t transaction, const char *path, unsigned *number);
_Bool xs_write(struct xs_handle *, uint32_t transaction, const char *path, const void *, unsigned length);

/* the C library: the caller frees what xs_read and xs_directory return; prctl(2), statx(2) */
void free(void *);
int prctl(int option, ...);
int statx(int folder, const char *path, int flags, unsigned mask, struct statx *);
"""

ffi = FFI()
ffi.cdef("struct e820entry { uint64_t addr; uint64_t size; uint32_t type; };", packed=True)
ffi.cdef(DECLARATIONS)
ffi.set_source("nvdimm_driver.xen._xen", None)
