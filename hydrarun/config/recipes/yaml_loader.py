"""Reads and writes recipes as plain YAML, without aliases or repeated keys."""

from __future__ import annotations

import re
from typing import Any

import yaml

MAX_BYTES = 64 * 1024


class RecipeError(Exception):
    """The reason why a recipe is refused, as one sentence. The caller adds the recipe's name."""


def parse_sections(data: bytes) -> tuple[str, dict[str, Any]]:
    """Return the text of a recipe's file and its top-level sections. Raises RecipeError."""
    if len(data) > MAX_BYTES:
        raise RecipeError(f"larger than {MAX_BYTES // 1024} KiB, the limit for recipes.")
    try:
        text = data.decode()
        content = yaml.load(text, StrictLoader) if text else {}
    except UnicodeDecodeError:
        raise RecipeError("not UTF-8 text.") from None
    except RecursionError:
        raise RecipeError("nested too deeply.") from None
    except yaml.YAMLError as error:
        raise RecipeError(_describe_yaml_error(error)) from None
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise RecipeError("not a mapping of sections, such as `sampling: {num_inference_steps: 8}`.")
    return text, content


class StrictLoader(yaml.SafeLoader):
    """Loads plain YAML. Refuses aliases (they can expand to gigabytes) and repeated keys (the last one would win)."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="a recipe may not use aliases", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"'{key.value}' is set twice", problem_mark=key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


# Load a date as text and `1e-3` as a float, as OmegaConf does in the rest of the configuration.
StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
)


class StrictDumper(yaml.SafeDumper):
    """Writes YAML that `StrictLoader` reads back unchanged: quotes a text such as `1e3`."""


StrictDumper.yaml_implicit_resolvers = StrictLoader.yaml_implicit_resolvers


def dump_yaml(content: dict[str, Any]) -> str:
    """Format as YAML in the order of the keys, with each text on one line."""
    return yaml.dump(content, Dumper=StrictDumper, sort_keys=False, allow_unicode=True, width=1000)


def _describe_yaml_error(error: yaml.YAMLError) -> str:
    """Format a YAML error as one line: the line number and the problem."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"line {mark.line + 1}: {problem}" if mark else problem
