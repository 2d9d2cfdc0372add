"""Draws speed against quality as an SVG: a mark for each setting; those on the Pareto front are filled and joined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import floor, log10

from hydrarun.outputs.quality.metrics import PSNR_CAP

Place = tuple[float, float]  # seconds, dB

WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 70, 24, 30, 56
LINE, LETTER = 21, 10.5  # height of a label and width of a letter, at the size used on phones


@dataclass
class PlotMark:
    """A setting: its label, the mean of its points, and the points with their names."""

    label: str
    place: Place
    points: list[tuple[str, Place]]


def find_pareto_front(places: Sequence[Place]) -> list[bool]:
    """Return whether each place is on the Pareto front: no other is at least as fast and good and differs from it."""

    def beaten(place: Place) -> bool:
        return any(x <= place[0] and y >= place[1] and (x, y) != place for x, y in places)

    return [not beaten(place) for place in places]


class PlotScales:
    """Maps seconds and dB to SVG pixels. Identical outputs (`PSNR_CAP`) get a separate line above all others."""

    def __init__(self, places: Sequence[Place], levels: Sequence[float]) -> None:
        values = [y for _, y in places] + list(levels)
        near = [y for y in values if y < PSNR_CAP]
        self.identical = len(near) < len(values)
        self.right = max(x for x, _ in places) * 1.12
        low, high = (min(near), max(near)) if near else (30.0, 50.0)
        room = max(2.0, (high - low) * 0.15)
        self.low, self.high = low - room, high + room

    def x(self, seconds: float) -> float:
        """Return the pixels from the left."""
        return LEFT + (WIDTH - LEFT - RIGHT) * seconds / self.right

    def y(self, psnr: float) -> float:
        """Return the pixels from the top."""
        if psnr >= PSNR_CAP:
            return TOP
        top = TOP + (36 if self.identical else 0)
        part = (min(psnr, self.high) - self.low) / (self.high - self.low)
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - top) * part


def choose_ticks(low: float, high: float) -> list[float]:
    """Return three to eight round numbers in the range."""
    step = 10 ** floor(log10((high - low) / 3))
    step *= next(times for times in (5, 2, 1) if (high - low) / (step * times) >= 3)
    first = -floor(-low / step)
    return [number * step for number in range(first, floor(high / step) + 1)]


def draw_svg(marks: Sequence[PlotMark], floors: Mapping[str, float], quality: str) -> str:
    """Return the SVG. `floors`: dB by the name of the noise floor; `quality`: the title of the vertical axis."""
    points = [place for mark in marks for _, place in mark.points]
    scales = PlotScales([mark.place for mark in marks] + points, list(floors.values()))
    first = find_pareto_front([mark.place for mark in marks])
    body = [
        *draw_axes(scales, quality),
        *draw_noise_floors(scales, floors),
        draw_front(scales, [mark.place for mark, best in zip(marks, first, strict=True) if best]),
        *(draw_dot(scales, mark.label, *point) for mark in marks if len(mark.points) > 1 for point in mark.points),
        *(draw_mark(scales, mark, best) for mark, best in zip(marks, first, strict=True)),
        *draw_labels(scales, marks),
    ]
    head = (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="speed and quality of each setting">'
    )
    return "\n".join([head, *body, "</svg>"])


def draw_axes(scales: PlotScales, quality: str) -> list[str]:
    """Draw the grid lines, their numbers, and the axes with their titles."""
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    lines = []
    for psnr in choose_ticks(scales.low, scales.high):
        lines.append(draw_line(LEFT, scales.y(psnr), right, scales.y(psnr), "grid"))
        lines.append(draw_text(LEFT - 8, scales.y(psnr) + 5, f"{psnr:g}", "tick end"))
    if scales.identical:
        lines += [draw_line(LEFT, TOP, right, TOP, "grid"), draw_text(LEFT - 8, TOP + 5, "same", "tick end")]
    for seconds in choose_ticks(0, scales.right):
        lines.append(draw_text(scales.x(seconds), bottom + 20, f"{seconds:.4g}", "tick middle"))
    lines.append(draw_line(LEFT, bottom, right, bottom, "axis"))
    lines.append(draw_text(right, HEIGHT - 8, "seconds of denoising per output, steady → slower", "name end"))
    lines.append(draw_text(6, 14, quality, "name"))
    return lines


def draw_noise_floors(scales: PlotScales, floors: Mapping[str, float]) -> list[str]:
    """Draw the noise floors as dashed lines, equal ones as one line. Marks above a line differ less than the noise."""
    heights: dict[float, list[str]] = {}
    for name, psnr in floors.items():
        heights.setdefault(min(round(psnr, 1), PSNR_CAP), []).append(name)
    found = []
    for psnr, names in heights.items():
        y = scales.y(psnr)
        text = f"noise floor: {', '.join(names)}" + (" (identical)" if psnr == PSNR_CAP else f" {psnr:.1f} dB")
        found += [draw_line(LEFT, y, WIDTH - RIGHT, y, "floor"), draw_text(LEFT + 4, y + 17, text, "tick")]
    return found


def draw_front(scales: PlotScales, places: Sequence[Place]) -> str:
    """Draw the line through the Pareto front."""
    line = " ".join(f"{scales.x(x):.1f},{scales.y(y):.1f}" for x, y in sorted(places))
    return f'<polyline class="front" points="{line}"/>'


def draw_dot(scales: PlotScales, label: str, name: str, place: Place) -> str:
    """Draw one point of a setting that has several."""
    return f'<circle class="dot" cx="{scales.x(place[0]):.1f}" cy="{scales.y(place[1]):.1f}" r="3">' + (
        f"<title>{escape(f'{label}, point {name}: {format_place(place)}')}</title></circle>"
    )


def draw_mark(scales: PlotScales, mark: PlotMark, best: bool) -> str:
    """Draw the mark of a setting."""
    count = f" (mean of {len(mark.points)} points)" if len(mark.points) > 1 else ""
    text = f"{mark.label}: {format_place(mark.place)}{count}{'; no other is faster and as good' if best else ''}"
    x, y = scales.x(mark.place[0]), scales.y(mark.place[1])
    kind = "mark first" if best else "mark"
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="7"><title>{escape(text)}</title></circle>'


def draw_labels(scales: PlotScales, marks: Sequence[PlotMark]) -> list[str]:
    """Draw the labels next to the marks, on the first side and line where they overlap nothing."""
    places = [(scales.x(mark.place[0]), scales.y(mark.place[1]) + 5) for mark in marks]
    taken = [(x - 9, x + 9, y) for x, y in places]
    found = []
    for (x, y), mark in sorted(zip(places, marks, strict=True), key=lambda pair: pair[0][1]):
        wide = LETTER * len(mark.label)
        spots = [(start, y + LINE * line) for line in range(len(marks) + 1) for start in (x + 12, x - 12 - wide)]
        free = (spot for spot in spots if LEFT < spot[0] < WIDTH - wide and not covers_any(taken, *spot, wide))
        start, line = next(free, spots[0])
        taken.append((start, start + wide, line))
        left = start < x
        found.append(draw_text(x - 12 if left else x + 12, line, mark.label, "label end" if left else "label"))
    return found


def covers_any(taken: Sequence[tuple[float, float, float]], start: float, y: float, wide: float) -> bool:
    """Return whether a label would overlap anything in `taken`."""
    return any(abs(y - other) < LINE and start < end and start + wide > begin for begin, end, other in taken)


def format_place(place: Place) -> str:
    """Format a place as text."""
    return f"{place[0]:.4g} s, " + ("identical" if place[1] >= PSNR_CAP else f"{place[1]:.1f} dB")


def draw_line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """Return an SVG line."""
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def draw_text(x: float, y: float, text: str, kind: str) -> str:
    """Return an SVG text."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'
