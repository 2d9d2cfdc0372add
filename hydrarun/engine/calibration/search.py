"""Searches the steps to compute: starts from a spread over the schedule and moves one step at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

#: computed steps, ascending
Steps = tuple[int, ...]


@dataclass(frozen=True)
class SearchResult:
    """The best start and the best mask, with their scores, and the number of masks that were scored."""

    start: Steps
    start_score: float
    best: Steps
    best_score: float
    count: int


def search_steps(
    score: Callable[[Steps], float], starts: Sequence[Steps], steps: int, fixed: frozenset[int], limit: int
) -> SearchResult:
    """Find the mask of least `score` for a run of `steps`. Steps in `fixed` stay; at most `limit` masks are scored.

    Starts from the best of `starts` and takes the nearest better move of a single step, until no move is better.
    """
    known = {start: score(start) for start in list(dict.fromkeys(starts))[:limit]}
    start = best = min(known, key=known.__getitem__)
    better = True
    while better:
        better = False
        # known masks are no better than the best
        for moved in [other for other in list_moves(best, steps, fixed) if other not in known][: limit - len(known)]:
            known[moved] = score(moved)
            if known[moved] < known[best]:
                best, better = moved, True
                break
    return SearchResult(start, known[start], best, known[best], len(known))


def list_moves(mask: Steps, steps: int, fixed: frozenset[int]) -> Iterator[Steps]:
    """Yield all masks with one step of `mask` moved, the nearest moves first."""
    free = sorted(set(range(steps)) - set(mask))
    pairs = ((away, to) for away in mask if away not in fixed for to in free)
    for away, to in sorted(pairs, key=lambda pair: (abs(pair[1] - pair[0]), pair)):
        yield tuple(sorted({*mask, to} - {away}))


def spread_steps(count: int, steps: int, fixed: frozenset[int], power: float) -> Steps:
    """Choose `count` of `steps` steps, from the first to the last and including `fixed`.

    The spacing is even (`power` 1), or denser at the start (above 1).
    """
    places: list[int] = []
    for index in range(count):
        wanted = round((index / max(1, count - 1)) ** power * (steps - 1))
        least = places[-1] + 1 if places else 0
        places.append(min(max(wanted, least), steps - count + index))
    chosen = set(places)
    for step in sorted(fixed - chosen):
        chosen.remove(min(sorted(chosen - fixed), key=lambda place: abs(place - step)))
        chosen.add(step)
    return tuple(sorted(chosen))
