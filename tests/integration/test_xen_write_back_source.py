# SPDX-License-Identifier: Apache-2.0
"""contrib/xen-write-back on Xen's own source: the changed functions decide as before for all but a pinned NVDIMM.

Debian's source package is fetched with apt. The functions are taken out of it before and after the change, compiled
with stand-ins for what they call, and compared for all inputs.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.xen_write_back import HEADER, load, make_empty_headers

TYPES = (
    *("invalid", "mmio_dm", "populate_on_demand", "ram_paging_out", "ram_paged", "ram_paging_in", "grant_map_ro"),
    *("grant_map_rw", "ioreq_server", "ram_ro", "ram_logdirty", "ram_shared", "ram_rw", "map_foreign", "mmio_direct"),
)
PROGRAM = """
#include <assert.h>
#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
typedef struct { unsigned long n; } gfn_t;
typedef struct { unsigned long n; } mfn_t;
typedef enum { %(types)s, LAST_TYPE } p2m_type_t;
struct list_head { int any; };
struct rangeset { int any; };
struct page_info { bool special; };
struct mtrr_state { int type; };
struct vcpu;
struct domain {
    struct vcpu **vcpu; int is_dying; struct rangeset *iomem_caps;
    struct { struct { struct list_head pinned_cacheattr_ranges; } hvm; } arch;
};
struct vcpu { struct domain *domain; struct { struct { struct mtrr_state mtrr; } hvm; } arch; };
struct p2m_domain { struct domain *domain; struct { unsigned long flags; } ioreq; };
enum { DOMDYING_alive, DOMDYING_dying, DOMDYING_dead };
enum { MTRR_TYPE_UNCACHABLE, MTRR_TYPE_WRCOMB, MTRR_TYPE_WRTHROUGH = 4, MTRR_TYPE_WRPROT, MTRR_TYPE_WRBACK };
%(names)s
#define PAT_TYPE_UC_MINUS 7
#define PAGE_SHIFT 12
#define PAGETABLE_ORDER 9
#define FLUSH_CACHE 0x400
#define XEN_DMOP_IOREQ_MEM_ACCESS_WRITE 2
#define _PAGE_PRESENT 0x01UL
#define _PAGE_RW 0x02UL
#define _PAGE_USER 0x04UL
#define _PAGE_PWT 0x08U
#define _PAGE_PCD 0x10U
#define _PAGE_ACCESSED 0x20UL
#define _PAGE_DIRTY 0x40UL
#define _PAGE_UCM _PAGE_PCD
#define _PAGE_UC (_PAGE_PCD | _PAGE_PWT)
#define _PAGE_NX_BIT (1UL << 63)
#define P2M_BASE_FLAGS (_PAGE_PRESENT | _PAGE_USER | _PAGE_DIRTY | _PAGE_ACCESSED)
#define ASSERT(x) ((void)(x))
#define likely(x) (x)
#define current (&world.vcpu)
#define _mfn(n) ((mfn_t){ n })
#define mfn_x(m) ((m).n)
#define gfn_x(g) ((g).n)
#define mfn_add(m, i) _mfn((m).n + (i))
#define mfn_to_maddr(m) ((m).n << 12)
#define gfn_to_gaddr(g) ((g).n << 12)
#define mfn_to_page(m) ((m).n)
enum part { NONE, SOME, ALL };
static struct {
    struct vcpu vcpu; enum part read_only, special; bool iommu, caps, nested, hap; int pin, host, guest;
} world;
static struct rangeset *mmio_ro_ranges;
static struct mtrr_state mtrr_state;
static bool rangeset_overlaps_range(struct rangeset *r, unsigned long s, unsigned long e) { return world.read_only; }
static bool rangeset_contains_range(struct rangeset *r, unsigned long s, unsigned long e)
{
    return world.read_only == ALL;
}
static bool rangeset_contains_singleton(struct rangeset *r, unsigned long n) { return world.read_only; }
static bool rangeset_is_empty(const struct rangeset *r) { return false; }
static bool list_empty(const struct list_head *l) { return false; }
static void flush_all(unsigned int what) {}
static bool is_iommu_enabled(const struct domain *d) { return world.iommu; }
static bool cache_flush_permitted(const struct domain *d) { return world.caps; }
static bool mfn_valid(mfn_t m) { return true; }
static bool is_special_page(unsigned long n) { return world.special == ALL || (world.special == SOME && !(n & 1)); }
static bool hap_enabled(const struct domain *d) { return world.hap; }
static bool p2m_is_nestedp2m(const struct p2m_domain *p) { return world.nested; }
static int hvm_get_mem_pinned_cacheattr(struct domain *d, gfn_t gfn, unsigned int order) { return world.pin; }
static int mtrr_get_type(const struct mtrr_state *m, unsigned long a, unsigned int order)
{
    return m == &mtrr_state ? world.host : world.guest;
}
#include "%(header)s"
#define epte_get_entry_emt before
%(before)s
#undef epte_get_entry_emt
#define epte_get_entry_emt after
%(after)s
%(flags)s

static const int pins[] = { -ENXIO, -EADDRNOTAVAIL, 0, 1, 4, 5, 6, 7 }, types[] = { -1, 0, 1, 4, 5, 6 };
#define EACH(i, array) (unsigned int i = 0; i < sizeof(array) / sizeof(*(array)); i++)

