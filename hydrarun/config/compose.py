"""Composes overrides into one plain, complete, checked configuration: for the command, the Python API and replay."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from hydrarun.config import batches
from hydrarun.config.checks.checkpoint import check_folder_fit
from hydrarun.config.checks.components import check_component_files
from hydrarun.config.checks.configuration import check_configuration
from hydrarun.config.checks.notes import find_notes
from hydrarun.config.hub import find_local_folder
from hydrarun.config.hydra_errors import describe_option_list, translate_errors
from hydrarun.config.hydra_main import load_configuration
from hydrarun.config.model_choice import find_class_problem
from hydrarun.config.recipes import search
from hydrarun.core.errors import UsageError, raise_mistakes
from hydrarun.core.inputs import image_paths
from hydrarun.core.moved_names import use_current_names
from hydrarun.core.printable import make_printable
from hydrarun.core.quoting import quote_overrides
from hydrarun.core.resources import list_groups


def compose_config(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the resolved and validated configuration that `hydrarun OVERRIDES…` runs. Raises UsageError."""
    return check_composed(*compose_unchecked(quote_overrides(overrides)))


def compose_unchecked(overrides: Sequence[str]) -> tuple[dict[str, Any], ConfigOrigin]:
    """Return the resolved, unchecked configuration of overrides from `quote_overrides`. Missing values are `???`."""
    _, composed = load_configuration(overrides)
    with translate_errors(overrides):
        return split_composed(composed, composed.hydra)


def split_composed(composed: DictConfig, hydra_node: DictConfig) -> tuple[dict[str, Any], ConfigOrigin]:
    """Return the composed configuration without Hydra's node, as plain data, and the origin of its values."""
    config = to_plain_config(composed)
    overrides = tuple(OmegaConf.to_container(hydra_node.overrides.task))
    for override in overrides:
        group, _, option = override.partition("=")
        if option.startswith("[") and group in list_groups():
            raise UsageError(describe_option_list(group, option))
    choices = hydra_node.runtime.choices
    return config, ConfigOrigin(overrides, choices.get("recipe", "none"), choices.get("model", "none"))


def to_plain_config(composed: DictConfig) -> dict[str, Any]:
    """Return the composed configuration without Hydra's node, resolved, as plain data, with current class names."""
    own = OmegaConf.masked_copy(composed, [key for key in composed if key != "hydra"])
    return use_current_names(OmegaConf.to_container(own, resolve=True))


def check_composed(config: dict[str, Any], origin: ConfigOrigin) -> dict[str, Any]:
    """Check a configuration; return it with the file `input.prompts` replaced by its lines.

    Raises UsageError that lists every violation.
    """
    setter = origin("sampling.prompt")
    if config["input"]["prompts"] is not None and not setter.startswith(("model", "default")):
        raise UsageError(f"sampling.prompt ({setter}) and input.prompts are both given: leave one out")
    config = batches.resolve_prompts(config)
    check_configuration(config, origin)
    if config["parallel"]["max_ranks"] is not None and not origin.is_override("parallel.max_ranks"):
        raise UsageError("parallel.max_ranks: set in the file of an option; only the command line may set it")
    folder = find_local_folder(config["model"]["path"], config["model"]["revision"])
    if folder is not None:  # a hub checkpoint is checked after its download
        check_component_files(folder)
        if problem := find_class_problem(config["model"], folder):
            raise UsageError(f"model.path={config['model']['path']}: {problem}")
        raise_mistakes(_find_line_refusals(config, lambda one: check_folder_fit(one, folder)))
    raise_mistakes(_find_line_refusals(config, _ImageReader()))
    return config


def _find_line_refusals(config: dict[str, Any], test: Callable[[dict[str, Any]], None]) -> Iterator[str]:
    """Yield the errors of `test`, with the line of `input.prompts` that causes each."""
    for line, one in batches.iterate_lines(config):
        try:
            test(one)
        except UsageError as error:
            yield f"line {line[batches.LINE]} of input.prompts: {error}" if line else str(error)


class _ImageReader:
    """Reads each input image once, to report unreadable files."""

    def __init__(self) -> None:
        self.read: set[str] = set()

    def __call__(self, config: dict[str, Any]) -> None:
        for path in image_paths(config):
            if path not in self.read:
                from hydrarun.outputs.media import images, kinds  # imports Pillow only here

                images.read_image(path, kinds.find_model_kind(config["model"]).alpha)
                self.read.add(path)


@dataclass(frozen=True)
class ConfigOrigin:
    """The origin of a configuration's values."""

    overrides: tuple[str, ...]
    recipe: str
    model: str

    def __call__(self, key: str) -> str:
        """Return what set `key`: "command line", "recipe demo/quick", "model demo" or "default"."""
        if self._on_command_line(key):
            return "command line"
        if _has_key(search.load_choices(self.recipe), key):
            return f"recipe {self.recipe}"
        return f"model {self.model}" if key.startswith(("model", "sampling")) else "default"

    def print_notes(self, config: dict[str, Any]) -> None:
        """Print the `notes` to stderr."""
        for note in self.notes(config):
            print(make_printable(note), file=sys.stderr)

    def notes(self, config: dict[str, Any]) -> list[str]:
        """Return notes for the user before the run: weights that a recipe loads, and settings without effect."""
        notes = []
        if self("model.path") == f"recipe {self.recipe}":
            notes.append(f"recipe {self.recipe} loads weights from {config['model']['path']}")
        setter = self("sampling.negative_prompt")
        return [*notes, *find_notes(config, not setter.startswith("model"), setter)]

    def is_override(self, key: str) -> bool:
        """Return whether an override sets exactly this key."""
        return key in self._list_keys()

    def _on_command_line(self, key: str) -> bool:
        return any(key == one or key.startswith((f"{one}.", f"{one}[")) for one in self._list_keys())

    def _list_keys(self) -> list[str]:
        return [override.lstrip("+").partition("=")[0] for override in self.overrides]


def _has_key(content: Any, key: str) -> bool:
    for part in key.split("[")[0].split("."):
        if not isinstance(content, dict) or part not in content:
            return False
        content = content[part]
    return True
