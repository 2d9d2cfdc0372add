"""Reads a checkpoint's JSON configs, from its folder or, if it is not downloaded, from the published shapes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydrarun.config.checks.checkpoint import read_json
from hydrarun.config.checks.components import check_component_files
from hydrarun.config.hub import find_cached_snapshot, find_local_folder
from hydrarun.config.model_choice import load_shapes
from hydrarun.core.errors import UsageError
from hydrarun.models.weights.safetensors import check_library_files
from hydrarun.pipeline.components import LIBRARIES, check_index, find_component_class, find_components

#: a component's config files
FILES = ("config.json", "scheduler_config.json")


@dataclass
class ComponentConfigs:
    """The JSON of a checkpoint's components."""

    #: the checkpoint's folder, with tokenizers and weights; None: not downloaded
    folder: Path | None
    #: model_index.json
    index: dict[str, Any]
    #: {component: config}
    components: dict[str, dict[str, Any]]
    #: the source of the configs, for messages
    said: str

    def __post_init__(self) -> None:
        """Find the components by name; the other entries of an index are settings."""
        self.entries = find_components(self.index)

    def cls(self, name: str) -> Any:
        """Import and return the class of a component. Raises `UsageError` if it is not supported."""
        library, called = self.entries[name]
        found = find_component_class(library, called) if library in LIBRARIES else None
        if found is None:
            raise UsageError(f"{self.said}: {name} is of {library}'s class {called}, which is not supported")
        return found

    def config(self, name: str) -> dict[str, Any]:
        """Return the config of a component. Raises `UsageError` if it is missing or damaged."""
        if not self.components.get(name):
            raise UsageError(f"{self.said}: there is no {name}/config.json, which a plan reads, or it is damaged")
        return self.components[name]


def find_configs(model: dict[str, Any]) -> ComponentConfigs:
    """Read the configs of the folder or the hub's cache, else the published ones. Raises `UsageError` if none exist."""
    path = find_local_folder(model["path"], model["revision"]) or find_cached_snapshot(model["path"], model["revision"])
    if path is not None:
        return read_folder_configs(path)
    name = model["facts"].get("shapes")
    if name is None:
        raise UsageError(
            f"model.path={model['path']}: not downloaded, and model {model['name']} has no published shapes here"
            " (model.facts.shapes): download it, or give a folder: model.path=/folder/in/diffusers/layout"
        )
    return read_known_shapes(name)


def read_folder_configs(path: Path) -> ComponentConfigs:
    """Read the configs of a checkpoint folder.

    Raises `UsageError` without an index and for what no plan may build, `RunError` for what is no plain file.
    """
    check_library_files(path)
    check_component_files(path)
    index = read_json(path / "model_index.json")
    if not index:
        raise UsageError(f"{path / 'model_index.json'}: not the index of a diffusers pipeline")
    check_index(path / "model_index.json", index)
    found = ComponentConfigs(path, index, {}, str(path))
    found.components = {
        name: read_json(path / name / file)
        for name in found.entries
        for file in FILES
        if (path / name / file).is_file()
    }
    return found


def read_known_shapes(name: str) -> ComponentConfigs:
    """Read the published shapes `name` of `hydrarun/models/shapes`."""
    content = load_shapes(name)
    index = content.pop("model_index")
    return ComponentConfigs(None, index, content, "published shapes: not downloaded")
