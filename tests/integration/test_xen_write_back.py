# SPDX-License-Identifier: Apache-2.0
"""contrib/xen-write-back: what the changed Xen decides, and that the change is refused where it does not fit.

The header of the change is compiled with stand-ins for Xen's functions, and all of its inputs are tried.
"""

from __future__ import annotations

import errno
import itertools
import subprocess
from pathlib import Path

import pytest
from cffi import FFI

from nvdimm_driver.xen.write_back import MARK
from tests.lab.errors import LabError
from tests.xen_write_back import CHANGE, HEADER, load, make_empty_headers

UC, WC, WT, WP, WB, UC_MINUS = 0, 1, 4, 5, 6, 7
NOT_PINNED, IN_PART, MIXED = -errno.ENXIO, -errno.EADDRNOTAVAIL, -1
PINS = (NOT_PINNED, IN_PART, UC, WC, WT, WP, WB, UC_MINUS)
HOST_TYPES = (MIXED, UC, WC, WT, WP, WB)
LEVELS = (0, 1, 2)  # of entries: 4 KiB, 2 MiB, 1 GiB
DIRECT, RAM, FOREIGN = 5, 0, 13
PWT, PCD, USED = 0x08, 0x10, 0x5067
ALIVE, DYING, DEAD = 0, 1, 2
INTERFACE = """
int emt(int pin, int host, unsigned int order, int read_only, int *ipat);
unsigned long flags(int pin, int host, unsigned int level, int read_only, int type, int hap, int nested,
                    unsigned long before);
int flushes(int dying, int iomem_empty, int pins_empty);
"""
# Xen's names, as far as the header uses them; `pin` and `host` are what the two look-ups return.
STAND_INS = """
#include <errno.h>
#include <stdbool.h>
#include <assert.h>
typedef struct { unsigned long n; } gfn_t;
typedef struct { unsigned long n; } mfn_t;
typedef int p2m_type_t;
struct rangeset { bool empty; };
struct list_head { bool empty; };
struct domain {
    int is_dying; bool hap;
    struct rangeset *iomem_caps;
    struct { struct { struct list_head pinned_cacheattr_ranges; } hvm; } arch;
};
struct p2m_domain { struct domain *domain; bool nested; };
struct mtrr_state { int any; };
enum { DOMDYING_alive, DOMDYING_dying, DOMDYING_dead };
enum { p2m_mmio_direct = 5 };
%(names)s
#define PAGETABLE_ORDER 9
#define _PAGE_PWT 0x08U
#define _PAGE_PCD 0x10U
#define _PAGE_UC (_PAGE_PCD | _PAGE_PWT)
#define mfn_x(m) ((m).n)
#define mfn_to_maddr(m) ((m).n << 12)
static struct { int pin, host, flushes; unsigned int order; bool read_only; } world;
static struct rangeset *mmio_ro_ranges;
static struct mtrr_state mtrr_state;
#define GFN 0x240000UL
#define MFN 0x1c0000UL
static bool rangeset_overlaps_range(struct rangeset *r, unsigned long first, unsigned long last)
{
    assert(r == mmio_ro_ranges && first == MFN && last == MFN + (1UL << world.order) - 1);
    return world.read_only;
}
static bool rangeset_is_empty(const struct rangeset *r) { return r->empty; }
static bool list_empty(const struct list_head *l) { return l->empty; }
static bool hap_enabled(const struct domain *d) { return d->hap; }
static bool p2m_is_nestedp2m(const struct p2m_domain *p) { return p->nested; }
static int hvm_get_mem_pinned_cacheattr(struct domain *d, gfn_t gfn, unsigned int order)
{
    assert(gfn.n == GFN && order == world.order);
    return world.pin;
}
static int mtrr_get_type(const struct mtrr_state *m, unsigned long address, unsigned int order)
{
    assert(m == &mtrr_state && address == MFN << 12 && order == world.order);
    return world.host;
}
static void flush_all(unsigned int what) { assert(what == 0x400); world.flushes++; }

#include "%(header)s"

int emt(int pin, int host, unsigned int order, int read_only, int *ipat)
{
    struct domain d = { .hap = true };
    bool forced = false;
    int found;

    world.pin = pin; world.host = host; world.order = order; world.read_only = read_only;
    found = direct_mmio_emt(&d, (gfn_t){ GFN }, (mfn_t){ MFN }, order, &forced);
    *ipat = forced;
    return found;
}
unsigned long flags(int pin, int host, unsigned int level, int read_only, int type, int hap, int nested,
                    unsigned long before)
{
    struct domain d = { .hap = hap };
    struct p2m_domain p2m = { .domain = &d, .nested = nested };

    world.pin = pin; world.host = host; world.order = 9 * level; world.read_only = read_only;
    return direct_mmio_flags(&p2m, type, (gfn_t){ GFN }, (mfn_t){ MFN }, level, before);
}
int flushes(int dying, int iomem_empty, int pins_empty)
{
    struct rangeset iomem = { .empty = iomem_empty };
    struct domain d = { .is_dying = dying, .iomem_caps = &iomem };

    d.arch.hvm.pinned_cacheattr_ranges.empty = pins_empty;
    world.flushes = 0;
    direct_mmio_flush(&d);
    return world.flushes;
}
"""
NAMES = {
    "4.17": "#define MTRR_TYPE_UNCACHABLE 0\n#define MTRR_TYPE_WRBACK 6\n#define FLUSH_CACHE 0x400",
    "4.20": "#define X86_MT_UC 0\n#define X86_MT_WB 6\n#define FLUSH_CACHE 0x400",
    "4.23": "#define X86_MT_UC 0\n#define X86_MT_WB 6\n#define FLUSH_CACHE_EVICT 0x400",
}


