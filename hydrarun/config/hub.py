"""Resolves `model.path` to a folder: shipped weights, a local folder, or a repository of the Hugging Face hub."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydrarun.config.checks.checkpoint import read_json
from hydrarun.core.errors import RunError, UsageError, suggest_name
from hydrarun.core.files import expand_home
from hydrarun.core.printable import find_raw_stream
from hydrarun.core.resources import find_folder
from hydrarun.models.weights.checksums import SETTINGS

PACKAGE = "package:"
HUB_ID = re.compile(r"(?=.{3,96}$)\w[\w.-]*/\w[\w.-]*")
#: files to download; weights only from component folders, because some repositories also store them as a single file
FILES = ["*/*.safetensors", *SETTINGS]


@dataclass(frozen=True)
class WeightsSource:
    """The folder of the weights, and their hub commit (None for a local folder)."""

    folder: Path
    revision: str | None


def find_local_folder(path: str, revision: str | None) -> Path | None:
    """Return the local folder that `path` names, or None if it is a hub id.

    Raises `UsageError` if it is neither, or if a local folder is given with a revision.
    """
    found = find_named_folder(path)
    if found is not None and revision is not None:
        raise UsageError(f"model.revision={revision} has no effect on a local folder ({path}); drop it")
    return found


def find_named_folder(path: str) -> Path | None:
    """Return the local folder that `path` names, or None if it is a hub id; ignores the revision."""
    if path.startswith(PACKAGE):
        name = path.removeprefix(PACKAGE)
        shipped = find_folder("weights")
        if "/" in name or not (shipped / name / "model_index.json").is_file():
            names = sorted(p.parent.name for p in shipped.glob("*/model_index.json"))
            raise UsageError(
                f"model.path={path}: the package ships no weights of that name.{suggest_name(name, names)}"
                f" It has: {', '.join(names)}"
            )
        return shipped / name
    expanded = expand_home(path)
    if os.path.isdir(expanded):
        if not os.path.lexists(expanded / "model_index.json"):
            raise UsageError(
                f"model.path={path}: not a checkpoint in diffusers layout, there is no model_index.json in it"
            )
        return expanded
    if os.path.lexists(expanded):
        raise UsageError(f"model.path={path}: a single file; give the folder that holds model_index.json")
    if HUB_ID.fullmatch(path):
        return None
    siblings: list[str] = []
    with suppress(OSError):
        siblings = os.listdir(expanded.parent)
    raise UsageError(
        f"model.path={path}: no such folder.{suggest_name(expanded.name, siblings)}"
        " Give a folder in diffusers layout, or a hub id like owner/name"
    )


def find_cached_snapshot(repository: str, revision: str | None) -> Path | None:
    """Return the folder of a repository in the hub's local cache, or None. Downloads nothing."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, "model_index.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def resolve_weights(model: dict[str, Any]) -> WeightsSource:
    """Return the folder of `model.path`. Downloads a hub id that is not in the cache.

    Raises `UsageError` for an invalid path, `RunError` if the download fails.
    """
    path, revision = model["path"], model["revision"]
    found = find_local_folder(path, revision)
    return download_snapshot(path, revision) if found is None else WeightsSource(found, None)


def download_snapshot(repository: str, revision: str | None) -> WeightsSource:
    """Return the hub's snapshot, downloading what the local cache lacks; a complete cache works offline too."""
    from huggingface_hub import snapshot_download

    with translate_hub_errors(repository, revision):
        snapshot = Path(snapshot_download(repository, revision=revision, allow_patterns=FILES))
    return WeightsSource(snapshot, snapshot.name)


def read_hub_json(repository: str, revision: str | None, name: str) -> dict[str, Any]:
    """Return a JSON file of a hub repository, downloading it if the local cache lacks it. Raises as for a snapshot."""
    from huggingface_hub import hf_hub_download

    with translate_hub_errors(repository, revision):
        file = hf_hub_download(repository, name, revision=revision)
    return read_json(Path(file))


@contextmanager
def translate_hub_errors(repository: str, revision: str | None) -> Iterator[None]:
    """Turn the hub's errors into one-line ones: `UsageError` for an invalid id, else `RunError`."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    where = f"model.path={repository}" + (f" model.revision={revision}" if revision else "")
    try:
        with redirect_stderr(find_raw_stream(sys.stderr)):  # its bars move the cursor
            yield
    except RepositoryNotFoundError:
        raise RunError(
            f"{where}: the hub has no such repository or revision, or it needs `hf auth login`."
            " A local folder is given as ./name or by its full path"
        ) from None
    except HFValidationError as error:
        raise UsageError(f"{where}: {str(error).splitlines()[0]}") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        state = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        raise RunError(
            f"{where}: not in the local cache, and {state} ({type(error).__name__})."
            " Download it where there is a network, or give a folder: model.path=/folder/in/diffusers/layout"
        ) from None
