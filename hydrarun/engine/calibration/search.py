"""Searches the steps to compute: from a spread over the schedule, one step moved at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

#: computed steps, ascending
Steps = tuple[int, ...]


@dataclass(frozen=True)
class SearchResult:
    """The best of the starts and the best of all, with their scores, and how many were scored."""

    start: Steps
    start_score: float
    best: Steps
    best_score: float
    count: int


def search_steps(
    score: Callable[[Steps], float], starts: Sequence[Steps], steps: int, fixed: frozenset[int], limit: int
) -> SearchResult:
    """The steps of least `score`, of a run of `steps`; those in `fixed` stay. At most `limit` are scored.

    From the best of `starts` on, the nearest move of a single step that is better is taken, until there is none.
    """
    known = {start: score(start) for start in list(dict.fromkeys(starts))[:limit]}
    start = best = min(known, key=known.__getitem__)
    better = True
    while better:
        better = False
        # what is known is no better than the best
        for moved in [other for other in list_moves(best, steps, fixed) if other not in known][: limit - len(known)]:
            known[moved] = score(moved)
            if known[moved] < known[best]:
                best, better = moved, True
                break
    return SearchResult(start, known[start], best, known[best], len(known))


def list_moves(mask: Steps, steps: int, fixed: frozenset[int]) -> Iterator[Steps]:
    """All masks with one step of `mask` in another place, the nearest places first."""
    free = sorted(set(range(steps)) - set(mask))
    pairs = ((away, to) for away in mask if away not in fixed for to in free)
    for away, to in sorted(pairs, key=lambda pair: (abs(pair[1] - pair[0]), pair)):
        yield tuple(sorted({*mask, to} - {away}))


def spread_steps(count: int, steps: int, fixed: frozenset[int], power: float) -> Steps:
    """`count` of `steps` steps from the first to the last, `fixed` among them.

    Evenly (`power` 1), or denser at the start (above 1).
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