# As much of Xen as the semantic patch looks at, in other words: a file of its own for each of Xen's.
EPT = """
#include <asm/hvm/nestedhvm.h>
int epte_get_entry_emt(struct domain *d, gfn_t gfn, mfn_t mfn,
                       unsigned int order, bool *ipat, p2m_type_t type)
{
    *ipat = false;
    if ( early(mfn) )
        return -1;

    switch ( type )
    {
    case p2m_mmio_direct:
        return UNCACHED;

    case p2m_other:
        return 6;

    default:
        break;
    }

    return late(d);
}
"""
NPT = """
#include <asm/hvm/nestedhvm.h>
static unsigned long p2m_type_to_flags(const struct p2m_domain *p2m, p2m_type_t t, mfn_t mfn, unsigned int level)
{
    unsigned long flags = t;

    switch ( t )
    {
    case p2m_mmio_direct:
        if ( !rangeset_contains_singleton(mmio_ro_ranges, mfn_x(mfn)) )
            flags |= 2;
        else
        {
            flags |= 8;
        }
        return flags | 16;
    }
    return flags;
}

static int cf_check p2m_pt_set_entry(struct p2m_domain *p2m, gfn_t gfn_, mfn_t mfn, unsigned int page_order,
                                     p2m_type_t p2mt, p2m_access_t p2ma, int sve)
{
    huge = any(mfn) ? entry(mfn_x(mfn),
                            p2m_type_to_flags(p2m, p2mt, mfn, 2))
                    : none();
    if ( page_order == 0 )
        page = entry(mfn_x(mfn), p2m_type_to_flags(p2m, p2mt, mfn, 0));
    else
        large = entry(mfn_x(mfn), p2m_type_to_flags(p2m, p2mt, mfn, 1));
    return 0;
}
"""
HVM = """
#include <asm/hvm/nestedhvm.h>
void hvm_domain_relinquish_resources(struct domain *d)
{
    first(d);
    ioreq_server_destroy_all(d);
    last(d);
}
"""
CAPABILITIES_AT_EACH_CALL = """
void arch_get_xen_caps(xen_capabilities_info_t *info)
{
    if ( hvm_enabled )
    {
        safe_strcat(*info, "hvm ");
    }
}
"""
CAPABILITIES_AT_BOOT = """
static int __init cf_check init_xen_cap_info(void)
{
    if ( hvm_enabled )
        safe_strcat(xen_cap_info, "hvm ");

    return 0;
}
"""
UNKNOWN = {
    "the decision was changed already": ("mm/p2m-ept.c", "return X86_MT_UC;", "return asks_for_the_pin(d);"),
    "another name of the type": ("mm/p2m-ept.c", "case p2m_mmio_direct:", "case p2m_direct:"),
    "another parameter": ("mm/p2m-ept.c", "bool *ipat,", "bool *ipat, bool extra,"),
    "one caller more": ("mm/p2m-pt.c", "return 0;", "return p2m_type_to_flags(p2m, p2mt, mfn, 3);"),
    "one caller less": ("mm/p2m-pt.c", "p2m_type_to_flags(p2m, p2mt, mfn, 1)", "0"),
    "two callers of one level": ("mm/p2m-pt.c", "p2mt, mfn, 2)", "p2mt, mfn, 1)"),
    "no read-only ranges": ("mm/p2m-pt.c", "!rangeset_contains_singleton(mmio_ro_ranges, mfn_x(mfn))", "t"),
    "another end of domains": ("hvm/hvm.c", "ioreq_server_destroy_all(d);", "other(d);"),
    "other capabilities": ("setup.c", "if ( hvm_enabled )", "if ( true )"),
    "no place for the header's name": ("hvm/hvm.c", "#include <asm/hvm/nestedhvm.h>", ""),
}


