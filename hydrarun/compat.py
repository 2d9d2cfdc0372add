"""What goes together: a table of rules over a configuration, checked before weights are read.

Each rule says what it is about, when it is broken, in a sentence, and the override that fixes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from hydrarun.errors import UsageError

Config = Mapping[str, Any]


class Rule(NamedTuple):
    """`broken(config)` tells whether the rule is; `sentence` may name values of the configuration in `{model}`."""

    group: str
    broken: Callable[[Config], bool]
    sentence: str
    fix: str


def uses(config: Config, group: str, name: str) -> bool:
    """Whether the option of `group` is the class `name`."""
    return str(config[group].get("_target_", "")).rpartition(".")[2] == name


RULES = (
    Rule(
        "offload",
        lambda config: uses(config, "offload", "ExpertOffload") and config["model"]["experts"] < 2,
        "model {model} has one transformer: there is no expert to swap",
        "offload=none",
    ),
    Rule(
        "offload",
        lambda config: uses(config, "offload", "ExpertOffload") and config["device"] == "cpu",
        "on device=cpu the host is the device: there is nothing to offload to",
        "offload=none",
    ),
)


def violations(config: Config) -> Iterator[Rule]:
    """The rules that are broken."""
    return (rule for rule in RULES if rule.broken(config))


def check(config: Config) -> None:
    """Raise `UsageError` with one line for each broken rule."""
    name = config["model"]["name"]
    lines = [f"{rule.group}: {rule.sentence.format(model=name)}. Use {rule.fix}." for rule in violations(config)]
    if lines:
        raise UsageError("\n".join(lines))
