// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
// The change to Xen: README.md says what it does. What is called here is in direct-mmio-wb.h. A rule that does not find
// what it knows changes nothing; apply.py counts the changes, and refuses unless all of them are there.

@@
@@
  #include <asm/hvm/nestedhvm.h>
+ #include <asm/hvm/direct-mmio-wb.h>

// EPT. The read-only ranges and the special pages come before this switch.
@ept@
identifier d, gfn, mfn, order, ipat, type;
type T;
@@
  T epte_get_entry_emt(struct domain *d, gfn_t gfn, mfn_t mfn, unsigned int order, bool *ipat, p2m_type_t type)
  {
    <...
    switch ( type )
    {
    case p2m_mmio_direct:
-       return \(MTRR_TYPE_UNCACHABLE\|X86_MT_UC\);
+       return direct_mmio_emt(d, gfn, mfn, order, ipat);
    }
    ...>
  }

// NPT. The function knows no guest frame, its callers do.
@flags@
identifier p2m, t, mfn, level, flags;
symbol mmio_ro_ranges;
expression E;
type T;
@@
  T p2m_type_to_flags(const struct p2m_domain *p2m, p2m_type_t t, mfn_t mfn, unsigned int level)
  {
    <+...
    if ( !rangeset_contains_singleton(mmio_ro_ranges, mfn_x(mfn)) )
        flags |= E;
    else
    { ... }
    ...+>
  }

@npt depends on flags@
identifier p2m, gfn, mfn, page_order, p2mt, p2ma, sve;
expression level;
type T;
@@
  T p2m_pt_set_entry(struct p2m_domain *p2m, gfn_t gfn, mfn_t mfn, unsigned int page_order, p2m_type_t p2mt,
                     p2m_access_t p2ma, int sve)
  {
    <+...
-   p2m_type_to_flags(p2m, p2mt, mfn, level)
+   direct_mmio_flags(p2m, p2mt, gfn, mfn, level, p2m_type_to_flags(p2m, p2mt, mfn, level))
    ...+>
  }

// The end of a domain.
@@
identifier d;
@@
  void hvm_domain_relinquish_resources(struct domain *d)
  {
    ... when any
    ioreq_server_destroy_all(d);
+   direct_mmio_flush(d);
    ... when any
  }

// The mark that tells the toolstack: XENVER_capabilities.
@@
typedef xen_capabilities_info_t;
identifier info;
symbol hvm_enabled;
@@
  void arch_get_xen_caps(xen_capabilities_info_t *info)
  {
    ... when any
    if ( hvm_enabled )
    { ... }
+   if ( hvm_hap_supported() )
+       safe_strcat(*info, "direct-mmio-wb ");
  }

@@
symbol hvm_enabled, xen_cap_info;
type T;
@@
  T init_xen_cap_info(void)
  {
    ... when any
    if ( hvm_enabled )
        safe_strcat(xen_cap_info, ...);
+   if ( hvm_hap_supported() )
+       safe_strcat(xen_cap_info, "direct-mmio-wb ");
    ... when any
  }
