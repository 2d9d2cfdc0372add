"""Draws TeaCache's fit as an SVG: a panel for each expert, with the recorded pairs and the polynomial through them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle

from hydrarun.outputs.report import plot

Pair = tuple[float, float]  # relative change of the signal, and of the output

WIDTH, HEIGHT = 640, 440  # of a panel
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 34, 52
LINE = 20  # line height of the legend
COLOURS = ("#2758c9", "#d9822b", "#2f7d4f", "#ab2f24")  # of the branches, in their order

STYLE = """\
<style>
svg { background: #fff; font: 13px system-ui, sans-serif; }
text { fill: #55544f; }
.title { fill: #1d1d1b; font-weight: 600; }
.end { text-anchor: end; }
.middle { text-anchor: middle; }
.grid { stroke: #e4e3df; }
.axis { stroke: #6d6c68; }
.pair { fill-opacity: .35; }
.fit { fill: none; stroke: #1d1d1b; stroke-width: 2; }
</style>"""


@dataclass(frozen=True)
class Panel:
    """One expert: the pairs of each branch, and points of the polynomial from left to right."""

    title: str
    pairs: Mapping[str, Sequence[Pair]]
    curve: Sequence[Pair]


@dataclass(frozen=True)
class Scales:
    """Maps changes to pixels in the panel whose left edge is at `left`. `top` is the upper end of the axis."""

    left: float
    low: float
    high: float
    top: float

    def x(self, value: float) -> float:
        """Return the pixels from the left."""
        return self.left + LEFT + (WIDTH - LEFT - RIGHT) * (value - self.low) / (self.high - self.low)

    def y(self, value: float) -> float:
        """Return the pixels from the top. Values beyond the axis are clipped to its ends."""
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * min(max(value / self.top, 0.0), 1.0)


def draw_fit(panels: Sequence[Panel], degree: int) -> str:
    """Return a standalone SVG. `degree`: the degree of the polynomials."""
    size = f"{WIDTH * len(panels)} {HEIGHT}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" role="img" aria-label="TeaCache\'s fit">'
    body = [line for number, panel in enumerate(panels) for line in draw_panel(panel, WIDTH * number, degree)]
    return "\n".join([head, STYLE, *body, "</svg>", ""])


def draw_panel(panel: Panel, left: float, degree: int) -> Iterator[str]:
    """Draw one expert's axes, pairs, polynomial and legend."""
    found = [pair for pairs in panel.pairs.values() for pair in pairs]
    low, high = min(x for x, _ in found), max(x for x, _ in found)
    room = 0.03 * (high - low) or 0.5
    scales = Scales(left, low - room, high + room, 1.05 * max(y for _, y in found) or 1.0)
    yield from draw_axes(scales, panel.title)
    for (branch, pairs), colour in zip(panel.pairs.items(), cycle(COLOURS), strict=False):
        yield f'<g class="pair" fill="{colour}"><title>{branch}</title>'
        yield from (f'<circle cx="{scales.x(x):.1f}" cy="{scales.y(y):.1f}" r="2.5"/>' for x, y in pairs)
        yield "</g>"
    points = " ".join(f"{scales.x(x):.1f},{scales.y(y):.1f}" for x, y in panel.curve)
    yield f'<polyline class="fit" points="{points}"/>'
    yield from draw_legend(panel, left, degree)


def draw_axes(scales: Scales, title: str) -> Iterator[str]:
    """Draw grid lines, their numbers, and the titles of the axes."""
    first, last, bottom = scales.left + LEFT, scales.left + WIDTH - RIGHT, HEIGHT - BOTTOM
    for value in plot.choose_ticks(0, scales.top):
        yield plot.draw_line(first, scales.y(value), last, scales.y(value), "grid" if value else "axis")
        yield plot.draw_text(first - 8, scales.y(value) + 5, f"{value:.3g}", "end")
    for value in plot.choose_ticks(scales.low, scales.high):
        yield plot.draw_line(scales.x(value), TOP, scales.x(value), bottom, "grid")
        yield plot.draw_text(scales.x(value), bottom + 18, f"{value:.3g}", "middle")
    yield plot.draw_text(first, 14, title, "title")
    yield plot.draw_text(first, TOP - 6, "relative change of the output", "name")
    yield plot.draw_text(last, HEIGHT - 10, "relative change of the signal", "end")


def draw_legend(panel: Panel, left: float, degree: int) -> Iterator[str]:
    """Draw the legend: the branches with their numbers of pairs, and the polynomial."""
    x, y = left + LEFT + 12, TOP + 14
    for (branch, pairs), colour in zip(panel.pairs.items(), cycle(COLOURS), strict=False):
        yield f'<circle fill="{colour}" cx="{x + 8}" cy="{y - 4}" r="4"/>'
        yield plot.draw_text(x + 24, y, f"{branch}, {len(pairs)} pairs", "name")
        y += LINE
    yield plot.draw_line(x, y - 4, x + 16, y - 4, "fit")
    yield plot.draw_text(x + 24, y, f"fit of degree {degree}", "name")
