"""How tests are divided between workers: by model, and the tests of no model by file.

A worker builds the checkpoint of a model once. Groups of equal size follow the order of the files.
"""

from __future__ import annotations

from xdist.scheduler import LoadScopeScheduling

from tests.helpers.subjects import MODELS


class ModelScheduling(LoadScopeScheduling):
    """Groups tests by the model name among their parameters, which pytest joins with hyphens in the test's id."""

    def _split_scope(self, nodeid: str) -> str:
        file, _, parameters = nodeid.partition("[")
        words = parameters.removesuffix("]").split("-")
        return next((word for word in words if word in MODELS), file.partition("::")[0])
