"""The scheduler of a run: the checkpoint's own, or another diffusers scheduler with the checkpoint's settings."""

from __future__ import annotations

import importlib.util
import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import SchedulerMixin

from hydrarun.config.checks.checkpoint import read_json
from hydrarun.config.targets import TARGET, check_arguments, instantiate, load_class
from hydrarun.config.type_check import format_value
from hydrarun.core.errors import UsageError

CLASS_NAME = "_class_name"

#: the two names that schedulers have for one setting
SHIFTS = ("shift", "flow_shift")
#: schedulers that draw their noise with torchsde, which the extra `audio` installs
USES_TORCHSDE = ("CosineDPMSolverMultistepScheduler",)
#: settings of the shift by picture size, which replaces a fixed shift
SHIFTED_BY_SIZE = ("use_dynamic_shifting", "base_shift", "max_shift")


def read_scheduler(folder: Path) -> dict[str, Any]:
    """Read the scheduler_config.json of the checkpoint in `folder`, with the class that its model_index.json names."""
    return add_class_name(
        read_json(folder / "model_index.json"), read_json(folder / "scheduler" / "scheduler_config.json")
    )


def add_class_name(index: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with the `_class_name` of the index."""
    _, name = index.get("scheduler") or (None, settings.get("_class_name"))
    return {**settings, CLASS_NAME: name}


def make_scheduler(config: Mapping[str, Any], saved: Mapping[str, Any]) -> Any | None:
    """Return the scheduler that `config` chooses, or None for the checkpoint's own, unchanged.

    `saved`: the checkpoint's settings (`read_scheduler`). They apply where the chosen class has them; the settings of
    `config["scheduler"]` take precedence. Raises UsageError for settings that the class does not have or rejects
    together, and for a class that expects another kind of prediction than the checkpoint's.
    """
    own, older = config["scheduler"], config["model"]["scheduler"]
    require_torchsde(own.get(TARGET) or (older or {}).get(TARGET) or str(saved[CLASS_NAME]))
    if older and TARGET not in own:  # as in files of version 0.1.0: the checkpoint's settings do not apply
        return instantiate({**older, **own}, "model.scheduler")
    if not own:
        return None
    node = {TARGET: f"diffusers.{saved[CLASS_NAME]}", **own}
    cls: Any = load_class(node, "scheduler")
    if not issubclass(cls, SchedulerMixin):
        raise UsageError(f"scheduler._target_: {cls.__name__} is no scheduler of diffusers'")
    takes = inspect.signature(cls).parameters
    given = _settle_shift({key: value for key, value in node.items() if key != TARGET}, takes)
    check_arguments(cls, given, "scheduler")
    # settings that the class does not know stay in its config, from which the shift by size is read
    settings = {**saved, **{_find_setting_name(key, takes): value for key, value in saved.items()}, **given}
    del settings[CLASS_NAME]
    try:
        scheduler = cls.from_config(settings)
    except (ArithmeticError, AssertionError, ImportError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(f"scheduler: {cls.__name__} does not take these settings together: {error}") from None
    if not fits_objective(saved, str(saved[CLASS_NAME]), scheduler.config, cls.__name__):
        raise UsageError(
            f"scheduler: {cls.__name__} takes another kind of prediction than the checkpoint's"
            f" {saved[CLASS_NAME]}, and this model makes only one. Use scheduler=checkpoint"
        )
    return scheduler


def require_torchsde(target: str) -> None:
    """Raise UsageError for a scheduler that needs torchsde if it is not installed."""
    name = target.rpartition(".")[2]
    if name in USES_TORCHSDE and not is_installed("torchsde"):
        raise UsageError(f"scheduler: {name} needs torchsde, which is not installed: pip install 'hydrarun[audio]'")


def is_installed(package: str) -> bool:
    """Return whether a package can be imported."""
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # a loaded module without a spec
        return False


def predicts_flow(settings: Mapping[str, Any], class_name: str) -> bool:
    """Return whether a scheduler interprets its model's prediction as the velocity of a flow."""
    return class_name.startswith("FlowMatch") or settings.get("prediction_type") == "flow_prediction"


def fits_objective(saved: Mapping[str, Any], saved_class: str, settings: Mapping[str, Any], class_name: str) -> bool:
    """Return whether a scheduler interprets predictions as the checkpoint's own does.

    A flow also needs noise levels of a flow (`use_flow_sigmas`), where the class has others.
    """
    flow = predicts_flow(settings, class_name)
    if flow != predicts_flow(saved, saved_class):
        return False
    return not flow or settings.get("use_flow_sigmas", True) or not saved.get("use_flow_sigmas", True)


def _settle_shift(given: Mapping[str, Any], takes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the user's settings with the shift under the class's name for it; a given shift always takes effect.

    A checkpoint that shifts by size would ignore it, so the shift by size is turned off. Raises UsageError for an
    invalid shift, and for a shift together with settings of the shift by size.
    """
    shifts = [key for key in given if key in SHIFTS]
    if not shifts:
        return dict(given)
    key, value = shifts[0], given[shifts[0]]
    if len(shifts) > 1:
        raise UsageError(f"scheduler.{' and scheduler.'.join(shifts)} are one setting under two names: leave one out")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise UsageError(f"scheduler.{key}: {format_value(value)} is not a finite number above 0")
    if by_size := [name for name in SHIFTED_BY_SIZE if given.get(name)]:
        raise UsageError(
            f"scheduler.{key}: has no effect where noise levels are shifted by size (scheduler.{by_size[0]}):"
            " leave one of them out"
        )
    fixed = {"use_dynamic_shifting": False} if "use_dynamic_shifting" in takes else {}
    return {**fixed, **{_find_setting_name(name, takes): setting for name, setting in given.items()}}


def _find_setting_name(key: str, takes: Mapping[str, Any]) -> str:
    """Return the name under which a class takes the setting `key`."""
    return next((name for name in SHIFTS if key in SHIFTS and name in takes), key)