class Changed:
    """The functions of the header, as calls of Python."""

    def __init__(self, library: Path) -> None:
        self.ffi = FFI()
        self.ffi.cdef(INTERFACE)
        self.calls = self.ffi.dlopen(str(library))

    def emt(self, pin: int, host: int, order: int, read_only: bool) -> tuple[int, bool]:
        ipat = self.ffi.new("int *")
        return int(self.calls.emt(pin, host, order, read_only, ipat)), bool(ipat[0])


apply = load("apply")
build = load("build")


def tree(folder: Path, uncached: str, capabilities: str) -> dict[str, Path]:
    """Make a source tree in a folder; return its files by their names below xen/arch/x86."""
    texts = {
        "mm/p2m-ept.c": EPT.replace("UNCACHED", uncached),
        "mm/p2m-pt.c": NPT,
        "hvm/hvm.c": HVM,
        "setup.c": capabilities,
    }
    x86 = folder / "xen/arch/x86"
    (x86 / "include/asm/hvm").mkdir(parents=True)
    for name, text in texts.items():
        (x86 / name).parent.mkdir(exist_ok=True)
        (x86 / name).write_text(text)
    return {name: x86 / name for name in texts}


@pytest.fixture(scope="module", params=NAMES)
def changed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Changed:
    folder = tmp_path_factory.mktemp("header")
    make_empty_headers(folder)
    source = folder / "header.c"
    source.write_text(STAND_INS % {"header": HEADER, "names": NAMES[request.param]})
    library = folder / "header.so"
    options = ("-shared", "-fPIC", "-Wall", "-Werror", f"-I{folder}", "-o", library)
    subprocess.run(["gcc", *options, source], check=True)
    return Changed(library)


def test_ept_has_write_back_for_a_whole_pin_on_write_back_memory_and_nothing_else(changed: Changed) -> None:
    for pin, host, level, read_only in itertools.product(PINS, HOST_TYPES, LEVELS, (False, True)):
        found = changed.emt(pin, host, 9 * level, read_only)
        split = level > 0 and not read_only and {pin, host} in ({IN_PART, WB}, {IN_PART, MIXED}, {WB, MIXED})
        if (pin, host, read_only) == (WB, WB, False):
            assert found == (WB, True)
        elif split:
            assert found == (-1, False), "an entry of which a part can be write-back is split"
        else:
            assert found == (UC, False), (pin, host, level, read_only)


def test_npt_has_write_back_for_a_whole_pin_on_write_back_memory_and_nothing_else(changed: Changed) -> None:
    types = (DIRECT, RAM, FOREIGN)
    for pin, host, level, read_only in itertools.product(PINS, HOST_TYPES, LEVELS, (False, True)):
        for type_, hap, nested in itertools.product(types, (True, False), (True, False)):
            for before in (USED | PCD, USED | PCD | PWT, USED):
                found = changed.calls.flags(pin, host, level, read_only, type_, hap, nested, before)
                cached = (pin, host, read_only, type_, hap, nested) == (WB, WB, False, DIRECT, True, False)
                assert found == (before & ~(PCD | PWT) if cached else before)


def test_the_caches_are_flushed_once_at_the_end_of_a_domain_with_direct_mmio_and_a_pin(changed: Changed) -> None:
    for dying, iomem_empty, pins_empty in itertools.product((ALIVE, DYING, DEAD), (True, False), (True, False)):
        wanted = dying == DYING and not iomem_empty and not pins_empty
        assert changed.calls.flushes(dying, iomem_empty, pins_empty) == wanted


