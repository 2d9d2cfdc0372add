"""Checkpoints with more blocks than the tiny ones have."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.deeper import deeper_subject

TWO_EXPERTS = "wan22_t2v_a14b"
#: cache-dit treats all steps as similar and skips every step that it may skip
ALIKE = {"residual_diff_threshold": 1.0, "max_continuous_cached_steps": -1}


@pytest.fixture(scope="module")
def made_deeper() -> dict[str, Any]:
    """The deeper subjects made so far, by name."""
    return {}


@pytest.fixture
def deep(subject, made_deeper, tmp_path_factory) -> Any:
    """The subject with twice the blocks, for prefetching in a ring."""
    if subject.name not in made_deeper:
        made_deeper[subject.name] = deeper_subject(subject, tmp_path_factory.mktemp("deep"))
    return made_deeper[subject.name]
