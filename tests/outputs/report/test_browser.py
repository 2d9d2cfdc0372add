"""The page in a real browser, on a laptop and on a phone. Skipped where Debian's chromium is not installed."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from hydrarun.core.errors import RunError
from hydrarun.outputs import report
from hydrarun.outputs.media import mp4
from tests.helpers import browser, fake_sweep
from tests.helpers.fake_sweep import measured, picture

pytestmark = pytest.mark.skipif(browser.EXECUTABLE is None, reason="there is no chromium here")

LAPTOP, PHONE = (1440, 900), (390, 844)
VIDEO = np.stack([np.roll(picture(7), 4 * number, 1) for number in range(4)])


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    started = browser.Browser(tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A report: two caches by two seeds, a failed point, a video, and a picture nine times as wide as high."""
    folder = fake_sweep.grid(tmp_path_factory.mktemp("sweep"))
    fake_sweep.add(folder, "4", ["cache=dbcache", "sampling.seed=1"], error=RunError("all black " * 30))
    video = fake_sweep.add(folder, "5", ["cache=dbcache", "sampling.seed=2"], [picture(2)], measured(0.07))
    record = {"index": 0, "prompt": fake_sweep.configuration([])["sampling"]["prompt"], "seed": 2}
    fake_sweep.change(video, outputs=[{**record, "path": "v.mp4", "frames": 4, "fps": 8}])
    (video / "v.mp4").write_bytes(mp4.encode_mp4(VIDEO, 8, {}))
    wide = np.repeat(picture(1), 9, 1)
    fake_sweep.add(folder, "6", ["cache=first_block", "sampling.seed=1"], [wide], measured(0.04))
    return report.write_report(folder)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [LAPTOP, PHONE])
def test_everything_is_shown_and_fits(chromium, page, size, scheme):
    chromium.open(page, *size, scheme)
    assert chromium.errors == []
    assert [address for address in chromium.requests if not address.startswith("data:")] == [page.as_uri()]
    assert chromium.run("document.documentElement.scrollWidth") <= size[0]
    assert chromium.run("[...document.images].length") == 6 + 2  # six outputs, two differences
    assert chromium.run("[...document.images].filter((image) => !image.naturalWidth).length") == 0
    assert chromium.run("document.querySelector('video').readyState") >= 1  # size and length are known
    back = chromium.run("getComputedStyle(document.body).backgroundColor")
    assert (min(map(int, back[4:-1].split(","))) > 200) is (scheme == "light")


def test_the_tables_scroll_under_their_first_column(chromium, page):
    chromium.open(page, *PHONE)
    for table in ("grid", "numbers"):
        chromium.run(f"document.querySelector('.{table}').parentNode.scrollLeft = 150")
        left, moved = chromium.run(
            f"[...document.querySelectorAll('.{table} tbody tr:first-child > :nth-child(-n+2)')]"
            ".map((cell) => cell.getBoundingClientRect().left)"
        )
        assert left >= 0
        assert moved < left


def column(chromium, place: int) -> list[str]:
    return chromium.run(
        f"[...document.querySelectorAll('.numbers tbody tr')].map((row) => row.cells[{place}].textContent)"
    )


def test_a_click_on_a_head_sorts(chromium, page):
    chromium.open(page, *LAPTOP)
    heads = chromium.run(
        "[...document.querySelectorAll('.numbers th button')].map((b) => b.firstChild.textContent.trim())"
    )
    total = heads.index("total")
    chromium.run(f"document.querySelectorAll('.numbers th button')[{total}].click()")
    up = [float(cell) for cell in column(chromium, total)]
    assert up == sorted(up)
    assert len(set(up)) > 2
    button = f"document.querySelectorAll('.numbers th button')[{total}]"
    chromium.run(f"{button}.focus()")
    chromium.press("Enter", 13, "\r")
    assert [float(cell) for cell in column(chromium, total)] == sorted(up, reverse=True)
    assert chromium.run(f"{button}.parentNode.ariaSort") == "descending"
    difference = heads.index("largest")
    chromium.run(f"document.querySelectorAll('.numbers th button')[{difference}].click()")
    assert column(chromium, difference)[:2] == ["3", "10"]
    assert set(column(chromium, difference)[2:]) == {""}  # empty cells stay last
    chromium.run("document.querySelectorAll('.numbers th button')[0].click()")
    assert column(chromium, 0) == list("0123456")


