"""A warm-up: what it runs, that it changes only its own timing, and where it is refused."""

from __future__ import annotations

import pytest
import torch

import hydrarun
from hydrarun.core.errors import UsageError
from hydrarun.core.timing import Timings
from hydrarun.engine.runs.single import follow_single, run_single
from tests.helpers import tiny

CPU = torch.device("cpu")


def test_the_pictures_are_those_of_a_run_without_it(tiny_folder, tiny_runner, tmp_path):
    records = [
        run_single(runner, runner.config, tmp_path / name)
        for name, runner in (("plain", tiny_runner), ("warm", tiny.runner(tiny_folder, "warmup=2")))
    ]
    plain, warm = ([output["pixels_sha256"] for output in record["outputs"]] for record in records)
    assert plain == warm
    assert [record["config_hash"] for record in records] == [records[0]["config_hash"]] * 2
    assert records[0]["timings"]["warmup_s"] == 0
    timings = records[1]["timings"]
    assert 0 < timings["warmup_s"] < timings["total_s"]
    assert len(timings["steps_s"]) == 4
    assert sorted(path.suffix for path in (tmp_path / "warm").iterdir()) == [".json", ".png"]


@pytest.mark.parametrize("subject", ["wan22_t2v_a14b"], indirect=True)
@pytest.mark.parametrize("count", [1, 2])
def test_both_experts_are_warmed(subject, count, monkeypatch):
    """At their own timesteps of the run's schedule."""
    runner = subject.runner
    monkeypatch.setitem(runner.config, "warmup", count)
    warm = times(runner, lambda: runner.warm_up(runner.config, [], Timings(CPU)))
    run = times(runner, lambda: runner.draw(runner.prepare_state(runner.config, []), Timings(CPU)))
    assert warm == [seen[:count] for seen in run]
    assert [len(seen) for seen in warm] == [count, count]


def times(runner, work):
    """The timesteps of each expert's steps in `work()`."""
    found, hooks = [], []
    for transformer in runner.built.parts.experts:
        found.append([])
        record = lambda module, args, seen=found[-1]: seen.append(args[1].timestep)  # noqa: E731
        hooks.append(transformer.register_forward_pre_hook(record))
    work()
    for hook in hooks:
        hook.remove()
    return found


def test_random_numbers_go_on_as_if_there_had_been_none(tiny_runner, monkeypatch):
    """Some schedulers draw from torch's own generator. An error ends the warm-up."""
    monkeypatch.setitem(tiny_runner.config, "warmup", 1)

    def draw(*_):
        torch.randn(3)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(tiny_runner, "draw", draw)
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="out of memory"):
        tiny_runner.warm_up(tiny_runner.config, [], Timings(CPU))
    assert torch.equal(torch.get_rng_state(), before)
    assert tiny_runner.built.parts.warmup is None


def test_all_ranks_warm_up(tiny_runner, monkeypatch):
    """Ranks that follow rank 0 draw as often as it does."""
    monkeypatch.setitem(tiny_runner.config, "warmup", 2)
    drawn = []
    monkeypatch.setattr(tiny_runner, "draw", lambda *_: drawn.append(tiny_runner.built.parts.warmup))
    follow_single(tiny_runner, tiny_runner.config)
    assert drawn == [2, None]


def test_python_has_none():
    with pytest.raises(UsageError, match=r"warmup: only for the command; from Python, the first call of generate"):
        hydrarun.load("warmup=1")
