"""The points of a sweep are counted before Hydra lists them."""

from __future__ import annotations

import pytest

from hydrarun.cli.sweep.space import read_sweep
from hydrarun.config.bounds import MAX_POINTS
from hydrarun.core.errors import UsageError
from hydrarun.core.quoting import quote_overrides


@pytest.mark.parametrize(
    ("words", "count"),
    [
        (["sampling.seed=1,2", "sampling.num_inference_steps=range(1,4)"], 6),
        (["sampling.seed=range(0,2000)", "sampling.seed=3", "cache=none,every_n"], 2),  # the last one counts
        ([f"sampling.seed=shuffle(range(0,{MAX_POINTS}))"], MAX_POINTS),
        (["cache=glob(*_block)", "sampling.true_cfg_scale=range(0,1,0.25)"], 4),
    ],
)
def test_points_within_the_bound_are_listed(words, count):
    assert len(read_sweep(quote_overrides(words), ["-m"]).points) == count


MANY = f"-m: more than {MAX_POINTS} points: "


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sampling.seed=range(0,1e7)"], f"{MANY}sampling.seed has over {MAX_POINTS} values. Sweep fewer"),
        (["sampling.seed=range(0,10000000000000000000000)"], MANY),
        (["sampling.seed=shuffle(range(0,1000000000000))"], MANY),
        (["sampling.seed=range(0,1,1e-30)"], MANY),
        (["sampling.seed=range(0,inf)"], MANY),
        (["sampling.seed=range(0,1e9)", "sampling.seed=3"], MANY),  # Hydra lists the first one too
        (
            ["sampling.seed=range(0,50)", "sampling.num_inference_steps=range(1,51)", "device=cpu"],
            f"{MANY}sampling.seed has 50 values, sampling.num_inference_steps has 50 values. Sweep fewer",
        ),
        (["sampling.seed=range(0,nan)"], "sampling.seed=range(0,nan): not a range of numbers"),
        (["sampling.seed=range(0,3,0)"], "sampling.seed=range(0,3,0): not a range of numbers"),
        (["sampling.seed=range(3,3)"], "sampling.seed: a sweep over no values"),
        (["cache=glob(no*such)"], "cache: a sweep over no values"),
    ],
)
def test_other_sweeps_are_refused_in_one_line(words, message):
    with pytest.raises(UsageError) as caught:
        read_sweep(quote_overrides(words), ["-m"]).points  # noqa: B018 - a property that raises
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "words",
    [
        ['+hydra.sweeper.params.sampling.seed="range(1,1000000000)"'],
        ['hydra.sweeper.params={sampling.seed:"range(1,1000000000)"}'],
    ],
)
def test_nonsense_in_hydras_own_node_is_one_line(words):
    with pytest.raises(UsageError) as refused:
        print(read_sweep(words, ["-m"]).points)
    assert "\n" not in str(refused.value)


def test_an_option_cannot_lift_the_limit_on_ranks_for_its_points(tmp_path):
    file = tmp_path / "cache" / "mine.yaml"
    file.parent.mkdir()
    params = "hydra: {sweeper: {params: {parallel.max_ranks: 20, parallel.ulysses_degree: 9}}}"
    file.write_text(f"# @package _global_\n{params}\n")
    sweep = read_sweep(["cache=mine", "sampling.seed=1,2"], ["-m", "--config-dir", str(tmp_path)])
    with pytest.raises(UsageError, match=r"parallel\.max_ranks: set in the file of an option"):
        print(sweep.points)
