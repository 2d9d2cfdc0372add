"""The verb `run`: a run, a sweep, or the output of Hydra's flags. Heavy packages are imported only by a run."""

from __future__ import annotations

import io
import os
import re
import textwrap
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

import yaml
from hydra.types import RunMode

from hydrarun.cli.arguments import Arguments
from hydrarun.config import batches
from hydrarun.config.compose import check_composed, compose_unchecked, split_composed
from hydrarun.config.hydra_errors import translate_errors
from hydrarun.config.hydra_main import load_configuration, run_job, run_with_hydra, set_run_folder, set_run_mode
from hydrarun.core.errors import UsageError
from hydrarun.core.files import resolve_path
from hydrarun.core.printable import make_printable_lines
from hydrarun.core.quoting import quote_overrides
from hydrarun.core.version import __version__
from hydrarun.engine.ranks import launch
from hydrarun.outputs.failure_record import record_failure
from hydrarun.outputs.provenance import hash_config

DRY_RUN = "--dry-run"
FAIL_FAST = "--fail-fast"

#: flags that make Hydra print something instead of running
SHOWING = {"--help", "-h", "--hydra-help", "--cfg", "-c", "--info", "-i", "--shell-completion", "-sc"}


def run_command(line: Arguments) -> int:
    """Execute the verb `run`, the default verb."""
    return run_overrides(quote_overrides(line.words), line.flags)


def run_overrides(overrides: list[str], flags: list[str]) -> int:
    """Compose and run; flags select a sweep, the configuration, help or shell completion. Return the exit code."""
    if "--version" in flags:
        print(f"hydrarun {__version__}")
        return 0
    if sorted(flags) == ["--cfg", "--resolve", "job"]:
        # Hydra's own printing treats a literal `${` in a prompt as an interpolation
        config, _ = compose_unchecked(overrides)
        print(format_config(config), end="")
        return 0
    if DRY_RUN in flags:
        from hydrarun.cli.sweep import dry_run

        return dry_run.list_points(overrides, [flag for flag in flags if flag != DRY_RUN])
    fail_fast, flags = FAIL_FAST in flags, [flag for flag in flags if flag != FAIL_FAST]
    if is_sweep(flags):
        from hydrarun.cli.sweep import driver

        return driver.run_sweep(overrides, flags, fail_fast)
    overrides = [*overrides, "fail_fast=true"] if fail_fast else overrides
    if {"-sc", "--shell-completion"} & set(flags):
        return complete_line(overrides, flags)
    if {"-h", "--help"} & set(flags):
        return show_help(overrides, flags)
    if {flag.partition("=")[0] for flag in flags} & SHOWING:
        return run_hydra_flags(overrides, flags)
    return run_once(overrides, flags)


def run_once(overrides: list[str], flags: list[str]) -> int:
    """Compose, check and run; return the exit code. Raises UsageError before an output directory is created."""
    loader, composed = load_configuration(overrides, flags)
    if composed.hydra.mode is RunMode.MULTIRUN:  # set by `hydra.mode`
        from hydrarun.cli.sweep import driver

        return driver.run_sweep(overrides, [*flags, "-m"], fail_fast=False)
    set_run_mode(composed)
    with translate_errors(overrides):
        composed_config, origin = split_composed(composed, composed.hydra)
    config = check_composed(composed_config, origin)
    launch.check_rank_count(config)
    if folder := choose_resume_dir(composed_config, overrides):
        set_run_folder(composed, folder)

    def task(output_dir: Path) -> None:
        with record_failure(composed_config, output_dir):
            origin.print_notes(config)
            launch.run_configuration(config, output_dir)

    run_job(task, composed, loader, batches.is_batch_run(config))
    return 0


def format_config(config: dict[str, Any]) -> str:
    """Format a configuration as YAML. If a terminal must not get one of its characters, ASCII alone is used."""
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=1000)
    if make_printable_lines(text) == text:
        return text
    return yaml.safe_dump(config, sort_keys=False, width=1000)


def is_sweep(flags: list[str]) -> bool:
    """Return whether the flags ask for a sweep that runs, and not for printing or completion."""
    return bool({"-m", "--multirun"} & set(flags)) and not {flag.partition("=")[0] for flag in flags} & SHOWING


def choose_resume_dir(config: dict[str, Any], overrides: list[str]) -> str | None:
    """Return the default output folder of an `input.prompts` run: always the same one, so that the run is resumed."""
    file = config["input"]["prompts"]
    if not isinstance(file, str) or any(override.startswith("hydra.run.dir=") for override in overrides):
        return None
    path = resolve_path(file)
    digest = hash_config({**config, "input": {**config["input"], "prompts": str(path)}})
    return f"outputs/{path.stem}-{digest}"


def run_hydra_flags(overrides: list[str], flags: list[str]) -> int:
    """Let Hydra print what its flags ask for, without a run."""
    run_with_hydra(lambda _: None, overrides, flags)
    return 0


def show_help(overrides: list[str], flags: list[str]) -> int:
    """Print Hydra's help page. Hydra puts all options of a group into one line, so long lines are wrapped."""
    page = io.StringIO()
    with redirect_stdout(page), suppress(SystemExit):
        run_hydra_flags(overrides, flags)
    for line in page.getvalue().splitlines():
        indent = " " * (len(line) - len(line.lstrip()) + 2)
        print(textwrap.fill(line, 118, subsequent_indent=indent, break_on_hyphens=False) if len(line) > 118 else line)
    return 0


def complete_line(overrides: list[str], flags: list[str]) -> int:
    """Print shell completions. Ignores mistakes, because the command line is incomplete."""
    # Hydra completes overrides and would take the verb for one
    line = os.environ.get("COMP_LINE", "")
    os.environ["COMP_LINE"] = re.sub(r"^(\s*\S+\s+)run\s", r"\1", line)
    with suppress(UsageError):
        run_hydra_flags(overrides, flags)
    return 0
