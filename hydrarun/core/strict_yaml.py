"""Plain YAML, without aliases, tags, repeated keys or deep nesting: for files that may come from a stranger."""

from __future__ import annotations

import re
from typing import Any

import yaml

from hydrarun.core.strict_json import MAX_DEPTH, TOO_DEEP, TOO_LONG

MAX_INTEGER = 2**64


class StrictLoader(yaml.SafeLoader):
    """Loads plain YAML.

    Refuses aliases (they can expand to gigabytes), explicit tags, repeated keys (the last one would win), and more than
    `MAX_DEPTH` levels.
    """

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="aliases are not allowed", problem_mark=event.start_mark)
        if event.tag is not None:
            raise yaml.MarkedYAMLError(problem="tags are not allowed", problem_mark=event.start_mark)
        self.depth += 1
        if self.depth > MAX_DEPTH + 1:  # the plain values in the deepest section count too
            raise yaml.MarkedYAMLError(problem=TOO_DEEP, problem_mark=event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"'{key.value}' is set twice", problem_mark=key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """Construct a number, of at most 64 bits if it is an integer."""
        convert = self.construct_yaml_int if node.tag.endswith(":int") else self.construct_yaml_float
        try:
            value = convert(node)
        except ValueError:  # 0x_ matches the pattern of integers, and Python limits the digits
            raise yaml.MarkedYAMLError(
                problem=f"{node.value[:40]!r}: not a number", problem_mark=node.start_mark
            ) from None
        if isinstance(value, int) and abs(value) >= MAX_INTEGER:
            raise yaml.MarkedYAMLError(problem=TOO_LONG, problem_mark=node.start_mark)
        return value


for kind in ("int", "float"):
    StrictLoader.add_constructor(f"tag:yaml.org,2002:{kind}", StrictLoader.construct_number)

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


def parse_yaml(data: str | bytes) -> Any:
    """Parse plain YAML. Raises `ValueError`, of one line with the line's number, for anything else."""
    try:
        return yaml.load(data if isinstance(data, str) else data.decode(), StrictLoader)
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None
    except RecursionError:  # the parser reads some nesting before a node is made of it
        raise ValueError(TOO_DEEP) from None
    except yaml.YAMLError as error:
        raise ValueError(_describe_yaml_error(error)) from None


def dump_yaml(content: dict[str, Any]) -> str:
    """Format as YAML in the order of the keys, with each text on one line."""
    return yaml.dump(content, Dumper=StrictDumper, sort_keys=False, allow_unicode=True, width=1000)


def _describe_yaml_error(error: yaml.YAMLError) -> str:
    """Format a YAML error as one line: the line number and the problem."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"line {mark.line + 1}: {problem}" if mark else problem
