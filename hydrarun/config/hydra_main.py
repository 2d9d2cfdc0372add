"""Calls Hydra: composition, output directories, and its help, sweeps and shell completion."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra import version
from hydra._internal.callbacks import Callbacks
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core import utils
from hydra.core.config_search_path import SearchPathQuery
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf

from hydrarun.config import schema
from hydrarun.config.hydra_errors import translate_errors
from hydrarun.config.model_choice import choose_model
from hydrarun.config.recipes import search
from hydrarun.core import resources
from hydrarun.core.errors import UsageError
from hydrarun.core.files import find_file_problem
from hydrarun.core.flags import flag_value
from hydrarun.outputs.run_folder import claim_run_folder

CONFIG = "config"

#: files that Hydra and a run write into their folder
WRITTEN = ("run.json", ".hydra/config.yaml", ".hydra/hydra.yaml", ".hydra/overrides.yaml")


def load_configuration(
    overrides: Sequence[str], flags: Sequence[str] = (), mode: RunMode = RunMode.RUN
) -> tuple[ConfigLoaderImpl, DictConfig]:
    """Compose quoted overrides (`core.quoting.quote_overrides`) with Hydra, including its own node `hydra`.

    Of Hydra's `flags`, uses those that set the config name and folders. A checkpoint without a `model=` gets its own
    (`model_choice.choose_model`). Raises UsageError.
    """
    overrides = choose_model(overrides)
    version.setbase("1.3")
    utils.setup_globals()
    register_configs(overrides)
    with translate_errors(overrides):
        loader = ConfigLoaderImpl(build_search_path(flags))
        name = flag_value(flags, "--config-name", "-cn") or CONFIG
        return loader, loader.load_configuration(name, list(overrides), mode)


def register_configs(overrides: Sequence[str]) -> None:
    """Register the schema and the recipes with Hydra, including recipes of collections that the overrides name."""
    schema.register_schema()
    search.register_recipe_source()
    search.set_collections(overrides)


def build_search_path(flags: Sequence[str]) -> Any:
    """Build Hydra's search path for options."""
    path = create_config_search_path(flag_value(flags, "--config-path", "-cp") or str(resources.find_folder("conf")))
    if folder := flag_value(flags, "--config-dir", "-cd"):
        if not os.path.isdir(folder):
            raise UsageError(f"--config-dir {folder}: no such folder")
        path.prepend("command-line", f"file://{os.path.abspath(folder)}", SearchPathQuery(provider="schema"))
    return path


def run_job(task: Callable[[Path], Any], composed: DictConfig, loader: ConfigLoaderImpl, resumes: bool) -> Any:
    """Create the output directory of a composed run with Hydra, and return the result of `task(directory)`.

    Nobody else draws into the directory meanwhile. `resumes`: whether the run continues what a ledger there records.
    Raises what `task` raises, and UsageError for a directory that cannot be written or holds another run.
    """
    folder = Path(composed.hydra.run.dir)
    check_written_files("hydra.run.dir", folder)
    callbacks = Callbacks(composed)
    callbacks.on_run_start(config=composed, config_name=CONFIG)
    with claim_run_folder(folder, resumes), translate_write_errors():
        done = utils.run_job(
            lambda _: task(Path(composed.hydra.runtime.output_dir)),
            composed,
            job_dir_key="hydra.run.dir",
            job_subdir_key=None,
            hydra_context=HydraContext(loader, callbacks),
        )
    callbacks.on_run_end(config=composed, config_name=CONFIG, job_return=done)
    if done.status is utils.JobStatus.FAILED:
        raise done._return_value  # `return_value` would print an extra line
    return done.return_value


def check_written_files(key: str, folder: Path) -> None:
    """Raise UsageError if a file that a run writes exists in its folder and is no regular file: a pipe would block."""
    for name in WRITTEN:
        if os.path.lexists(folder / name) and (problem := find_file_problem(folder / name)):
            raise UsageError(f"{key}={folder}: {name} in it: {problem}; choose another folder")


def run_with_hydra(task: Callable[[DictConfig], Any], overrides: list[str], flags: list[str]) -> None:
    """Run Hydra with its flags. In a sweep it calls `task` with each configuration, in the directory of that point.

    Raises UsageError.
    """
    overrides = choose_model(overrides)
    register_configs(overrides)
    decorate = hydra.main(version_base="1.3", config_path=str(resources.find_folder("conf")), config_name=CONFIG)
    with translate_write_errors(), translate_errors(overrides), replace_argv([*overrides, *flags]):
        decorate(task)()


def set_run_mode(composed: DictConfig) -> None:
    """Set Hydra's mode to a single run, as Hydra itself does."""
    if composed.hydra.mode is None:
        OmegaConf.update(composed, "hydra.mode", RunMode.RUN)
        composed.hydra.overrides.hydra.append("hydra.mode=RUN")


def set_run_folder(composed: DictConfig, folder: str) -> None:
    """Set the output directory to `folder`, whatever the configuration contains."""
    OmegaConf.update(composed, "hydra.run.dir", folder.replace("${", "\\${"))


@contextmanager
def translate_write_errors() -> Iterator[None]:
    """Turn Hydra's OSError into a UsageError: the user can choose another folder. Errors of a run are not affected."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"cannot write the output directory: {error}; choose another: hydra.run.dir=…") from error


@contextmanager
def replace_argv(words: list[str]) -> Iterator[None]:
    """Replace the arguments in sys.argv, which Hydra reads."""
    before = sys.argv
    sys.argv = [before[0], *words]
    try:
        yield
    finally:
        sys.argv = before
