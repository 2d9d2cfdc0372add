"""The command line before Hydra reads it: the verb, Hydra's flags, the overrides, in any order."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from hydrarun.core.errors import UsageError, nearest

VERBS = ("run", "plan", "replay", "report", "recipe", "calibrate", "list")

# Hydra's flags and two of ours; True for those that take a value. --experimental-rerun is left out: it reads a pickle.
FLAGS = {
    **dict.fromkeys(("--dry-run", "--fail-fast"), False),
    **dict.fromkeys(("--help", "-h", "--hydra-help", "--version", "--resolve"), False),
    **dict.fromkeys(("--multirun", "-m", "--run", "-r", "--shell-completion", "-sc", "--info", "-i"), False),
    **dict.fromkeys(("--cfg", "-c", "--package", "-p"), True),
    **dict.fromkeys(("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn"), True),
}
INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
ALLOW_TARGET = "--allow-target"


class Arguments(NamedTuple):
    """A command line, sorted."""

    verb: str
    overrides: list[str]
    flags: list[str]  # with their values
    targets: list[str]  # classes that the user allows by --allow-target


def parse(argv: Sequence[str]) -> Arguments:
    """Sort `[verb] overrides… flags…`. Raises UsageError for an unknown verb or flag, or a stray word.

    Hydra 1.3 refuses overrides on both sides of a flag, and `--info` swallows an override that follows it: so flags go
    last. For a verb other than `run` what is neither flag nor `--allow-target` is kept as it is, in `overrides`.
    """
    words = list(argv)
    verb = words.pop(0) if words and re.fullmatch(r"[A-Za-z][\w-]*", words[0]) else "run"
    if verb not in VERBS:
        raise UsageError(
            f"{verb}: no such verb.{nearest(verb, VERBS)} Verbs: {', '.join(VERBS)}; settings look like key=value."
        )
    overrides: list[str] = []
    flags: list[str] = []
    targets: list[str] = []
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if name == ALLOW_TARGET:
            targets.append(value if equals else _value(name, words))
        elif verb != "run":
            overrides.append(word)
        elif word.startswith("-"):
            flags.append(word)
            if name not in FLAGS:
                raise UsageError(f"{name}: no such flag.{nearest(name, [*FLAGS, ALLOW_TARGET])} `--help` shows them.")
            if FLAGS[name] and not equals:
                flags.append(_value(name, words))
            elif name in ("--info", "-i") and words and words[0] in INFO:
                flags.append(words.pop(0))
        elif "=" in word or word.startswith("~"):
            overrides.append(word)
        else:
            raise UsageError(
                f"{word}: neither key=value nor a flag; a text with spaces needs quotes around it:"
                ' sampling.prompt="a red cat".'
            )
    return Arguments(verb, overrides, flags, targets)


def _value(flag: str, words: list[str]) -> str:
    if not words:
        raise UsageError(f"{flag}: needs a value.")
    return words.pop(0)
