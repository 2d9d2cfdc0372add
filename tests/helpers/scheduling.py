"""Which tests `make test` runs, and how they are divided between workers.

By model, and the tests of no model by file: a worker builds the checkpoint of a model once. Groups of equal size follow
the order of the files.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import pytest
from xdist.scheduler import LoadScopeScheduling

from tests.helpers.subjects import MODELS


class ModelScheduling(LoadScopeScheduling):
    """Groups tests by the model name among their parameters, which pytest joins with hyphens in the test's id."""

    def _split_scope(self, nodeid: str) -> str:
        file, _, parameters = nodeid.partition("[")
        words = parameters.removesuffix("]").split("-")
        return next((word for word in words if word in MODELS), file.partition("::")[0])


def mark_others_full(items: Sequence[pytest.Item]) -> None:
    """Mark as `full` all but `count` cases, evenly spread, of each test marked `sample(count)`."""
    cases: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("sample"):
            cases[item.nodeid.partition("[")[0]].append(item)
    for own in cases.values():
        (count,) = own[0].get_closest_marker("sample").args
        kept = {place * len(own) // count for place in range(count)}
        for place, item in enumerate(own):
            if place not in kept:
                item.add_marker("full")
