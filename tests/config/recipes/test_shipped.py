"""Shipped recipes whose evidence needs a GPU, on tiny checkpoints: their options draw the same pictures as a plain run.

Uses the fake device and the tolerances of the matrix. Compiled parts are traced only.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from hydrarun.config.compose import compose_unchecked
from hydrarun.config.recipes import search
from hydrarun.engine.runner import Runner
from tests.helpers import matrix, watched
from tests.helpers.deeper import deeper_subject
from tests.helpers.matrix import Column

#: the groups to test; not `parallel`, which needs several ranks, or `cache`, which skips other steps with other weights
GROUPS = ("attention", "compile", "offload", "quantization")
NAMES = [name for name in search.list_recipe_names() if not name.startswith("demo/")]


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    """The subjects with twice as many blocks, and the latents of their plain runs, by model."""
    return {}


def chosen(name: str) -> dict[str, str]:
    """Return `{group: option}` of a recipe."""
    found = {"model": "demo"}
    for entry in search.load_recipe(name).content.get("defaults", []):
        if isinstance(entry, dict):
            found |= {group.removeprefix("override /"): option for group, option in entry.items()}
    return found


@pytest.mark.sample(3)
@pytest.mark.parametrize(("subject", "name"), [(chosen(name)["model"], name) for name in NAMES], indirect=["subject"])
def test_a_recipe_draws_the_plain_pictures(subject, name, fake, kept, tmp_path_factory, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    if subject.name not in kept:
        deep = deeper_subject(subject, tmp_path_factory.mktemp("deep"))
        kept[subject.name] = deep, watched.draw(watched.runner(deep, "fake")).latents.cpu().numpy()
    deep, want = kept[subject.name]
    config = compose_unchecked([f"recipe={name}"])[0]
    small = watched.smallest(deep.name, deep.folder)
    runner = Runner({**small, **{group: config[group] for group in GROUPS}, "device": "fake"})
    found = watched.draw(runner).latents.cpu().numpy()
    share = np.sqrt(np.square(found - want).mean()) / want.std()
    kinds = [
        Column(group, option).kind
        for group, option in chosen(name).items()
        if group in GROUPS and group in matrix.GROUPS
    ]
    assert share <= sum(kind.most for kind in kinds if kind.lossy) + 1e-5
