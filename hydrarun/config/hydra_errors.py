"""Turns exceptions of Hydra and OmegaConf into one line: key, origin, nearest name and allowed values."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException, ValidationError

from hydrarun.config.schema import Config
from hydrarun.config.type_check import describe_hint, format_value
from hydrarun.core.errors import UsageError, find_closest, suggest_name
from hydrarun.core.resources import list_groups

# Messages of plain ValueErrors that Hydra raises for mistakes on the command line (any other ValueError is a bug).
COMMAND_LINE_MISTAKES = (
    "Only one of --run",
    "The --resolve flag",
    "Expecting one subcommand",
    "No completion plugin",
)

#: options that an extra of this package installs
EXTRAS = {
    "hydra/launcher/ray": "ray",
    "hydra/launcher/submitit_local": "slurm",
    "hydra/launcher/submitit_slurm": "slurm",
    "hydra/sweeper/optuna": "optuna",
}


#: keys of the section that the group `scheduler` replaces
OLD_SCHEDULER = "model.scheduler."


@contextmanager
def translate_errors(overrides: Sequence[str]) -> Iterator[None]:
    """Turn exceptions raised while composing these overrides into a UsageError."""
    try:
        yield
    except (RecursionError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(_describe_yaml_error(error)) from error
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(explain_error(error, overrides)) from error
    except OverflowError as error:  # OmegaConf converts a whole number of over 308 digits
        raise UsageError(f"{_find_error_line(error, 'full_key') or 'configuration'}: a number is too large") from error
    except ValueError as error:
        if str(error).startswith("Config group override"):
            raise UsageError(_describe_non_option(overrides)) from error
        if str(error).startswith("Exceeds the limit"):  # of Python's conversion
            raise UsageError("configuration: a number of more than 4300 digits") from error
        if str(error).startswith(COMMAND_LINE_MISTAKES):
            raise UsageError(str(error)) from error
        raise
    except (AssertionError, AttributeError, TypeError) as error:
        if not _is_raised_by_hydra(error):
            raise
        raise UsageError(f"configuration: Hydra cannot read it: {error or type(error).__name__}") from error


def _is_raised_by_hydra(error: BaseException) -> bool:
    """Return whether the error is raised in Hydra or OmegaConf, as for nonsense in Hydra's own node."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").split(".")[0] in ("hydra", "omegaconf")


def _describe_yaml_error(error: Exception) -> str:
    """Describe an error of Hydra's own YAML reader, which reads options of `--config-dir` and `hydra.searchpath`."""
    if isinstance(error, RecursionError):
        return "an option or a value on the command line is nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return f"the file of an option is not UTF-8 text: {error.reason} at byte {error.start}"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"{error.problem_mark.name}, line {error.problem_mark.line + 1}: {error.problem}"
    return str(error).splitlines()[0]


def explain_error(error: Exception, overrides: Sequence[str]) -> str:
    """Return the message for the user, one line."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _describe_unknown_option(error, overrides)
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override}: not of the form key=value; a text with spaces needs the shell's quotes around it all."
        )
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__ or error.__context__
    if isinstance(cause, OmegaConfBaseException):
        return _describe_key_error(cause, _find_blamed_file(error) or "command line")
    return (
        _describe_missing_sweep(str(error))
        or _describe_nested_group(str(error), overrides)
        or str(error).splitlines()[0]
    )


def _describe_unknown_option(error: MissingConfigException, overrides: Sequence[str]) -> str:
    group, _, option = str(error.missing_cfg_file).removesuffix(".yaml").rpartition("/")
    if extra := EXTRAS.get(f"{group}/{option}"):
        return f"{group}={option}: is not installed: pip install 'hydrarun[{extra}]'"
    if not error.options:
        return str(error).splitlines()[0]
    chosen = [override for override in overrides if re.match(rf"\+?{group}=", override)]
    recipe = [override.partition("=")[2] for override in overrides if override.startswith("recipe=")]
    place = "command line" if chosen or not recipe else f"recipe {recipe[0]}"
    return (
        f"{group}={option} ({place}): no such option.{suggest_name(option, error.options)}"
        f" Options: {', '.join(sorted(error.options))}."
    )


def _describe_non_option(overrides: Sequence[str]) -> str:
    known = {"", "recipe", *list_groups()}
    for parsed in OverridesParser.create().parse_overrides(list(overrides)):
        if parsed.key_or_group in known and not isinstance(parsed.value(), (str, list)):
            return f"{parsed.input_line}: not the name of an option; `hydrarun list` shows them."
    return "a group has no name of an option; `hydrarun list` shows them."


def _describe_key_error(error: OmegaConfBaseException, place: str) -> str:
    """Describe an error at one key: unknown, or of the wrong type."""
    full_key = error.full_key or _find_error_line(error, "full_key")
    where = f"{full_key} ({place})"
    fields = _list_allowed_fields(error)
    if isinstance(error, ValidationError) and error.key in fields:
        return f"{where}: {format_value(error.value)} is not {_describe_wanted_type(fields[error.key])}."
    if full_key.startswith(OLD_SCHEDULER):
        return f"{where}: a section of older versions' files; use {full_key.removeprefix('model.')}=…"
    if " not in '" in str(error) or "is not in struct" in str(error):
        hint = _suggest_field(str(error.key), fields)
        return f"{where}: unknown key.{hint} Known: {', '.join(fields) or 'none'}."
    if "is not Optional" in str(error):
        return f"{where}: is empty (null): give it a value, or leave it out."
    return f"{where}: {str(error).splitlines()[0]}"


def _list_allowed_fields(error: OmegaConfBaseException) -> dict[str, Any]:
    """Return the allowed names in the key's section, with their types."""
    kind = error.object_type
    if kind is Config:
        return {**typing.get_type_hints(Config), "recipe": str}
    if dataclasses.is_dataclass(kind):
        return typing.get_type_hints(kind)
    node = error.parent_node
    names = node.keys() if isinstance(node, Mapping) else ()
    return {str(name): Any for name in names if not str(name).startswith("_")}


