"""The scheduler of a run: the checkpoint's own, or another of diffusers' with the checkpoint's settings."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydrarun.config.checks.checkpoint import read_json
from hydrarun.config.targets import TARGET, check_arguments, instantiate, load_class
from hydrarun.core.errors import UsageError

CLASS_NAME = "_class_name"

#: one setting, as two kinds of schedulers name it
SHIFTS = ("shift", "flow_shift")


def read_scheduler(folder: Path) -> dict[str, Any]:
    """The scheduler_config.json of the checkpoint in `folder`, with the class that its model_index.json names."""
    return saved_scheduler(
        read_json(folder / "model_index.json"), read_json(folder / "scheduler" / "scheduler_config.json")
    )


def saved_scheduler(index: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with the `_class_name` of the index."""
    _, name = index.get("scheduler") or (None, settings.get("_class_name"))
    return {**settings, CLASS_NAME: name}


def make_scheduler(config: Mapping[str, Any], saved: Mapping[str, Any]) -> Any | None:
    """The scheduler that `config` chooses, or None for the checkpoint's own as it is.

    `saved`: the checkpoint's (`read_scheduler`). Its settings hold where the chosen class has them; those of
    `config["scheduler"]` win. Raises UsageError for settings that the class does not have, and for a class that takes
    another kind of prediction than the checkpoint's.
    """
    own, older = config["scheduler"], config["model"]["scheduler"]
    if older and TARGET not in own:  # as files of version 0.1.0 have it: the checkpoint's settings do not count
        return instantiate({**older, **own}, "model.scheduler")
    if not own:
        return None
    node = {TARGET: f"diffusers.{saved[CLASS_NAME]}", **own}
    cls = load_class(node, "scheduler")
    takes = inspect.signature(cls).parameters
    given = {_known_as(key, takes): value for key, value in node.items() if key != TARGET}
    check_arguments(cls, given, "scheduler")
    # what the class does not know stays in its config, where the shift by size is read from
    settings = {**saved, **{_known_as(key, takes): value for key, value in saved.items()}, **given}
    scheduler = cls.from_config(  # type: ignore[attr-defined]
        {key: value for key, value in settings.items() if key != CLASS_NAME}
    )
    if predicts_flow(saved, str(saved[CLASS_NAME])) != predicts_flow(scheduler.config, cls.__name__):
        raise UsageError(
            f"scheduler: {cls.__name__} takes another kind of prediction than the checkpoint's"
            f" {saved[CLASS_NAME]}, and this model makes only one. Use scheduler=checkpoint"
        )
    return scheduler


def predicts_flow(settings: Mapping[str, Any], class_name: str) -> bool:
    """Whether a scheduler takes its model's prediction for the velocity of a flow."""
    return class_name.startswith("FlowMatch") or settings.get("prediction_type") == "flow_prediction"


def _known_as(key: str, takes: Mapping[str, Any]) -> str:
    """The name under which a class takes the setting `key`."""
    return next((name for name in SHIFTS if key in SHIFTS and name in takes), key)
