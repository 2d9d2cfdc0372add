"""What a checkpoint's JSON files say, from its folder or, where it has not been downloaded, from what was published."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hydrarun.errors import UsageError
from hydrarun.fit import read
from hydrarun.memory.hub import local_folder, snapshot
from hydrarun.resources import folder

#: files of a component that say how it is built
FILES = ("config.json", "scheduler_config.json")


@dataclass(frozen=True)
class Configs:
    """The JSON of a checkpoint's components."""

    #: where tokenizers and weights are too; None: nothing was downloaded
    folder: Path | None
    #: model_index.json
    index: dict[str, Any]
    #: {component: config}
    components: dict[str, dict[str, Any]]
    #: where this comes from, for the user
    said: str

    def entry(self, name: str) -> tuple[str, str]:
        """The library and the class of a component."""
        library, cls = self.index[name]
        return library, cls

    def cls(self, name: str) -> Any:
        """The class of a component, imported."""
        library, cls = self.entry(name)
        return getattr(importlib.import_module(library), cls)


def find(model: dict[str, Any]) -> Configs:
    """Of the folder or the hub's local cache, else the published ones. Raises `UsageError` where there are neither."""
    path = local_folder(model["path"], model["revision"]) or snapshot(model["path"], model["revision"])
    if path is not None:
        return of_folder(path)
    name = model["facts"].get("shapes")
    if name is None:
        raise UsageError(
            f"model.path={model['path']}: not downloaded, and model {model['name']} has no published shapes here"
            " (model.facts.shapes): download it, or give a folder: model.path=/folder/in/diffusers/layout"
        )
    return known(name)


def of_folder(path: Path) -> Configs:
    """Raises `UsageError` for a folder without an index."""
    index = read(path / "model_index.json")
    if not index:
        raise UsageError(f"{path / 'model_index.json'}: not the index of a diffusers pipeline")
    names = [name for name, value in index.items() if isinstance(value, list) and value[0]]
    found = {name: read(path / name / file) for name in names for file in FILES if (path / name / file).is_file()}
    return Configs(path, index, found, str(path))


def known(name: str) -> Configs:
    """The shapes of that name in `hydrarun/models/shapes`, over those that they say they are `like`."""
    content = load(name)
    index = content.pop("model_index")
    return Configs(None, index, content, "published shapes: not downloaded")


def load(name: str) -> dict[str, dict[str, Any]]:
    """`{component: config}` and the `model_index`."""
    content = yaml.safe_load((folder("hydrarun") / "models" / "shapes" / f"{name}.yaml").read_text())
    like = content.pop("like", None)
    base = load(like) if like else {}
    return base | {key: base.get(key, {}) | value for key, value in content.items()}