/* A line for each input for which the two functions differ, and the number of inputs. */
static void ept(void)
{
    struct domain d = { .vcpu = NULL };
    unsigned long tried = 0;

    world.vcpu.domain = &d;
    for EACH(p, pins) for EACH(h, types) for EACH(g, types)
    for ( unsigned int bits = 0; bits < 2 * 2 * 3 * 3 * 2; bits++ )
    for ( p2m_type_t t = 0; t < LAST_TYPE; t++ )
    {
        unsigned int order = bits & 1 ? 9 : 0;
        bool ipat[2];
        int emt[2];

        world.pin = pins[p]; world.host = types[h]; world.guest = types[g];
        world.iommu = bits & 2; world.read_only = bits / 4 %% 3; world.special = bits / 12 %% 3; world.caps = bits / 36;
        emt[0] = before(&d, (gfn_t){ 0x200 }, _mfn(0x400), order, &ipat[0], t);
        emt[1] = after(&d, (gfn_t){ 0x200 }, _mfn(0x400), order, &ipat[1], t);
        tried++;
        if ( emt[0] != emt[1] || ipat[0] != ipat[1] )
            printf("ept %%d %%d %%d %%u %%d %%d: %%d %%d, %%d %%d\\n", t, world.pin, world.host, order, world.read_only,
                   world.special, emt[0], ipat[0], emt[1], ipat[1]);
    }
    printf("ept %%lu\\n", tried);
}

static void npt(void)
{
    struct domain d = { .vcpu = NULL };
    struct p2m_domain p2m = { .domain = &d };
    unsigned long tried = 0;

    for EACH(p, pins) for EACH(h, types)
    for ( unsigned int bits = 0; bits < 2 * 2 * 2 * 3; bits++ )
    for ( p2m_type_t t = 0; t < LAST_TYPE; t++ )
    {
        unsigned int level = bits / 8;
        unsigned long is, was;

        world.pin = pins[p]; world.host = types[h];
        world.read_only = bits & 1; world.hap = bits & 2; world.nested = bits & 4;
        was = p2m_type_to_flags(&p2m, t, _mfn(0x400), level);
        is = direct_mmio_flags(&p2m, t, (gfn_t){ 0x200 }, _mfn(0x400), level, was);
        tried++;
        if ( is != was )
            printf("npt %%d %%d %%d %%u %%d %%d %%d: %%#lx %%#lx\\n", t, world.pin, world.host, level, world.read_only,
                   world.hap, world.nested, was & 0xfff, is & 0xfff);
    }
    printf("npt %%lu\\n", tried);
}

int main(void)
{
    ept();
    npt();
    return 0;
}
"""
NEW_NAMES = "enum { X86_MT_UC, X86_MT_WC, X86_MT_WT = 4, X86_MT_WP, X86_MT_WB, X86_MT_UCM };\n"


def function(text: str, name: str) -> str:
    """Return a function's definition, from its type to its closing brace."""
    (found,) = re.findall(rf"^(?:static )?[a-z ]+ {name}\([^;{{]*\)\n{{\n.*?^}}\n", text, re.MULTILINE | re.DOTALL)
    return str(found)


def compare(source: Path, folder: Path) -> list[str]:
    """Change a source tree of Xen; return what differs, as the lines of PROGRAM."""
    x86 = source / "xen/arch/x86"
    before = (x86 / "mm/p2m-ept.c").read_text()
    load("apply").change(source)
    make_empty_headers(folder)
    new = "X86_MT_WB" in before
    parts = {
        "types": ", ".join(f"p2m_{name}" for name in TYPES),
        "names": NEW_NAMES + "\n".join(f"#define {n} {n}" for n in ("X86_MT_UC", "X86_MT_WB")) if new else "",
        "header": HEADER,
        "before": function(before, "epte_get_entry_emt"),
        "after": function((x86 / "mm/p2m-ept.c").read_text(), "epte_get_entry_emt"),
        "flags": function((x86 / "mm/p2m-pt.c").read_text(), "p2m_type_to_flags"),
    }
    (folder / "compare.c").write_text(PROGRAM % parts)
    subprocess.run(["gcc", "-O1", f"-I{folder}", "-o", folder / "compare", folder / "compare.c"], check=True)
    return subprocess.run([folder / "compare"], check=True, capture_output=True, text=True).stdout.splitlines()


@pytest.mark.thorough
def test_only_a_pinned_nvdimm_is_decided_otherwise_than_by_stock_xen(tmp_path: Path) -> None:
    fetched = load("build").fetch("bookworm", tmp_path)
    (dsc,) = fetched.folder.glob("*.dsc")
    subprocess.run(["dpkg-source", "-x", dsc, tmp_path / "xen"], check=True, capture_output=True)
    check(compare(tmp_path / "xen", tmp_path / "compare"))


def check(lines: list[str]) -> None:
    direct = TYPES.index("mmio_direct")
    ept = {line for line in lines if re.match(r"ept.*:", line)}
    whole = {f"ept {direct} 6 6 {order} 0 0: 0 0, 6 1" for order in (0, 9)}
    parts = {f"ept {direct} {pin} {host} 9 0 0: 0 0, -1 0" for pin, host in ((-99, 6), (-99, -1), (6, -1))}
    assert ept == whole | parts
    npt = {line.partition(":")[0] for line in lines if re.match(r"npt.*:", line)}
    assert npt == {f"npt {direct} 6 6 {level} 0 1 0" for level in (0, 1, 2)}
    for line in lines:
        if re.match(r"npt.*:", line):
            was, now = (int(word, 16) for word in line.partition(":")[2].split())
            assert (was & 0x18, now) == (0x10, was & ~0x18)
    tried = [int(line.split()[1]) for line in lines if re.fullmatch(r"[en]pt \d+", line)]
    assert tried == [8 * 6 * 6 * 72 * len(TYPES), 8 * 6 * 24 * len(TYPES)]