def _suggest_field(name: str, fields: Mapping[str, Any]) -> str:
    """Suggest the nearest field in the same section, or else in any: `sampling.prompt` for `prompt`."""
    at_top = "sampling" in fields
    match = None if at_top else find_closest(name, fields)
    if match is None:
        sections = {key: hint for key, hint in typing.get_type_hints(Config).items() if dataclasses.is_dataclass(hint)}
        dotted = {leaf: f"{key}.{leaf}" for key, hint in sections.items() for leaf in typing.get_type_hints(hint)}
        names = {**dotted, **{field: field for field in fields if at_top}}
        match = names.get(find_closest(name, names) or "")
    return f" Did you mean '{match}'?" if match else ""


def _describe_wanted_type(hint: Any) -> str:
    return (
        f"a section with {', '.join(typing.get_type_hints(hint))}"
        if dataclasses.is_dataclass(hint)
        else describe_hint(hint)
    )


def _describe_nested_group(text: str, overrides: Sequence[str]) -> str | None:
    """Describe errors of a group nested in another (cache/predictor), whose Hydra messages are unclear."""
    if "appears more than once in the final defaults list" in text:
        given = [override.partition("=") for override in overrides]
        lists = [(group, options) for group, _, options in given if group in list_groups() and options[:1] == "["]
        return describe_option_list(*lists[0]) if lists else None
    if match := re.match(r"Could not override '((\w+)/(\w+))'", text):
        hint = f"`hydrarun list {match[2]}` shows the others"
        return f"{match[1]}: the option of {match[2]} that is chosen has no {match[3]}; {hint}."
    return None


def describe_option_list(group: str, options: str) -> str:
    """Return the message for a list of options where one is allowed."""
    return f"{group}={options}: choose one option; to compare several: -m {group}={options.strip('[]')}"


def _find_blamed_file(error: Exception) -> str | None:
    """Return the file that Hydra's message names: "recipe NAME", or the option's path in conf/."""
    match = re.match(r"In '(recipe/)?([^']*)'", str(error))
    return match and (f"recipe {match[2]}" if match[1] else f"conf/{match[2]}.yaml")


def _find_error_line(error: Exception, name: str) -> str:
    """Return the value of the line `name: value` in the text of an OmegaConf error."""
    match = re.search(rf"^\s*{name}: (.*)$", str(error), re.MULTILINE)
    return match[1] if match else "configuration"


def _describe_missing_sweep(text: str) -> str | None:
    """Describe several values without -m; None for other errors."""
    match = re.match(r"(?:Ambiguous value for argument|Sweep parameters) '(.*?)'(?: requires|$)", text, re.MULTILINE)
    if not match:
        return None
    key, _, value = match[1].partition("=")
    if key in list_groups():
        return f"{match[1]}: several options: choose one, or add -m to run them all."
    return f"{match[1]}: several values: add -m to run them all, or write a list, {key}=[{value}]."
