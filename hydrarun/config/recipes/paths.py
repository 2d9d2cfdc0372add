"""Files that a recipe names: only files in its own folder, by relative paths."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import Any

from hydrarun.config import prompts
from hydrarun.config.hub import HUB_ID, PACKAGE
from hydrarun.config.recipes.yaml_loader import RecipeError
from hydrarun.core.errors import UsageError

OWN = "a recipe reads only files in its own folder"


def locate_files(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return `content` with absolute paths of the files it names in `folder`, the recipe's own. Raises RecipeError."""
    given, model = content.get("input"), content.get("model")
    if isinstance(given, dict):
        own = {key: READERS[key](value, folder) if key in READERS else value for key, value in given.items()}
        content = {**content, "input": own}
    if isinstance(model, dict) and isinstance(model.get("path"), str):
        content = {**content, "model": {**model, "path": locate_weights(model["path"], folder)}}
    return content


def resolve_inside(key: str, name: str, folder: Path) -> Path:
    """Return the absolute path of a file or folder in `folder`. Raises RecipeError, with the reason, for any other."""
    path = PurePosixPath(name)
    if name.startswith("~"):
        raise RecipeError(f"{key}: '{name}' is in a home folder; {OWN}.")
    if path.is_absolute():
        raise RecipeError(f"{key}: '{name}' is an absolute path; {OWN}: write it relative to that.")
    if ".." in path.parts:
        raise RecipeError(f"{key}: '{name}' climbs by '..'; {OWN}.")
    if not _is_within(folder / path, folder):
        raise RecipeError(f"{key}: '{name}' is a link that leaves the recipe's folder; {OWN}.")
    return folder / path


def locate_weights(path: str, folder: Path) -> str:
    """Return `model.path`: shipped weights or a hub repository unchanged, a folder next to the recipe as absolute path.

    Raises RecipeError for a path outside the recipe's folder.
    """
    if path.startswith(PACKAGE):
        return path
    if HUB_ID.fullmatch(path) and not {".", ".."} & set(path.split("/")) and not os.path.lexists(folder / path):
        if os.path.lexists(path):
            raise RecipeError(
                f"model.path: '{path}' is a repository of the hub, but a folder of that name is here and would be"
                " used instead: run it from another folder."
            )
        return path
    own = resolve_inside("model.path", path, folder)
    links = (Path(root, name) for root, folders, files in os.walk(own) for name in (*folders, *files))
    for link in links:
        if link.is_symlink() and not _is_within(link, folder):
            raise RecipeError(
                f"model.path: '{link.relative_to(folder)}' is a link that leaves the recipe's folder; {OWN}."
            )
    return str(own)


def _locate_images(value: Any, folder: Path) -> Any:
    if isinstance(value, list):
        return [_locate_images(one, folder) for one in value]
    return str(resolve_inside("input.images", value, folder)) if isinstance(value, str) else value


def _locate_prompts(value: Any, folder: Path) -> str | None:
    """Return the absolute path of a prompts file. The images that its lines name must be in the folder too."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise RecipeError("input.prompts: is not the path of a file; a few texts go into sampling.prompt.")
    path = resolve_inside("input.prompts", value, folder)
    try:
        lines = prompts.read_prompts(str(path))
    except UsageError as error:
        raise RecipeError("; ".join(str(error).splitlines())) from None
    for line in lines:
        for image in line.get("images") or ():
            if not _is_within(Path(image), folder):
                raise RecipeError(f"{value} line {line[prompts.LINE]}: '{image}' is not in the recipe's folder; {OWN}.")
    return str(path)


READERS = {"images": _locate_images, "prompts": _locate_prompts}


def _is_within(path: Path, folder: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