def test_a_click_on_a_picture_opens_it_beside_its_reference(chromium, page, tmp_path):
    chromium.open(page, *LAPTOP)
    chromium.run("document.querySelector('#cell-1-1 a').click()")
    assert chromium.run("document.querySelector('dialog').open")
    shown = "[...document.querySelectorAll('#view-stage img')].map((image) => image.src)"
    cell = "[...document.querySelectorAll('#cell-1-0 .picture, #cell-1-1 .picture')].map((image) => image.src)"
    assert chromium.run(shown) == chromium.run(cell)
    assert chromium.run("document.getElementById('view-told').textContent").endswith(
        "from the reference: 56.7 dB, largest 3 of 255 · the file itself, 64×64"
    )
    assert (
        chromium.run("document.getElementById('view-command').textContent") == "hydrarun cache=teacache sampling.seed=2"
    )
    chromium.run("document.getElementById('mode-slider').click()")
    chromium.run("document.getElementById('view-slider').value = 25")
    chromium.run("document.getElementById('view-slider').dispatchEvent(new Event('input'))")
    assert chromium.run("document.querySelector('#view-stage img + img').style.clipPath") == "inset(0px 75% 0px 0px)"
    chromium.run("document.getElementById('mode-difference').click()")
    assert chromium.run(shown) == [chromium.run("document.querySelector('#cell-1-1 .difference').src")]
    box = "document.querySelector('#view-stage img').getBoundingClientRect()"
    box = chromium.run(f"[{box}.left, {box}.top, {box}.width, {box}.height]")
    chromium.picture(tmp_path / "view.png")
    seen = np.asarray(Image.open(tmp_path / "view.png").convert("RGB")).astype(int)
    side = min(box[2:])  # the picture is square, in the middle of its box
    left, top = box[0] + (box[2] - side) / 2, box[1] + (box[3] - side) / 2
    inside, beside = (seen[int(top + side * part), int(left + side * part)] for part in (1 / 16, 1 / 2))
    assert inside.tolist() == [96, 96, 96]  # 3, amplified 32 times, in the corner of 8 of 64 pixels
    assert beside.tolist() == [0, 0, 0]
    chromium.press("Escape", 27)
    assert not chromium.run("document.querySelector('dialog').open")
    assert chromium.errors == []


def test_the_full_view_goes_on_to_the_next_and_plays_videos(chromium, page):
    chromium.open(page, *PHONE)
    chromium.run("document.querySelector('#cell-1-1 a').click()")
    chromium.press("ArrowRight", 39)
    assert chromium.run("document.getElementById('view-name').textContent") == "dbcache, seed 2"
    assert chromium.run("document.querySelector('#view-stage video').src.slice(0, 14)") == "data:video/mp4"
    assert chromium.run("document.getElementById('mode-difference').disabled")  # a picture and a video
    assert chromium.run("document.documentElement.scrollWidth") <= PHONE[0]
    assert chromium.run("document.querySelector('dialog').scrollWidth") <= PHONE[0]
    assert chromium.errors == []


def test_the_grid_shows_differences_without_scripts(chromium, page):
    chromium.send("Emulation.setScriptExecutionDisabled", value=True)
    try:
        chromium.open(page, *LAPTOP)
        chromium.send("DOM.enable")
        root = chromium.send("DOM.getDocument")["root"]["nodeId"]

        def heights(which: str) -> list[int]:
            found = chromium.send("DOM.querySelectorAll", nodeId=root, selector=f"#cell-1-1 .{which}")["nodeIds"]
            return [_height(chromium, node) for node in found]

        label = chromium.send("DOM.querySelector", nodeId=root, selector="label[for=show-differences]")["nodeId"]
        assert (heights("picture")[0] > 100, heights("difference")) == (True, [0])
        x1, y1, _, _, x2, y2 = chromium.send("DOM.getBoxModel", nodeId=label)["model"]["content"][:6]
        for kind in ("mousePressed", "mouseReleased"):
            place = {"x": (x1 + x2) / 2, "y": (y1 + y2) / 2}
            chromium.send("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)
        assert (heights("picture"), heights("difference")[0] > 100) == ([0], True)
    finally:
        chromium.send("Emulation.setScriptExecutionDisabled", value=False)


def _height(chromium, node: int) -> int:
    """Return the height on the screen; 0 if the node is not shown."""
    try:
        return chromium.send("DOM.getBoxModel", nodeId=node)["model"]["height"]
    except RuntimeError:
        return 0


def test_a_command_is_copied(chromium, page):
    chromium.open(page, *LAPTOP)
    chromium.send("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    chromium.run("document.querySelectorAll('#commands .copy')[2].click()")
    assert chromium.run("new Promise((done) => setTimeout(() => done(navigator.clipboard.readText()), 50))") == (
        "hydrarun cache=teacache sampling.seed=1"
    )
    assert chromium.run("document.querySelectorAll('#commands .copy')[2].textContent") == "Copied"
