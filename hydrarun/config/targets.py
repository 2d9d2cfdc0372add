"""What a configuration may build: an allow-list of exact classes, and the building itself.

A `_target_` is code chosen by data, and recipes and pictures carry data from strangers. So every target must be one
that stands in the package's own `conf/` (exact names, no prefixes: a prefix such as `torch.` admits `torch.load`), or a
class that the user allowed by `--allow-target`. Options of the user's own and of collections do not widen the list.
Hydra 1.3 has only a block-list, which is no boundary; its `instantiate` is not used here.
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

#: a line of YAML that names a class, alone or in braces; comments don't
SHIPPED = re.compile(r"[^#]*\b_target_: *([\w.]+)")

_allowed_by_user: set[str] = set()


@cache
def list_shipped_targets() -> frozenset[str]:
    """Every `_target_` that stands in the package's own `conf/`, read as text: composing all options takes seconds."""
    files = resources.find_folder("conf").rglob("*.yaml")
    lines = (line for file in files for line in file.read_text(encoding="utf-8").splitlines())
    return frozenset(match[1] for line in lines if (match := SHIPPED.match(line)))


def list_user_allowed() -> list[str]:
    """The classes that the user allowed, for ranks that are to allow them too."""
    return sorted(_allowed_by_user)


def allow_target(name: str) -> None:
    """Let the class with this dotted name be built too. Only the user's own command line or code may call this."""
    if not all(part.isidentifier() for part in name.split(".")) or "." not in name:
        raise UsageError(f"--allow-target {name}: not the dotted name of a class, such as my.module.Class.")
    _allowed_by_user.add(name)


def check_targets(config: Mapping[str, Any], origin: Callable[[str], str] | None = None) -> None:
    """Refuse every target that is not allowed, and every other `_key_`, in a plain resolved configuration.

    Imports nothing. `origin` tells where a key's value came from. Raises UsageError with one line for each violation.
    """
    if problems := list(_find_problems(config, "")):
        raise UsageError("\n".join(f"{key}{f' ({origin(key)})' if origin else ''}: {text}" for key, text in problems))


def load_class(node: Mapping[str, Any], where: str = "") -> type:
    """The class that `node["_target_"]` names, imported and verified to be that very class; not called.

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
            raise  # our own module does not load: a bug, not a mistake of the user
        raise UsageError(f"{where}: cannot load {name}: {error}") from error
    package = module.partition(".")[0]
    if not isinstance(found, type) or found.__name__ != attribute or found.__module__.partition(".")[0] != package:
        raise UsageError(f"{where}: {name} is not a class of the package '{package}' but {found!r}.")
    return found


def instantiate(node: Mapping[str, Any], where: str = "", /, **extra: Any) -> Any:
    """Build the class that `node` names from the node's other keys and `extra`, what the caller adds to them.

    `where` is the node's key path, for messages. Nested nodes are passed as they are. Raises UsageError.
    """
    cls = load_class(node, where)
    given = {key: value for key, value in node.items() if key != TARGET}
    check_arguments(cls, given, where or cls.__name__, extra)
    return cls(**given, **extra)


def check_arguments(cls: type, given: Mapping[str, Any], where: str, extra: Collection[str] = ()) -> None:
    """Whether `cls` can be called with what was `given` at the key path `where`, beside the `extra` arguments.

    The callee's signature is the schema: unknown and missing arguments and simple types (bool, int, float, str, None,
    Literal and unions of them). Raises UsageError.
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
        unset = value is None and key in parameters and parameters[key].default is None  # whatever its annotation says
        if key in hints and not unset and not matches_hint(value, hints[key]):
            raise UsageError(f"{where}.{key}: {format_value(value)} is not {describe_hint(hints[key])}.")


def _find_problems(node: Any, path: str) -> Iterator[tuple[str, str]]:
    """Key paths, and what is wrong there."""
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
    except NameError:  # annotations that exist for the type checker only: nothing to compare with
        return {}
