"""Parses the command line before Hydra does: the verb, its flags and all other words, in any order."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from hydrarun.core.errors import UsageError, suggest_name

HELP = {"--help": False, "-h": False}

# Hydra's flags and three of our own; True if the flag takes a value. --experimental-rerun is left out because it reads
# a pickle.
RUN_FLAGS = {
    **HELP,
    **dict.fromkeys(("--dry-run", "--fail-fast", "--version"), False),
    **dict.fromkeys(("--hydra-help", "--resolve"), False),
    **dict.fromkeys(("--multirun", "-m", "--run", "-r", "--shell-completion", "-sc", "--info", "-i"), False),
    **dict.fromkeys(("--cfg", "-c", "--package", "-p"), True),
    **dict.fromkeys(("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn"), True),
}
INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
ALLOW_TARGET = "--allow-target"
CONFIG_DIR = ("--config-dir", "-cd")


class Verb(NamedTuple):
    """A verb of the command line."""

    #: `module.function` in `hydrarun.cli.commands`; the function takes `Arguments` and returns the exit code
    function: str
    #: the accepted flags; True if the flag takes a value
    flags: Mapping[str, bool] = HELP
    #: whether every word that is not a flag must be `key=value` or `~key`
    settings_only: bool = False


VERBS = {
    "run": Verb("run.run_command", RUN_FLAGS, settings_only=True),
    "plan": Verb("plan.show_plan", {**HELP, "--json": False}, settings_only=True),
    "replay": Verb("replay.replay_file"),
    "report": Verb("report.write_report", {**HELP, "--reference": True}),
    "recipe": Verb("recipe.show_usage"),
    "recipe list": Verb("recipe.list_recipes", {**HELP, "--json": False}),
    "recipe run": Verb("recipe.run_recipe", {**HELP, "--yes": False}),
    "recipe export": Verb("recipe.export_recipe"),
    "recipe verify": Verb("recipe.verify_recipe"),
    "recipe schema": Verb("recipe.print_schema"),
    "calibrate": Verb("calibrate.calibrate_cache", settings_only=True),
    "list": Verb("list.list_tables", {**HELP, "--markdown": False}),
}


class Arguments(NamedTuple):
    """A parsed command line."""

    verb: str
    words: list[str]  # overrides, files, names
    flags: list[str]  # followed by their values
    targets: list[str]  # classes that the user allows with --allow-target


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Split `[verb] words… flags…`. Raises UsageError for an unknown verb or flag, or a stray word.

    Flags are kept apart so that Hydra gets them last: Hydra 1.3 refuses overrides on both sides of a flag, and `--info`
    consumes an override that follows it.
    """
    rest = list(argv)
    verb = _take_verb(rest)
    takes = VERBS[verb]
    words: list[str] = []
    flags: list[str] = []
    targets: list[str] = []
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if name == ALLOW_TARGET:
            targets.append(value if equals else _take_value(name, rest))
        elif word.startswith("-"):
            flags.append(word)
            if name not in takes.flags:
                raise UsageError(_describe_unknown_flag(verb, name))
            if takes.flags[name] and not equals:
                flags.append(_take_value(name, rest))
            elif name in ("--info", "-i") and rest and rest[0] in INFO:
                flags.append(rest.pop(0))
        elif takes.settings_only and "=" not in word and not word.startswith("~"):
            raise UsageError(
                f"{_format_prefix(verb)}{word}: neither key=value nor a flag; a text with spaces needs quotes around"
                ' it: sampling.prompt="a red cat".'
            )
        else:
            words.append(word)
    return Arguments(verb, words, flags, targets)


def _take_verb(rest: list[str]) -> str:
    """Remove the verb from the words and return it; `run` if there is none."""
    if not (rest and re.fullmatch(r"[A-Za-z][\w-]*", rest[0])):
        return "run"
    verb = rest.pop(0)
    main_verbs = [one for one in VERBS if " " not in one]
    if verb not in main_verbs:
        known = f"{suggest_name(verb, main_verbs)} Verbs: {', '.join(main_verbs)}"
        raise UsageError(f"{verb}: no such verb.{known}; settings look like key=value.")
    inner = [one.partition(" ")[2] for one in VERBS if one.startswith(f"{verb} ")]
    if not inner or not rest or rest[0].startswith("-"):
        return verb
    second = rest.pop(0)
    if second not in inner:
        raise UsageError(f"{verb} {second}: no such verb.{suggest_name(second, inner)} Verbs: {', '.join(inner)}.")
    return f"{verb} {second}"


def _describe_unknown_flag(verb: str, name: str) -> str:
    if verb == "run":
        return f"{name}: no such flag.{suggest_name(name, [*RUN_FLAGS, ALLOW_TARGET])} `--help` shows them."
    own = [flag for flag in VERBS[verb].flags if flag not in HELP]
    hint = " A folder of your own options: 'hydra.searchpath=[file:///folder]'" if name in CONFIG_DIR else ""
    return f"{_format_prefix(verb)}{name}: no such flag; it takes {' and '.join(own) or 'none but --help'}.{hint}"


def _format_prefix(verb: str) -> str:
    return "" if verb == "run" else f"{verb}: "


def _take_value(flag: str, rest: list[str]) -> str:
    if not rest:
        raise UsageError(f"{flag}: needs a value.")
    return rest.pop(0)