@pytest.mark.parametrize(
    ("uncached", "capabilities"),
    [("MTRR_TYPE_UNCACHABLE", CAPABILITIES_AT_EACH_CALL), ("X86_MT_UC", CAPABILITIES_AT_BOOT)],
    ids=["4.17", "4.20"],
)
def test_the_change_is_made_in_all_its_places(tmp_path: Path, uncached: str, capabilities: str) -> None:
    files = tree(tmp_path, uncached, capabilities)
    apply.change(tmp_path)
    ept, npt, hvm, setup = (path.read_text() for path in files.values())
    assert "    case p2m_mmio_direct:\n        return direct_mmio_emt(d, gfn, mfn, order, ipat);\n" in ept
    for level in (0, 1, 2):
        call = f"direct_mmio_flags(p2m, p2mt, gfn_, mfn, {level}, p2m_type_to_flags(p2m, p2mt, mfn, {level}))"
        assert call in " ".join(npt.split())
    assert "ioreq_server_destroy_all(d);\n    direct_mmio_flush(d);\n" in hvm
    assert f"if (hvm_hap_supported())\n        safe_strcat({'*info' if '*info' in setup else 'xen_cap_info'}, " in setup
    assert setup.count(f'"{MARK} "') == 1
    assert (tmp_path / apply.HEADER_IN_XEN).read_bytes() == apply.HEADER.read_bytes()
    with pytest.raises(apply.Refused, match=r"direct-mmio-wb\.h already"):
        apply.change(tmp_path)


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_source_that_the_change_does_not_know_is_refused_and_left_as_it_was(tmp_path: Path, name: str) -> None:
    files = tree(tmp_path, "X86_MT_UC", CAPABILITIES_AT_BOOT)
    file, old, new = UNKNOWN[name]
    before = files[file].read_text()
    assert before.count(old) == 1
    files[file].write_text(before.replace(old, new))
    texts = {path: path.read_text() for path in files.values()}
    with pytest.raises(apply.Refused, match=file):
        apply.change(tmp_path)
    assert {path: path.read_text() for path in files.values()} == texts
    assert not (tmp_path / apply.HEADER_IN_XEN).exists()


def test_a_tree_that_is_not_of_xen_is_refused(tmp_path: Path) -> None:
    with pytest.raises(apply.Refused, match="no source tree of Xen"):
        apply.change(tmp_path)


def test_a_source_package_that_is_given_is_taken_with_its_own_files_alone(tmp_path: Path) -> None:
    digest = "0" * 64
    dsc = tmp_path / "xen_4.17.5+72-1.dsc"
    dsc.write_text(f"Checksums-Sha256:\n {digest} 3 xen.orig.tar.xz\n {digest} 3 ../xen.debian.tar.xz\nFiles:\n")
    for name in ("xen.orig.tar.xz", "other"):
        (tmp_path / name).touch()
    (tmp_path / "into").mkdir()
    source = build.given(dsc, tmp_path / "into")
    assert source.version == "4.17.5+72-1"
    assert sorted(path.name for path in source.folder.iterdir()) == ["xen.orig.tar.xz", dsc.name]
    with pytest.raises(LabError, match="no source package of Xen"):
        build.given(tmp_path / "other", tmp_path / "into")


def test_a_source_older_than_the_newest_is_said_in_the_package(tmp_path: Path) -> None:
    note = build.Source(tmp_path, "4.17.5+72-1", ("4.17.7+13-0", "4.17.6-1")).note
    assert "4.17.5+72-1 is older than 4.17.7+13-0" in note
    assert "older" not in build.Source(tmp_path, "4.17.7+13-0", ()).note


def test_versions_are_compared_as_debian_does() -> None:
    versions = ["4.17.7+13-g2-0+deb12u1", "4.17.5+72-g0-1", "4.17.10-1", "4.17.7~rc1-1"]
    assert build.newest_first(versions) == [versions[2], versions[0], versions[3], versions[1]]


@pytest.mark.parametrize(
    ("stock", "warned"), [("4.17.7+13-0+deb12u1", True), ("4.17.5+72-1", False), ("4.17.5+66-1", False), ("", False)]
)
def test_the_package_warns_if_the_stock_hypervisor_is_newer(tmp_path: Path, stock: str, warned: bool) -> None:
    """At its installation, and when Debian's file changes."""
    script = tmp_path / "postinst"
    text = (CHANGE / "postinst.in").read_text()
    script.write_text(text.replace("@series@", "4.17").replace("@source@", "4.17.5+72-1"))
    query = tmp_path / "dpkg-query"
    query.write_text(f'#!/bin/sh\n[ "$4" = xen-hypervisor-4.17-amd64 ] && [ -n "{stock}" ] && printf %s "{stock}"\n')
    query.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "DPKG_MAINTSCRIPT_PACKAGE": "xen-hypervisor-4.17-nvdimm"}
    command = ["sh", str(script), "triggered", "/boot/xen-4.17-amd64.gz"]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert ("security updates are missing" in done.stderr) is warned
