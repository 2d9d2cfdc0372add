"""The SVG of a fit: positions of pairs, polynomial and legend."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from hydrarun.engine.calibration.plot import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Panel, draw_fit

SVG = "{http://www.w3.org/2000/svg}"
PAIRS = {"positive": [(0.1, 0.5), (0.3, 1.0)], "negative": [(0.2, 0.0)]}
CURVE = [(0.1, -9.0), (0.2, 0.5), (0.3, 9.0)]


def parse(*panels: Panel) -> ElementTree.Element:
    return ElementTree.fromstring(draw_fit(panels, 4))


def places(group: ElementTree.Element) -> list[tuple[float, float]]:
    return [(float(one.get("cx")), float(one.get("cy"))) for one in group.findall(f"{SVG}circle")]


def test_pairs_lie_where_their_numbers_say_by_branch():
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - BOTTOM - TOP
    positive, negative = parse(Panel("transformer", PAIRS, CURVE)).findall(f"{SVG}g[@class='pair']")
    # margins: 3 % of the range left and right, 5 % above the highest pair
    left, right = LEFT + wide * 0.03 / 1.06, LEFT + wide * 1.03 / 1.06
    expected = [(left, HEIGHT - BOTTOM - high * 0.5 / 1.05), (right, HEIGHT - BOTTOM - high / 1.05)]
    assert [pytest.approx(place, abs=0.06) for place in expected] == places(positive)
    assert places(negative) == [pytest.approx((LEFT + wide / 2, HEIGHT - BOTTOM), abs=0.06)]
    assert positive.get("fill") != negative.get("fill")


def test_a_polynomial_that_leaves_the_axis_stays_in_its_panel():
    line = parse(Panel("transformer", PAIRS, CURVE)).find(f"{SVG}polyline").get("points")
    heights = [float(pair.partition(",")[2]) for pair in line.split()]
    assert (heights[0], heights[2]) == (HEIGHT - BOTTOM, TOP)
    assert TOP < heights[1] < HEIGHT - BOTTOM


def test_experts_stand_side_by_side():
    both = parse(Panel("transformer", PAIRS, CURVE), Panel("transformer_2", PAIRS, CURVE))
    assert both.get("viewBox") == f"0 0 {2 * WIDTH} {HEIGHT}"
    first, _, second, _ = map(places, both.findall(f"{SVG}g[@class='pair']"))
    assert [pytest.approx((x + WIDTH, y), abs=0.11) for x, y in first] == second


def test_the_legend_says_how_many_pairs_and_the_degree():
    words = [text.text for text in parse(Panel("transformer", PAIRS, CURVE)).iter(f"{SVG}text")]
    assert {"transformer", "positive, 2 pairs", "negative, 1 pairs", "fit of degree 4"} <= set(words)
    assert all(re.fullmatch(r"[\d.]+", word) for word in words if word[0].isdigit())


def test_pairs_that_are_all_alike_have_an_axis_too():
    assert places(parse(Panel("t", {"positive": [(0.2, 0.0)] * 3}, [(0.2, 0.0)])).find(f"{SVG}g[@class='pair']"))
