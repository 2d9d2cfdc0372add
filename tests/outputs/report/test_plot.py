"""The plot of speed and quality."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from hydrarun.outputs.report.plot import HEIGHT, WIDTH, PlotMark, PlotScales, choose_ticks, draw_svg, find_pareto_front

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize(
    ("places", "first"),
    [
        ([(1.0, 30.0)], [True]),
        ([(1.0, 30.0), (2.0, 40.0)], [True, True]),
        ([(1.0, 30.0), (2.0, 29.0)], [True, False]),  # slower and worse
        ([(1.0, 30.0), (1.0, 29.0), (2.0, 30.0)], [True, False, False]),  # as fast, and as good
        ([(1.0, 30.0), (1.0, 30.0)], [True, True]),  # a tie
        ([(3.0, 100.0), (1.0, 20.0), (2.0, 30.0), (2.5, 25.0), (4.0, 100.0)], [True, True, True, False, False]),
    ],
)
def test_what_no_other_beats_is_on_the_front(places, first):
    assert find_pareto_front(places) == first


def drawn(marks, floors=None) -> ElementTree.Element:
    text = draw_svg(marks, floors or {}, "PSNR")
    return ElementTree.fromstring(text.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))


def mark(label: str, x: float, y: float, *points: tuple[str, tuple[float, float]]) -> PlotMark:
    return PlotMark(label, (x, y), list(points) or [("0", (x, y))])


def test_marks_are_where_their_numbers_are():
    marks = [mark("slow", 4.0, 40.0), mark("fast", 1.0, 30.0), mark("bad", 3.0, 29.0)]
    tree = drawn(marks)
    circles = {circle.find(f"{SVG}title").text: circle for circle in tree.iter(f"{SVG}circle")}
    assert {text: circle.get("class") for text, circle in circles.items()} == {
        "slow: 4 s, 40.0 dB; no other is faster and as good": "mark first",
        "fast: 1 s, 30.0 dB; no other is faster and as good": "mark first",
        "bad: 3 s, 29.0 dB": "mark",
    }
    x = {text.split(":")[0]: float(circle.get("cx")) for text, circle in circles.items()}
    y = {text.split(":")[0]: float(circle.get("cy")) for text, circle in circles.items()}
    assert (x["slow"] - x["fast"]) / (x["bad"] - x["fast"]) == pytest.approx(1.5, abs=0.01)
    assert (y["fast"] - y["slow"]) / (y["bad"] - y["slow"]) == pytest.approx(10 / 11, abs=0.01)
    line = tree.find(f"{SVG}polyline").get("points")
    assert line == f"{x['fast']:.1f},{y['fast']:.1f} {x['slow']:.1f},{y['slow']:.1f}"


def test_identical_pictures_have_a_line_above_all_others():
    scales = PlotScales([(1.0, 100.0), (0.5, 52.0)], [])
    assert scales.identical
    assert scales.y(100.0) < scales.y(scales.high) - 30
    assert scales.y(52.0) == pytest.approx((scales.y(scales.high) + scales.y(scales.low)) / 2)
    assert not PlotScales([(1.0, 52.0)], []).identical
    assert "same" in [text.text for text in drawn([mark("a", 1.0, 100.0)]).iter(f"{SVG}text")]


def test_the_noise_floor_is_dashed_and_named():
    tree = drawn([mark("a", 1.0, 30.0), mark("b", 2.0, 35.0)], {"flex": 48.25, "repeat": 100.0, "sdpa": 100.0})
    floors = [line for line in tree.iter(f"{SVG}line") if line.get("class") == "floor"]
    assert len(floors) == 2
    texts = [text.text for text in tree.iter(f"{SVG}text")]
    assert "noise floor: flex 48.2 dB" in texts
    assert "noise floor: repeat, sdpa (identical)" in texts
    highest = min(float(circle.get("cy")) for circle in tree.iter(f"{SVG}circle"))
    assert all(float(line.get("y1")) < highest for line in floors)


def test_the_points_of_a_setting_are_dots():
    tree = drawn([mark("a", 1.5, 30.0, ("0", (1.0, 28.0)), ("3", (2.0, 32.0))), mark("b", 3.0, 31.0)])
    dots = [circle.find(f"{SVG}title").text for circle in tree.iter(f"{SVG}circle") if circle.get("class") == "dot"]
    assert dots == ["a, point 0: 1 s, 28.0 dB", "a, point 3: 2 s, 32.0 dB"]
    assert any("(mean of 2 points)" in title.text for title in tree.iter(f"{SVG}title"))


def test_labels_do_not_lie_on_each_other_nor_outside():
    marks = [mark(f"a longer label {number}", 1 + number / 100, 30 + number / 100) for number in range(6)]
    texts = [text for text in drawn(marks).iter(f"{SVG}text") if text.get("class").startswith("label")]
    assert sorted(text.text for text in texts) == [f"a longer label {number}" for number in range(6)]
    spots = [(text.get("class"), float(text.get("x")), float(text.get("y"))) for text in texts]
    for place, (side, x, y) in enumerate(spots):
        assert 0 < x < WIDTH
        assert 0 < y < HEIGHT
        assert all(other != side or abs(y - below) > 12 for other, _, below in spots[place + 1 :])


def test_what_comes_from_outside_is_text():
    text = draw_svg([mark("<script>", 1.0, 30.0), mark("b", 2.0, 31.0)], {"<b>": 33.0}, "<i>")
    assert "<script" not in text
    assert "<b>" not in text
    assert "<i>" not in text


@pytest.mark.parametrize(("low", "high"), [(0, 0.0123), (0, 1), (17.0, 52.4), (28.1, 31.9), (0, 5000)])
def test_ticks_are_few_and_round(low, high):
    found = choose_ticks(low, high)
    assert 3 <= len(found) <= 8
    assert low <= found[0]
    assert found[-1] <= high
    assert [float(f"{tick:.3g}") for tick in found] == pytest.approx(found)
