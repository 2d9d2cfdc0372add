"""The search for computed steps, and its ledger."""

from __future__ import annotations

import itertools
import json
import random

import pytest

from hydrarun.core.errors import UsageError
from hydrarun.engine.calibration.scores import ScoreLedger
from hydrarun.engine.calibration.search import list_moves, search_steps, spread_steps

FIRST = frozenset({0})
STARTS = [spread_steps(4, 7, FIRST, power) for power in (1.0, 2.0)]
ALL = [(0, *rest) for rest in itertools.combinations(range(1, 7), 3)]


def rugged(seed: int):
    """Return a function with a random score for each mask."""
    values = {mask: random.Random(f"{seed} {mask}").random() for mask in ALL}
    return values.__getitem__


@pytest.mark.parametrize(
    ("count", "steps", "fixed", "power", "found"),
    [
        (4, 7, {0}, 1.0, (0, 2, 4, 6)),
        (4, 10, {0}, 2.0, (0, 1, 4, 9)),
        (6, 7, {0}, 2.0, (0, 1, 2, 3, 4, 6)),
        (6, 7, {0}, 9.0, (0, 1, 2, 3, 4, 6)),
        (1, 7, {0}, 1.0, (0,)),
        (3, 9, {0, 5}, 1.0, (0, 5, 8)),
        (2, 9, {0, 5}, 1.0, (0, 5)),
    ],
)
def test_spreads(count, steps, fixed, power, found):
    assert spread_steps(count, steps, frozenset(fixed), power) == found


def test_a_move_changes_one_step_and_the_nearest_comes_first():
    assert list(list_moves((0, 2, 3), 5, FIRST)) == [(0, 1, 3), (0, 2, 4), (0, 3, 4), (0, 1, 2)]


def test_where_every_step_counts_for_itself_the_best_of_all_is_found():
    worth = (0, 5, 1, 4, 2, 9, 3)

    def score(mask):
        return -sum(worth[step] for step in mask)

    found = search_steps(score, STARTS, 7, FIRST, 200)
    assert found.best == min(ALL, key=score) == (0, 1, 3, 5)
    assert found.best_score == -18


@pytest.mark.parametrize("seed", range(8))
def test_no_move_is_better_than_what_is_found(seed):
    score = rugged(seed)
    found = search_steps(score, STARTS, 7, FIRST, 200)
    assert found.best_score == score(found.best) <= found.start_score == min(map(score, STARTS))
    assert found.best_score <= min(score(other) for other in list_moves(found.best, 7, FIRST))
    assert found == search_steps(score, STARTS, 7, FIRST, 200)


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_no_more_masks_are_scored_than_allowed(limit):
    asked = []

    def score(mask):
        asked.append(mask)
        return rugged(0)(mask)

    found = search_steps(score, STARTS, 7, FIRST, limit)
    assert len(asked) == len(set(asked)) == found.count == limit
    assert found.best_score == min(map(rugged(0), asked))


def test_a_ledger_is_continued(tmp_path):
    file = tmp_path / "deep" / "scores.jsonl"
    ledger = ScoreLedger(file, {"model": "m", "size": (1, 2)})
    ledger.add((0, 2), 0.25)
    ledger.add((0, 1), 1e-7)
    assert ScoreLedger(file, {"model": "m", "size": (1, 2)}).scores == {(0, 2): 0.25, (0, 1): 1e-7}


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_a_torn_last_line_is_dropped(tmp_path, kept):
    file = tmp_path / "scores.jsonl"
    ledger = ScoreLedger(file, {"model": "m"})
    for step in range(1, 4):
        ledger.add((0, step), step / 8)
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:kept]) + lines[kept][:-3])
    again = ScoreLedger(file, {"model": "m"})
    assert len(again.scores) == max(0, kept - 1)
    again.add((0, 6), 0.5)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows[0] == {"model": "m"}
    assert rows[-1] == {"steps": [0, 6], "score": 0.5}
    assert len(rows) == max(1, kept) + 1


def test_a_ledger_of_another_configuration_is_refused(tmp_path):
    file = tmp_path / "scores.jsonl"
    ScoreLedger(file, {"model": "m", "steps": 4, "dtype": "float32"})
    with pytest.raises(UsageError, match=r"scores.jsonl: its scores are of another configuration \(dtype, steps\)"):
        ScoreLedger(file, {"model": "m", "steps": 5, "dtype": "bfloat16"})


@pytest.mark.parametrize(("line", "number"), [("nonsense", 1), ("[1]", 1), ("{", 2), ('{"steps": [0]}', 2)])
def test_a_damaged_line_is_named(tmp_path, line, number):
    file = tmp_path / "scores.jsonl"
    file.write_text(("{}\n" if number == 2 else "") + line + "\n")
    with pytest.raises(UsageError, match=f"line {number} is damaged"):
        ScoreLedger(file, {})
