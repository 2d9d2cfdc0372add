"""The JSON schema of recipes for editors, generated from hydrarun.config.schema and the comments in conf/."""

from __future__ import annotations

import dataclasses
import json
import re
import types
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from hydrarun.config.recipes import metadata
from hydrarun.config.recipes.vet import COMMAND_LINE_ONLY
from hydrarun.config.schema import Config
from hydrarun.core import resources
from hydrarun.core.resources import list_groups

Schema = dict[str, Any]

PLAIN = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}

#: sections that hold a `_target_` node from the options of a group
NODES = ("scheduler", "cache", "attention", "compile", "quantization", "offload")

FIELD = re.compile(r"^( *)(?:- )?([A-Za-z_]\w*):")


def format_schema() -> str:
    """Return the text of recipes/schema.json."""
    return json.dumps(make_schema(), indent=2, ensure_ascii=False) + "\n"


def make_schema() -> Schema:
    """Build the JSON schema (draft 7) of a recipe."""
    properties = {
        "about": make_class_schema(metadata.About, "about"),
        "defaults": make_defaults_schema(),
        **make_class_schema(Config, "")["properties"],
    }
    evidence = {"type": "object", "description": "Written by `hydrarun recipe verify`, never by hand."}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "hydrarun recipe",
        "description": "Choices and values that are used as recipe=NAME or recipe=FILE.yaml: docs/recipes.md.",
        "type": "object",
        "properties": {**properties, "evidence": evidence},
        "additionalProperties": False,
    }


def make_defaults_schema() -> Schema:
    """Build the schema of the list `defaults`."""
    entries = [{"const": "_self_"}, *(make_choice_schema(group) for group in list_groups())]
    return {"type": "array", "items": {"anyOf": entries}, "description": "Options of groups: `hydrarun list`."}


def make_choice_schema(group: str) -> Schema:
    """Build the schema of an entry of `defaults`: one option of a group."""
    names = sorted(file.stem for file in (resources.find_folder("conf") / group).glob("*.yaml"))
    key = f"override /{group}"
    return {
        "type": "object",
        "properties": {key: {"enum": names}},
        "required": [key],
        "additionalProperties": False,
    }


def make_class_schema(kind: Any, path: str) -> Schema:
    """Build the schema of a section from its dataclass. No key is required: a recipe sets only what differs."""
    properties = {}
    for name, hint in typing.get_type_hints(kind).items():
        here = f"{path}.{name}" if path else name
        if here in COMMAND_LINE_ONLY:
            continue
        if here in NODES:
            properties[name] = make_group_schema(name)
        elif dataclasses.is_dataclass(hint):
            properties[name] = make_class_schema(hint, here)
        else:
            properties[name] = make_hint_schema(hint) | describe_field(here)
    return {"type": "object", "properties": properties, "additionalProperties": False}


def make_group_schema(group: str) -> Schema:
    """Build the schema of a `_target_` node: the arguments of all options, with any value.

    The run checks which arguments can be combined.
    """
    properties: Schema = {}
    root = resources.find_folder("conf") / group
    for file in sorted(root.rglob("*.yaml")):
        inner = file.parent.relative_to(root).parts  # options of the predictor are in cache/predictor
        for key, text in sorted(read_comments(file).items()):
            node = properties
            *above, name = (*inner, *key.split("."))
            for part in above:
                node = node.setdefault(part, {"type": "object"}).setdefault("properties", {})
            if name not in ("_target_", "defaults") and f"{group}.{key}" not in COMMAND_LINE_ONLY:
                node.setdefault(name, {}).setdefault("description", text)
    return {"type": "object", "properties": properties}


def make_hint_schema(hint: Any) -> Schema:
    """Build the schema of a type annotation."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return {"type": [PLAIN[one] for one in inner]}
    if origin is list:
        return {"type": "array", "items": make_hint_schema(inner[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": make_hint_schema(inner[1])}
    return {"type": PLAIN[hint]} if hint in PLAIN else {}


def describe_field(path: str) -> Schema:
    """Return the description of a field in conf/, if there is one."""
    text = read_descriptions().get(path)
    return {"description": text} if text else {}


@cache
def read_descriptions() -> dict[str, str]:
    """Read the comment of each field of the fixed sections."""
    conf = resources.find_folder("conf")
    default = conf / "model" / f"{resources.read_defaults()['model']}.yaml"
    base = yaml.safe_load(default.read_text(encoding="utf-8"))["defaults"][0]  # the base option has the comments
    found = read_comments(conf / "config.yaml") | read_comments(default.with_stem(base))
    found |= {f"plan.{key}": text for key, text in read_comments(conf / "plan" / "none.yaml").items()}
    return (
        found
        | dict(read_listed_fields(conf / "sampling" / "default.yaml"))
        | dict(read_listed_fields(conf / "parallel" / "none.yaml"))
    )


def read_listed_fields(file: Path) -> Iterator[tuple[str, str]]:
    """Yield the fields that an option describes in a list at its head: `#   name, name   description`."""
    for names, text in re.findall(r"^#   ([\w, ]+?)  +(\S.*)$", file.read_text(encoding="utf-8"), re.MULTILINE):
        yield from ((f"{file.parent.name}.{name}", text) for name in names.split(", "))


def read_comments(file: Path) -> dict[str, str]:
    """Read the comment above each field of a YAML file, by the path of the field."""
    found: dict[str, str] = {}
    above: list[tuple[int, str]] = []  # indent and name of the enclosing fields
    said: list[str] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if match := FIELD.match(line):
            indent = len(match[1])
            above = [*((depth, name) for depth, name in above if depth < indent), (indent, match[2])]
            if said:
                found[".".join(name for _, name in above)] = " ".join(said)
        said = [*said, line.strip(" #")] if line.strip().startswith("#") else []
    return found
