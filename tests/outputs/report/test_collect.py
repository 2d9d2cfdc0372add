"""Reading run folders as points, whatever state they are in."""

from __future__ import annotations

import json

import pytest

from hydrarun.core.errors import RunError, UsageError
from hydrarun.outputs.report import run_numbers
from hydrarun.outputs.report.collect import Output, collect_points
from tests.helpers import fake_sweep
from tests.helpers.fake_sweep import measured, picture


def test_points_come_by_their_numbers(tmp_path):
    for number in (10, 9, 2):
        fake_sweep.add(tmp_path, str(number), [], [picture(0)])
    fake_sweep.add(tmp_path, "more/a", [], [picture(0)])
    (tmp_path / "2" / "inner").mkdir()
    (tmp_path / "2" / "inner" / "run.json").write_text("{}")  # folders inside a run folder are not searched
    (tmp_path / ".old").mkdir()
    (tmp_path / ".old" / "run.json").write_text("{}")
    assert [point.name for point in collect_points(tmp_path)] == ["2", "9", "10", "more/a"]
    assert [point.name for point in collect_points(tmp_path / "9")] == ["."]


@pytest.mark.parametrize(
    ("content", "status", "error"),
    [
        (None, "unfinished", "no run.json: it was killed, or it is still running"),
        ('{"a": 1, "a": 2}', "damaged", "run.json is damaged: not a JSON file: 'a' is set twice"),
        ("[1, 2]", "damaged", "run.json is damaged: not the record of a run"),
        ("{}", "damaged", "run.json is damaged: not the record of a run"),
        ('{"format": 2, "outputs": []}', "damaged", "run.json: its format is 2; this version of hydrarun reads 1"),
        ('{"format": 1, "outputs": []}', "failed", "failed, and run.json does not say why"),
        (
            '{"format": 1, "outputs": [], "status": "failed", "error": {"type": "UsageError", "message": "too big"}}',
            "failed",
            "too big",
        ),
        (
            '{"format": 1, "outputs": 3, "status": "failed", "error": {"type": "KeyError", "message": "x"}}',
            "failed",
            "KeyError: x",
        ),
    ],
)
def test_what_became_of_a_point(tmp_path, content, status, error):
    folder = fake_sweep.hydra(tmp_path, "0", ["cache=none"])
    if content is not None:
        (folder / "run.json").write_text(content)
    (point,) = collect_points(tmp_path)
    assert (point.status, point.error, point.outputs) == (status, error, [])
    assert point.overrides == ["cache=none"]


def test_values_of_the_wrong_kind_are_as_good_as_missing(tmp_path):
    folder = fake_sweep.add(tmp_path, "0", [], [picture(3)])
    peaks = {"peak_host_bytes": "much", "peak_device_bytes": 10**400}
    wrong = {"timings": ["x"], "memory": peaks, "cache": {"steps": 7}, "quality": 1, "config": 4}
    fake_sweep.change(folder, **wrong)
    (point,) = collect_points(tmp_path)
    assert set(run_numbers.collect_timings(point).values()) == {None}
    assert set(run_numbers.collect_memory(point).values()) == {None}
    assert set(run_numbers.count_work(point).values()) == {None}
    assert (run_numbers.collect_quality(point), point.config) == ({}, {})


def test_a_file_beside_the_run_is_named_and_no_other(tmp_path):
    folder = fake_sweep.add(tmp_path, "0", [], [picture(3)])
    for path in ("../0000.png", "/etc/passwd", "..", "", "a\0.mp4"):
        fake_sweep.change(folder, outputs=[{"index": 0, "prompt": "a", "seed": 3, "path": path}])
        (output,) = collect_points(tmp_path)[0].outputs
        assert output.path is None
        assert output.error == f"{path!r} is not the name of a file next to run.json"


def test_items_of_a_batch_that_failed_keep_their_places(tmp_path):
    folder = fake_sweep.add(tmp_path, "0", ["sampling.seed=4"], [picture(4), picture(5)])
    failed = [
        {"index": 1, "prompt": "a", "seed": 9, "error": {"type": "RunError", "message": "all black"}},
        {"index": 3, "prompt": "b", "seed": 8, "error": "no memory"},
    ]
    outputs = json.loads((folder / "run.json").read_text())["outputs"]
    outputs[1]["index"] = 2
    fake_sweep.change(folder, outputs=outputs, failed=failed)
    found = collect_points(tmp_path)[0].outputs
    assert [(output.index, output.seed, output.error) for output in found] == [
        (0, 4, None),
        (1, 9, "all black"),
        (2, 5, None),
        (3, 8, "no memory"),
    ]
    assert found[3] == Output(3, "b", 8, error="no memory")


def test_a_folder_without_runs_is_the_users_mistake(tmp_path):
    with pytest.raises(UsageError, match=f"^report: {tmp_path}: no run in it or below it"):
        collect_points(tmp_path)
    with pytest.raises(UsageError, match="gone: no such folder$"):
        collect_points(tmp_path / "gone")


def test_numbers_are_those_of_the_record(tmp_path):
    fake_sweep.add(tmp_path, "0", [], [picture(0), picture(1)], measured(step=0.1, load=2.0, skipped=(1, 2)))
    (point,) = collect_points(tmp_path)
    told = run_numbers.collect_timings(point)
    assert (told["load_s"], told["total_s"], told["first_step_s"], told["steady_step_s"]) == (2.0, 2.86, 0.5, 0.1)
    # three steps as measured, the first one counted as a usual computed step; two pictures, four steps
    assert told["steady_denoise_s"] == pytest.approx((0.3 + 0.2) / 2)
    assert told["mean_step_s"] == pytest.approx(0.5 / 4)
    assert run_numbers.count_work(point) == {"steps_computed": 2, "steps_all": 4, "blocks_run": 12, "blocks_all": 24}
    assert run_numbers.collect_memory(point) == {"peak_host_bytes": 3 * 2**29, "peak_device_bytes": 0}
    assert run_numbers.compute_work_seconds(told) == pytest.approx(0.86)


def test_the_batches_of_a_run_count_together(tmp_path):
    folder = fake_sweep.add(tmp_path, "0", [], [picture(0)])
    parts = [measured(skipped=()), measured(skipped=(1,))]
    parts[1]["memory"]["peak_host_bytes"] = 5 * 2**30
    summed_up = {"blocks": {"run": 42, "all": 48}, "computed_step_s": 0.2, "skipped_step_s": None}
    fake_sweep.change(folder, batches=parts, cache=summed_up, memory=None)
    (point,) = collect_points(tmp_path)
    assert run_numbers.count_work(point) == {"steps_computed": 7, "steps_all": 8, "blocks_run": 42, "blocks_all": 48}
    assert run_numbers.collect_memory(point)["peak_host_bytes"] == 5 * 2**30


def test_a_point_that_failed_early_has_no_numbers(tmp_path):
    folder = fake_sweep.add(tmp_path, "0", ["cache=none"], error=RunError("too large"))
    fake_sweep.change(folder, timings=None, memory=None, cache=None)
    (point,) = collect_points(tmp_path)
    assert (point.status, point.error) == ("failed", "too large")
    assert {
        *run_numbers.collect_timings(point).values(),
        *run_numbers.count_work(point).values(),
        *run_numbers.collect_memory(point).values(),
    } == {None}
