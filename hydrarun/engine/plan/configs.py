"""What a checkpoint's JSON files say, from its folder or, where it has not been downloaded, from what was published."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hydrarun.config.checks.checkpoint import read_json
from hydrarun.config.hub import find_cached_snapshot, find_local_folder
from hydrarun.core.errors import UsageError
from hydrarun.core.resources import PACKAGE
from hydrarun.pipeline.components import LIBRARIES, find_component_class, find_components

#: what was published of checkpoints, one file each
SHAPES = PACKAGE / "models" / "shapes"
#: files of a component that say how it is built
FILES = ("config.json", "scheduler_config.json")


@dataclass
class ComponentConfigs:
    """The JSON of a checkpoint's components."""

    #: where tokenizers and weights are too; None: nothing was downloaded
    folder: Path | None
    #: model_index.json
    index: dict[str, Any]
    #: {component: config}
    components: dict[str, dict[str, Any]]
    #: where this comes from, for the user
    said: str

    def __post_init__(self) -> None:
        """The components that there are, by name: what else is in an index are settings."""
        self.entries = find_components(self.index)

    def cls(self, name: str) -> Any:
        """The class of a component, imported. Raises `UsageError` for one that is not loaded."""
        library, called = self.entries[name]
        found = find_component_class(library, called) if library in LIBRARIES else None
        if found is None:
            raise UsageError(f"{self.said}: {name} is of {library}'s class {called}, which is not loaded here")
        return found

    def config(self, name: str) -> dict[str, Any]:
        """The config of a component. Raises `UsageError` if it is not there."""
        if not self.components.get(name):
            raise UsageError(f"{self.said}: there is no {name}/config.json, which a plan reads, or it is damaged")
        return self.components[name]


def find_configs(model: dict[str, Any]) -> ComponentConfigs:
    """Of the folder or the hub's local cache, else the published ones. Raises `UsageError` where there are neither."""
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
    """Raises `UsageError` for a folder without an index."""
    index = read_json(path / "model_index.json")
    if not index:
        raise UsageError(f"{path / 'model_index.json'}: not the index of a diffusers pipeline")
    found = ComponentConfigs(path, index, {}, str(path))
    found.components = {
        name: read_json(path / name / file)
        for name in found.entries
        for file in FILES
        if (path / name / file).is_file()
    }
    return found


def read_known_shapes(name: str) -> ComponentConfigs:
    """The shapes of that name in `hydrarun/models/shapes`, over those that they say they are `like`."""
    content = load_shapes(name)
    index = content.pop("model_index")
    return ComponentConfigs(None, index, content, "published shapes: not downloaded")


def load_shapes(name: str) -> dict[str, dict[str, Any]]:
    """`{component: config}` and the `model_index`."""
    content = yaml.safe_load((SHAPES / f"{name}.yaml").read_text())
    like = content.pop("like", None)
    base = load_shapes(like) if like else {}
    return base | {key: base.get(key, {}) | value for key, value in content.items()}
