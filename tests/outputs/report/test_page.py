"""The two files of a report, and the `report` verb."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from hydrarun.cli import main
from hydrarun.core.errors import RunError
from hydrarun.outputs import report
from hydrarun.outputs.report import page
from tests.helpers import fake_sweep
from tests.helpers.fake_sweep import measured, picture
from tests.helpers.paths import ROOT


class Page(HTMLParser):
    """Parses elements with their attributes, and the text. Fails if elements are not closed in order."""

    VOID = ("meta", "img", "input", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, {name: value or "" for name, value in attributes}))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}>"

    def handle_startendtag(self, tag, attributes):  # in SVG
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.text.append(data)

    def rows(self, text: str, kind: str) -> list[list[str]]:
        """Return the cells of a table body."""
        table = re.search(rf'<table class="{kind}.*?</table>', text, re.DOTALL)[0]
        body = table[table.index("<tbody>") :]
        strip = lambda cell: re.sub("<[^>]*>", "", cell)  # noqa: E731
        return [[strip(cell) for cell in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in body.split("</tr>")[:-1]]


def written(folder: Path, reference: str | None = None) -> tuple[str, dict]:
    file = report.write_report(folder, reference)
    assert file == folder / "report.html"
    return file.read_text(encoding="utf-8"), json.loads((folder / "report.json").read_text(encoding="utf-8"))


def test_the_page_needs_nothing_but_itself(tmp_path):
    text, _ = written(fake_sweep.grid(tmp_path))
    found = Page(text)
    assert not re.search(r"https?:", text)
    assert not re.search(r"@import|url\(", text)
    addresses = [
        (tag, value) for tag, given in found.elements for name, value in given.items() if name in ("src", "href")
    ]
    outside = [(tag, value) for tag, value in addresses if not value.startswith("data:")]
    assert {tag for tag, _ in outside} == {"a"}
    assert all((tmp_path / value).is_file() for _, value in outside)
    assert [given for tag, given in found.elements if tag == "script"] == [{}]


def test_the_policy_in_the_page_knows_its_script_and_style(tmp_path):
    text, _ = written(fake_sweep.grid(tmp_path))
    for tag in ("script", "style"):
        content = re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)[1]
        assert f"{tag}-src '{page.hash_for_csp(content)}'" in text


def test_the_numbers_are_those_of_run_json(tmp_path):
    _, data = written(fake_sweep.grid(tmp_path))
    assert (data["format"], data["counts"], data["settings"]) == (1, {"complete": 4}, ["no cache", "teacache"])
    assert data["axes"] == [
        {"key": "cache", "label": "cache", "values": ["none", "teacache"], "shown": "columns"},
        {"key": "sampling.seed", "label": "seed", "values": ["1", "2"], "shown": "rows"},
    ]
    for point in data["points"]:
        record = json.loads((tmp_path / point["name"] / "run.json").read_text())
        for name in ("load_s", "encode_s", "denoise_s", "decode_s", "total_s", "save_s", "compile_s", "warmup_s"):
            assert point["timings"][name] == record["timings"][name]
        steps = record["timings"]["steps_s"]
        assert (point["timings"]["first_step_s"], point["timings"]["steady_step_s"]) == (steps[0], np.median(steps[1:]))
        assert point["memory"] == record["memory"]
        assert point["work"]["blocks_run"] == record["cache"]["blocks"]["run"]
        assert [output["path"] for output in point["outputs"]] == [
            f"{point['name']}/{output['path']}" for output in record["outputs"]
        ]
    first, cached = data["points"][0], data["points"][2]
    assert (first["reference"], first["speedup"], first["difference"]) == ("0", None, None)
    assert cached["reference"] == "0"
    assert cached["speedup"]["steady"] == pytest.approx((0.3 + 0.2) / (0.15 + 0.2))
    assert cached["speedup"]["total"] == pytest.approx(0.86 / 0.71)  # without the second of loading of the reference
    only = cached["outputs"][0]["difference"]
    alike = {name: dict.fromkeys(("mean", "p95", "worst"), only[name]) for name in ("psnr", "ssim")}
    assert cached["difference"] == {**alike, "largest": 10, "outputs": 1}
    assert 0 < only["ssim"] < 1
    assert cached["command"] == "hydrarun cache=teacache sampling.seed=1"


def test_quality_and_the_noise_floor_are_taken_over(tmp_path):
    fake_sweep.grid(tmp_path)
    floor = {"repeat": {"psnr": {"mean": 61.0, "p95": 60.0, "worst": 59.0}}}
    for name, psnr in (("0", 100.0), ("1", 100.0), ("2", 41.5), ("3", 43.5)):
        values = {"mean": psnr, "p95": psnr - 1, "worst": psnr - 2}
        accuracy = {"outputs": 0.75, "twins": 1.0, "count": 4}
        quality = {"twin": "/somewhere", "psnr": values, "accuracy": accuracy, "noise_floor": floor}
        fake_sweep.change(tmp_path / name, quality=quality)
    text, data = written(tmp_path)
    assert data["points"][2]["quality"] == {
        "psnr": {"mean": 41.5, "p95": 40.5, "worst": 39.5},
        "accuracy": {"outputs": 0.75, "twins": 1.0, "count": 4},
        "noise_floor": floor,
    }
    assert "/somewhere" not in text
    assert "PSNR of the output against its uncached reference run" in text
    assert "noise floor: repeat 61.0 dB" in text
    assert "teacache: 0.35 s, 42.5 dB (mean of 2 points)" in text
    row = Page(text).rows(text, "numbers")[2]
    assert row[-6:] == ["41.5", "40.5", "39.5", "61.0", "75 %", "100 %"]


def test_what_no_setting_beats_is_marked(tmp_path):
    fake_sweep.grid(tmp_path)
    slow = measured(step=0.5)
    fake_sweep.add(tmp_path, "4", ["cache=every_n", "sampling.seed=1"], [picture(1, 20)], slow)
    _, data = written(tmp_path)
    assert [point["pareto"] for point in data["points"]] == [True, True, True, True, False]


def test_empty_is_not_zero(tmp_path):
    fake_sweep.grid(tmp_path)
    fake_sweep.change(tmp_path / "3", timings={"total_s": 2.0}, memory=None)
    text, data = written(tmp_path)
    table = Page(text).rows(text, "numbers")
    heads = re.findall(r'<button type="button">(.*?)(?: <small>.*?)?</button></th>', text)
    row = dict(zip(heads, table[3], strict=True))
    assert (row["total"], row["load"], row["denoise"], row["host"], row["cache"]) == ("2.00", "", "", "", "teacache")
    assert not {"compile", "warm-up", "device"} & set(heads)  # no point has a value
    assert data["points"][3]["timings"]["load_s"] is None
    assert dict(zip(heads, table[1], strict=True))["load"] == "warm"


def test_what_went_wrong_is_said_where_the_picture_would_be(tmp_path):
    fake_sweep.grid(tmp_path)
    fake_sweep.hydra(tmp_path, "4", ["cache=dbcache", "sampling.seed=1"])
    fake_sweep.add(tmp_path, "5", ["cache=dbcache", "sampling.seed=2"], error=RunError("all <b>black</b>"))
    (fake_sweep.hydra(tmp_path, "6", ["cache=mask", "sampling.seed=1"]) / "run.json").write_text("{")
    text, data = written(tmp_path)
    assert data["counts"] == {"complete": 4, "unfinished": 1, "failed": 1, "damaged": 1}
    shown = Page(text)
    assert [row[3] for row in shown.rows(text, "grid")] == [
        "unfinishedno run.json: it was killed, or it is still running",
        "failedall &lt;b&gt;black&lt;/b&gt;",
    ]
    assert shown.rows(text, "grid")[0][4].startswith("damagedrun.json is damaged: not a JSON file: ")
    status = [row[3] for row in shown.rows(text, "numbers")]
    assert status[5] == "failed: all &lt;b&gt;black&lt;/b&gt;"
    assert "7 points" in text
    assert "hydrarun cache=dbcache sampling.seed=2" in text


def test_nothing_at_all_worked(tmp_path):
    fake_sweep.hydra(tmp_path, "0", ["cache=none"])
    (fake_sweep.hydra(tmp_path, "1", ["cache=mask"]) / ".hydra" / "overrides.yaml").write_text("[")
    text, data = written(tmp_path)
    assert [point["status"] for point in data["points"]] == ["unfinished", "unfinished"]
    assert "Needs at least two settings" in text
    Page(text)


def test_texts_stay_texts(tmp_path):
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)> \"'&"
    for number, cache in enumerate(("none", "every_n")):
        folder = fake_sweep.add(tmp_path, f"{number} <i>", [f"cache={cache}"], [picture(0)])
        record = json.loads((folder / "run.json").read_text())
        record["outputs"][0]["prompt"] = evil
        record["config"]["model"]["name"] = record["device"] = record["versions"]["torch"] = "<u>x"
        fake_sweep.change(folder, **record)
    (tmp_path / "0 <i>" / ".hydra" / "overrides.yaml").write_text(json.dumps([f"sampling.prompt={evil}", "x=<s>"]))
    text, _ = written(tmp_path)
    found = Page(text)
    assert not {"i", "u", "s"} & {tag for tag, _ in found.elements}
    assert [tag for tag, _ in found.elements].count("script") == 1
    assert not any("onerror" in given for _, given in found.elements)
    assert evil in "".join(found.text)
    assert any(given.get("href", "").startswith("0%20%3Ci%3E/0000-") for _, given in found.elements)


def test_pictures_and_differences_are_embedded_once(tmp_path):
    text, _ = written(fake_sweep.grid(tmp_path))
    images = [given["src"] for tag, given in Page(text).elements if tag == "img"]
    assert len(images) == 4 + 2
    assert len(text) < 100_000


def test_a_report_is_quick(tmp_path):
    fake_sweep.grid(tmp_path)
    report.write_report(tmp_path)
    start = time.process_time()
    report.write_report(tmp_path)
    assert time.process_time() - start < 0.5


def test_the_verb(tmp_path, capsys):
    fake_sweep.grid(tmp_path)
    assert main.main(["report", str(tmp_path), "--reference", "teacache"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/report.html\n"
    data = json.loads((tmp_path / "report.json").read_text())
    assert [point["reference"] for point in data["points"]] == ["2", "3", "2", "3"]
    assert main.main(["report", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: hydrarun report DIR [--reference NAME]\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "report takes one folder, not none\n"),
        (["a", "b"], "report takes one folder, not a b\n"),
        (["--html"], "report: --html: no such flag; it takes --reference.\n"),
        (["a", "--reference"], "--reference: needs a value.\n"),
        (["gone"], "report: gone: no such folder\n"),
    ],
)
def test_mistakes_are_said_in_a_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main.main(["report", *words]) == 2
    assert capsys.readouterr().err.startswith(message)


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(page, "write_atomically", full)
    with pytest.raises(RunError, match="cannot be written: No space left on device$"):
        report.write_report(fake_sweep.grid(tmp_path))


def test_neither_torch_nor_av_is_imported(tmp_path):
    """A report of pictures imports nothing slow; an error message does not even import numpy."""
    fake_sweep.grid(tmp_path)
    script = (
        "import sys; from hydrarun.cli import main as cli; cli.main(['report', *sys.argv[1:]]);"
        "print(sorted({'torch', 'diffusers', 'transformers', 'av', 'skimage', 'numpy'} & set(sys.modules)))"
    )

    def imported(*words: str) -> str:
        done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, cwd=ROOT)
        return done.stdout.splitlines()[-1]

    assert imported(str(tmp_path)) == "['numpy', 'skimage']"
    assert imported(str(tmp_path), "--reference", "nope") == "[]"
