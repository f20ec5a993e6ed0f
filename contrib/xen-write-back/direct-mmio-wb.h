/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Write-back for direct MMIO that is memory: a range of frames that the toolstack has mapped by
 * XEN_DOMCTL_memory_mapping and pinned as write-back, and that the host's own MTRRs have as write-back.
 */
#ifndef ASM_X86_HVM_DIRECT_MMIO_WB_H
#define ASM_X86_HVM_DIRECT_MMIO_WB_H

#include <xen/errno.h>
#include <xen/rangeset.h>
#include <xen/sched.h>

#include <asm/flushtlb.h>
#include <asm/hvm/cacheattr.h>
#include <asm/mtrr.h>
#include <asm/p2m.h>

/* Names that differ between Xen's versions. */
#ifndef X86_MT_WB
# define X86_MT_UC MTRR_TYPE_UNCACHABLE
# define X86_MT_WB MTRR_TYPE_WRBACK
#endif
#ifndef FLUSH_CACHE_EVICT
# define FLUSH_CACHE_EVICT FLUSH_CACHE
#endif

/*
 * The memory type for an entry of type p2m_mmio_direct, when it is not the one that it would have without a pin:
 *  X86_MT_WB       the whole entry is pinned as write-back, and the host's MTRRs say write-back for all of its frames;
 *  -EADDRNOTAVAIL  the pin or the host's MTRRs say it for a part of the entry: only smaller entries can tell;
 *  -ENXIO          every other case.
 */
static inline int direct_mmio_pinned_type(struct domain *d, gfn_t gfn, mfn_t mfn, unsigned int order)
{
    int pin, host;

    if ( rangeset_overlaps_range(mmio_ro_ranges, mfn_x(mfn), mfn_x(mfn) | ((1UL << order) - 1)) )
        return -ENXIO;

    pin = hvm_get_mem_pinned_cacheattr(d, gfn, order);
    if ( pin != X86_MT_WB && pin != -EADDRNOTAVAIL )
        return -ENXIO;

    host = mtrr_get_type(&mtrr_state, mfn_to_maddr(mfn), order);
    if ( host >= 0 && host != X86_MT_WB )
        return -ENXIO;

    if ( pin == X86_MT_WB && host == X86_MT_WB )
        return X86_MT_WB;

    return order ? -EADDRNOTAVAIL : -ENXIO;
}

/* EPT: what epte_get_entry_emt() returns for p2m_mmio_direct. -1 lets resolve_misconfig() split the entry. */
static inline int direct_mmio_emt(struct domain *d, gfn_t gfn, mfn_t mfn, unsigned int order, bool *ipat)
{
    switch ( direct_mmio_pinned_type(d, gfn, mfn, order) )
    {
    case X86_MT_WB:
        *ipat = true;
        return X86_MT_WB;

    case -EADDRNOTAVAIL:
        return -1;

    default:
        return X86_MT_UC;
    }
}

/*
 * NPT: the flags of an entry, given those that p2m_type_to_flags() has for its type. A nested guest's p2m has its own
 * guest frames, which no pin speaks of. Nothing looks at an entry again: one that would have to be split stays uncached.
 */
static inline unsigned long direct_mmio_flags(const struct p2m_domain *p2m, p2m_type_t t, gfn_t gfn, mfn_t mfn,
                                              unsigned int level, unsigned long flags)
{
    if ( t == p2m_mmio_direct && hap_enabled(p2m->domain) && !p2m_is_nestedp2m(p2m) &&
         direct_mmio_pinned_type(p2m->domain, gfn, mfn, level * PAGETABLE_ORDER) == X86_MT_WB )
        flags &= ~(unsigned long)_PAGE_UC;

    return flags;
}

/*
 * At the end of a domain that had direct MMIO and a pin: no dirty line of it stays in a cache. Its vCPUs run no more,
 * and the toolstack has not been told yet that the domain is gone, so that nobody has the frames after it.
 * The domain's destruction calls this a second time, with the domain dead.
 */
static inline void direct_mmio_flush(const struct domain *d)
{
    if ( d->is_dying == DOMDYING_dying && !rangeset_is_empty(d->iomem_caps) &&
         !list_empty(&d->arch.hvm.pinned_cacheattr_ranges) )
        flush_all(FLUSH_CACHE_EVICT);
}

#endif /* ASM_X86_HVM_DIRECT_MMIO_WB_H */
