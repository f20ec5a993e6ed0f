# SPDX-License-Identifier: Apache-2.0
"""A map of the host's persistent memory: regions, namespaces in them, and the place of each NVDIMM. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from itertools import cycle

from nvdimm_driver.model import Namespace
from nvdimm_driver.pools.usage import Piece, Region
from nvdimm_driver.sizes import human, units

FREE, OUTSIDE = ".", " "
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
COLOURS = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#76b7b2", "#edc948", "#b07aa1", "#9c755f")
WIDTH, BAR, LINE, MARGIN = 960, 28, 18, 12
"""Measures of the SVG, in pixels."""


def text(regions: Sequence[Region], width: int) -> str:
    """Return the map as text.

    :param width: columns of the terminal.
    """
    return "\n".join(line for region in regions for line in _region(region, max(width, 40)))


def svg(regions: Sequence[Region]) -> str:
    """Return the map as an SVG document."""
    parts: list[str] = []
    y = MARGIN
    for region in regions:
        y = _draw(region, y, parts)
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y}" viewBox="0 0 {WIDTH} {y}" '
        f'font-family="sans-serif" font-size="12">\n<rect width="{WIDTH}" height="{y}" fill="white"/>\n{body}\n</svg>\n'
    )


def title(region: Region) -> str:
    """Return a region's name, size and address."""
    return f"{region.name}: {human(region.size)} at {region.spa:#x}"


def describe(namespace: Namespace) -> str:
    """Return a namespace's name, mode, device and size."""
    return f"{namespace.name}: {namespace.mode}, {namespace.device}, {human(namespace.data_size)}"


def _nvdimms(pieces: Sequence[Piece]) -> list[Piece]:
    """Return the first piece of each NVDIMM, which may have several extents."""
    first: dict[tuple[str, int], Piece] = {}
    for piece in pieces:
        first.setdefault((piece.domain, piece.slot), piece)
    return list(first.values())


def _describe_piece(piece: Piece, pieces: Sequence[Piece]) -> str:
    mine = [each for each in pieces if (each.domain, each.slot) == (piece.domain, piece.slot)]
    extents = f", {len(mine)} extents" if len(mine) > 1 else ""
    size = human(sum(each.length for each in mine))
    return f"{piece.domain} slot {piece.slot}: {piece.path}, {size}{extents}, {piece.state}"


def _region(region: Region, width: int) -> Iterator[str]:
    nvdimms = _nvdimms(region.pieces)
    letters = dict(zip(((each.domain, each.slot) for each in nvdimms), cycle(LETTERS), strict=False))
    cells = [OUTSIDE] * (width - 2)
    for namespace in region.namespaces:
        for cell in _cells(region, namespace.data_spa, namespace.data_size, len(cells)):
            cells[cell] = FREE
    for piece in region.pieces:
        for cell in _cells(region, piece.spa, piece.length, len(cells)):
            cells[cell] = letters[piece.domain, piece.slot]
    yield title(region)
    yield f"[{''.join(cells)}]"
    yield from (f"  {FREE} {describe(each)}" for each in region.namespaces)
    yield from (f"  {letters[each.domain, each.slot]} {_describe_piece(each, region.pieces)}" for each in nvdimms)
    yield ""


def _cells(region: Region, spa: int, length: int, count: int) -> range:
    """Return the cells of a bar that a range is in: at least one, so that even a small range is visible."""
    first = (spa - region.spa) * count // region.size
    last = units((spa + length - region.spa) * count, region.size)
    return range(max(0, first), min(count, max(last, first + 1)))


def _draw(region: Region, y: int, parts: list[str]) -> int:
    """Draw a region at `y`; return the `y` of the next one."""
    scale = (WIDTH - 2 * MARGIN) / region.size

    def rectangle(spa: int, length: int, colour: str, label: str) -> str:
        x, width = MARGIN + (spa - region.spa) * scale, max(1.0, length * scale)
        place = f'x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BAR}"'
        return f'<rect {place} fill="{colour}" stroke="#555"><title>{escape(label)}</title></rect>'

    def line(label: str, colour: str | None) -> None:
        nonlocal y
        if colour:
            parts.append(f'<rect x="{MARGIN}" y="{y + 4}" width="10" height="10" fill="{colour}" stroke="#555"/>')
        parts.append(f'<text x="{MARGIN + (16 if colour else 0)}" y="{y + 13}">{escape(label)}</text>')
        y += LINE

    nvdimms = _nvdimms(region.pieces)
    colours = dict(zip(((each.domain, each.slot) for each in nvdimms), cycle(COLOURS), strict=False))
    line(title(region), None)
    parts.append(rectangle(region.spa, region.size, "#ddd", title(region)))
    parts.extend(rectangle(each.data_spa, each.data_size, "#f7f7f7", describe(each)) for each in region.namespaces)
    for piece in region.pieces:
        label = _describe_piece(piece, region.pieces)
        parts.append(rectangle(piece.spa, piece.length, colours[piece.domain, piece.slot], label))
    y += BAR + 4
    for namespace in region.namespaces:
        line(describe(namespace), "#f7f7f7")
    for nvdimm in nvdimms:
        line(_describe_piece(nvdimm, region.pieces), colours[nvdimm.domain, nvdimm.slot])
    return y + MARGIN
