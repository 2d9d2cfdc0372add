"""Driver and ranks of a run of batches: what is computed and read once, sent to ranks, and recorded."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from hydrarun.config import batches
from hydrarun.core.errors import RunError
from hydrarun.engine.ranks import launch, torchrun
from hydrarun.engine.runs.batch import run_batches
from hydrarun.engine.runs.batch_ledger import BatchLedger
from hydrarun.outputs import journal
from tests.helpers.batch_runs import compose_lines, failing, prompts, read_record


@pytest.fixture(autouse=True)
def let_go():
    """Free the loaded model after each test; runs within one test share it."""
    yield
    launch.close_executor()


@pytest.fixture
def config(tiny_folder, tmp_path):
    """Composes the configuration of a run of these lines."""
    return partial(compose_lines, tiny_folder, tmp_path)


def test_the_ledger_is_read_once_for_each_job_and_every_row_once(config, tmp_path, monkeypatch):
    opened: list[Path] = []
    parsed: list[bytes] = []
    really_open, really_parse = journal.open_file, journal.parse_json

    def count_open(path, *arguments):
        if Path(path).name == "ledger.jsonl":
            opened.append(path)
        return really_open(path, *arguments)

    def count_parse(line, *arguments):
        parsed.append(line)
        return really_parse(line, *arguments)

    monkeypatch.setattr(journal, "open_file", count_open)
    monkeypatch.setattr(journal, "parse_json", count_parse)
    rows = prompts("a", "bad", "c", "d")
    failing(monkeypatch, {"bad": [RunError("NaN")]})
    with pytest.raises(RunError, match="1 of 4 failed"):
        launch.run_configuration(config(*rows), tmp_path)
    assert len(opened) == 2  # a job that ends with the failure, and one for the rest
    opened.clear()
    ledger = (tmp_path / "ledger.jsonl").read_bytes().splitlines()
    by_rank = [line for line in ledger[1:] if not line.startswith(b'{"failed"')]  # the driver wrote the others
    assert sorted(line for line in parsed if line in ledger) == sorted(by_rank)

    opened.clear()
    parsed.clear()
    assert launch.run_configuration(config(*rows), tmp_path)["status"] == "complete"
    assert len(opened) == 2  # the existing rows, and those that one job adds
    ledger = (tmp_path / "ledger.jsonl").read_bytes().splitlines()
    assert [line for line in parsed if line in ledger] == ledger


def test_ranks_draw_the_items_that_the_driver_sends(config, tmp_path, monkeypatch):
    asked = config(*prompts("a", "b"), {"prompt": "c", "height": 32}, words=("batch_size=2",))
    executor, jobs = launch.LocalExecutor(), []

    def do_job(job):
        with monkeypatch.context() as patched:
            for name in ("list_items", "group_batches", "iterate_lines", "expand_prompts"):
                patched.setattr(batches, name, lambda *_, name=name: pytest.fail(f"a rank called {name}"))
            jobs.append(job)
            executor.run_job("batches", asked, json.loads(json.dumps(job)))

    made = run_batches(asked, tmp_path, do_job)
    assert (made["status"], [one["outputs"] for one in made["batches"]]) == ("complete", [[0, 1], [2]])
    (tmp_path / made["outputs"][1]["path"]).unlink()
    again = run_batches(asked, tmp_path, do_job)
    executor.close()
    assert [one["pixels_sha256"] for one in again["outputs"]] == [one["pixels_sha256"] for one in made["outputs"]]
    first, second = jobs
    assert (first["total"], [one["missing"] for one in first["batches"]]) == (2, [[0, 1], [2]])
    (left,) = second["batches"]
    assert (second["total"], left["number"], left["missing"]) == (2, 0, [1])
    assert left["items"] == first["batches"][0]["items"]


def test_the_items_are_computed_once(config, tmp_path, monkeypatch):
    compute, calls = batches.list_items, []
    monkeypatch.setattr(batches, "list_items", lambda config: calls.append(config) or compute(config))
    failing(monkeypatch, {"b": [RunError("once")]})
    assert (
        launch.run_configuration(config(*prompts("a", "b", "c"), words=("retry=1",)), tmp_path)["status"] == "complete"
    )
    assert len(calls) == 1


def test_a_failure_that_ends_a_rank_of_torchrun_is_recorded(config, tmp_path):
    launch.run_configuration(config(*prompts("a")), tmp_path)
    asked, arguments = config(*prompts("a", "b")), {"output_dir": str(tmp_path)}

    def do_job():
        BatchLedger(tmp_path, asked).record_failure([1], RunError("overflow"))
        raise RunError("rank 1 stumbled")

    with pytest.raises(RunError, match="rank 1"), torchrun.record_job_failure("batches", asked, arguments):
        do_job()
    made = read_record(tmp_path)
    assert (made["status"], made["error"]["message"], len(made["outputs"])) == ("failed", "rank 1 stumbled", 1)
    assert [(one["index"], one["error"]["message"]) for one in made["failed"]] == [(1, "overflow")]
