"""The allow-list of classes that a configuration may build, and their instantiation.

A `_target_` is code chosen by data, and recipes and pictures contain data from strangers. So every target must be named
in the package's own `conf/` or allowed by the user with `--allow-target`. Names match exactly: a prefix `torch.`
would allow `torch.load`. Options of the user or of collections do not extend the list. Hydra 1.3 has only a block-list,
which is not a security boundary, so its `instantiate` is not used here.
"""

from __future__ import annotations

import importlib
import inspect
import re
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cache
from typing import Any

from hydrarun.config.type_check import describe_hint, format_value, matches_hint
from hydrarun.core import resources
from hydrarun.core.errors import UsageError, suggest_name

TARGET = "_target_"

# Arguments that make an allowed class run code from a checkpoint's repository.
FORBIDDEN_ARGUMENTS = frozenset({"trust_remote_code", "custom_pipeline", "custom_revision"})

#: a line of YAML that names a class, alone or in braces; does not match in comments
SHIPPED = re.compile(r"[^#]*\b_target_: *([\w.]+)")

_allowed_by_user: set[str] = set()


@cache
def list_shipped_targets() -> frozenset[str]:
    """Return every `_target_` in the package's own `conf/`, read as text: composing all options would take seconds."""
    files = resources.find_folder("conf").rglob("*.yaml")
    lines = (line for file in files for line in file.read_text(encoding="utf-8").splitlines())
    return frozenset(match[1] for line in lines if (match := SHIPPED.match(line)))


def list_user_allowed() -> list[str]:
    """Return the classes that the user allowed, to allow them on the ranks too."""
    return sorted(_allowed_by_user)


def allow_target(name: str) -> None:
    """Allow the class with this dotted name. Only the user's own command line or code may call this."""
    if not all(part.isidentifier() for part in name.split(".")) or "." not in name:
        raise UsageError(f"--allow-target {name}: not the dotted name of a class, such as my.module.Class.")
    _allowed_by_user.add(name)


def check_targets(config: Mapping[str, Any], origin: Callable[[str], str] | None = None) -> None:
    """Refuse every target that is not allowed, and every other key with a leading underscore, in a resolved config.

    Imports nothing. `origin` returns where a key's value came from. Raises UsageError with one line per violation.
    """
    if problems := list(_find_problems(config, "")):
        raise UsageError(*(f"{key}{f' ({origin(key)})' if origin else ''}: {text}" for key, text in problems))


def load_class(node: Mapping[str, Any], where: str = "") -> type:
    """Import the class that `node["_target_"]` names, and verify that it is exactly that class. Does not call it.

    `where` is the node's key path, for messages. Raises UsageError.
    """
    name: Any = node.get(TARGET)
    for key, text in _check_target_name(name, f"{where}._target_".lstrip(".")):
        raise UsageError(f"{key}: {text}")
    where = where or name
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        if name in list_shipped_targets() and module.startswith("hydrarun."):
            raise  # our own module fails to import: a bug, not a user error
        raise UsageError(f"{where}: cannot load {name}: {error}") from error
    package = module.partition(".")[0]
    if not isinstance(found, type) or found.__name__ != attribute or found.__module__.partition(".")[0] != package:
        raise UsageError(f"{where}: {name} is not a class of the package '{package}' but {found!r}.")
    return found


def instantiate(node: Mapping[str, Any], where: str = "", /, **extra: Any) -> Any:
    """Build the class that `node` names, from the node's other keys and the caller's `extra` arguments.

    `where` is the node's key path, for messages. Nested nodes are passed as they are. Raises UsageError.
    """
    cls = load_class(node, where)
    given = {key: value for key, value in node.items() if key != TARGET}
    check_arguments(cls, given, where or cls.__name__, extra)
    return cls(**given, **extra)


def check_arguments(cls: type, given: Mapping[str, Any], where: str, extra: Collection[str] = ()) -> None:
    """Check that `cls` can be called with the arguments `given` at the key path `where` plus the `extra` ones.

    The signature of `cls` is the schema. Checks for unknown and missing arguments, and simple types (bool, int, float,
    str, None, Literal and unions of them). Raises UsageError.
    """
    parameters = {name: p for name, p in inspect.signature(cls).parameters.items() if name != "self"}
    named = {name for name, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    settable = sorted(named.difference(extra))
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for key in given:
        if key in extra or (key not in named and not open_ended):
            names = ", ".join(settable) or "none"
            raise UsageError(
                f"{where}.{key}: {cls.__name__} takes no such argument.{suggest_name(key, settable)} It takes: {names}."
            )
    required = [name for name in settable if parameters[name].default is inspect.Parameter.empty]
    if missing := [name for name in required if name not in given]:
        raise UsageError(f"{where}: {cls.__name__} needs {', '.join(missing)}; set {where}.{missing[0]}=…")
    hints = _get_argument_hints(cls)
    for key, value in given.items():
        unset = value is None and key in parameters and parameters[key].default is None  # whatever the annotation
        if key in hints and not unset and not matches_hint(value, hints[key]):
            raise UsageError(f"{where}.{key}: {format_value(value)} is not {describe_hint(hints[key])}.")


def _find_problems(node: Any, path: str) -> Iterator[tuple[str, str]]:
    """Yield a key path and a sentence for each violation."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            here = f"{path}.{key}" if path else str(key)
            if key == TARGET:
                yield from _check_target_name(value, here)
            elif str(key).startswith("_"):
                yield here, "keys with a leading underscore other than _target_ are not allowed."
            elif key in FORBIDDEN_ARGUMENTS:
                yield here, "not allowed: it would run code that comes with a checkpoint."
            else:
                yield from _find_problems(value, here)
    elif isinstance(node, (list, tuple)):
        for index, value in enumerate(node):
            yield from _find_problems(value, f"{path}[{index}]")


def _check_target_name(name: Any, path: str) -> Iterator[tuple[str, str]]:
    allowed = list_shipped_targets() | _allowed_by_user
    if not isinstance(name, str) or name not in allowed:
        hint = suggest_name(str(name), allowed) or " For a class of your own: --allow-target my.module.Class"
        yield path, f"{name!r} is not on the list of allowed classes.{hint}"


def _get_argument_hints(cls: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls.__init__)  # type: ignore[misc]
    except NameError:  # annotations imported for the type checker only cannot be resolved
        return {}
