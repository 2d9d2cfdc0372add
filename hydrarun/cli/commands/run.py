"""The command: verbs, and the way from a command line through Hydra to a run. Nothing heavy before a run starts."""

from __future__ import annotations

import io
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from hydrarun import __version__
from hydrarun.cli import arguments
from hydrarun.config import targets
from hydrarun.config.compose import check, compose_raw, plain, register, split
from hydrarun.config.hydra_errors import explained
from hydrarun.core import resources
from hydrarun.core.errors import RunError, UsageError
from hydrarun.core.quoting import literal
from hydrarun.engine.ranks import launch as ranks
from hydrarun.outputs.failure_record import recorded
from hydrarun.outputs.provenance import config_hash

DRY_RUN = "--dry-run"
FAIL_FAST = "--fail-fast"

#: flags with which Hydra runs nothing
SHOWING = {"--help", "-h", "--hydra-help", "--cfg", "-c", "--info", "-i", "--shell-completion", "-sc"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (sys.argv by default); returns the exit code.

    0 done; 1 the run failed (in a sweep: a point of it); 2 the user's mistake; 130 Ctrl-C. An exception that nobody
    foresaw is printed with its traceback and counts as 1.
    """
    # Hydra would print some exceptions itself and exit; with this set it raises them all.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
            return exit_code(lambda: dispatch(words))
        finally:
            ranks.close()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def exit_code(action: Callable[[], int]) -> int:
    """The code that `action` returns, or that of its exception, which is printed."""
    try:
        return action()
    except Exception as error:
        return tell(error)


def tell(error: Exception) -> int:
    """Print an exception, with its traceback if nobody foresaw it; returns its exit code."""
    if not isinstance(error, (UsageError, RunError)):
        traceback.print_exception(error)
        return 1
    print(error, file=sys.stderr)
    return 2 if isinstance(error, UsageError) else 1


def dispatch(argv: Sequence[str]) -> int:
    """Hand the command line to its verb."""
    line = arguments.parse(argv)
    for name in line.targets:
        targets.allow(name)
    if line.verb == "list":
        from hydrarun.cli.commands import list as listing

        return listing.main(line.overrides)
    if line.verb == "replay":
        from hydrarun.cli.commands import replay

        return replay.main(line.overrides)
    if line.verb == "recipe":
        from hydrarun.cli.commands import recipe

        return recipe.main(line.overrides)
    if line.verb == "plan":
        from hydrarun.cli.commands import plan as command

        return command.main(line.overrides)
    if line.verb == "report":
        from hydrarun.cli.commands import report

        return report.main(line.overrides)
    if line.verb == "calibrate":
        from hydrarun.cli.commands import calibrate

        return calibrate.main(line.overrides)
    return run(literal(line.overrides), line.flags)


def run(overrides: list[str], flags: list[str]) -> int:
    """Compose and run; or, by a flag, sweep, show the configuration, help, complete."""
    if "--version" in flags:
        print(f"hydrarun {__version__}")
        return 0
    if sorted(flags) == ["--cfg", "--resolve", "job"]:
        # Hydra's own printing reads a literal `${` in a prompt as an interpolation.
        config, _ = compose_raw(overrides)
        yaml.safe_dump(config, sys.stdout, sort_keys=False, allow_unicode=True, width=1000)
        return 0
    if DRY_RUN in flags:
        from hydrarun.cli.sweep import dry_run

        return dry_run.main(overrides, [flag for flag in flags if flag != DRY_RUN])
    fail_fast, flags = FAIL_FAST in flags, [flag for flag in flags if flag != FAIL_FAST]
    if is_sweep(flags):
        from hydrarun.cli.sweep import driver

        return driver.run(overrides, flags, fail_fast)
    overrides = [*overrides, "fail_fast=true"] if fail_fast else overrides
    if not flags:  # before Hydra makes the output directory
        config, origin = compose_raw(overrides)
        ranks.check_size(check(config, origin)["parallel"])
        overrides = [*overrides, *own_place(config, overrides)]
    if {"-sc", "--shell-completion"} & set(flags):
        return complete(overrides, flags)
    if {"-h", "--help"} & set(flags):
        return show_help(overrides, flags)
    return launch(overrides, flags)


def is_sweep(flags: list[str]) -> bool:
    """Whether points are run, not shown or completed."""
    return bool({"-m", "--multirun"} & set(flags)) and not {flag.partition("=")[0] for flag in flags} & SHOWING


def launch(overrides: list[str], flags: list[str]) -> int:
    """Let Hydra do what the flags say; returns the exit code of the run, if it made one."""
    codes = [0]

    def task(composed: DictConfig) -> None:
        try:
            run_point(composed)
        except Exception as error:
            codes.append(tell(error))

    hand_over(task, overrides, flags)
    return codes[-1]


def hand_over(task: Callable[[DictConfig], Any], overrides: list[str], flags: list[str]) -> None:
    """Have Hydra call `task` with each configuration that it composes, in the output directory it makes for it."""
    register(overrides)
    decorate = hydra.main(version_base="1.3", config_path=str(resources.folder("conf")), config_name="config")
    try:
        with explained(overrides), _command_line([*overrides, *flags]):
            decorate(task)()
    except OSError as error:  # of Hydra's own writing; what goes wrong in a run has become its exit code
        raise UsageError(f"cannot write the output directory: {error}; choose another: hydra.run.dir=…") from error


def own_place(config: dict[str, Any], overrides: list[str]) -> list[str]:
    """Where a run of `input.prompts` goes if nothing else is said: always to the same place, so that it is resumed."""
    file = config["input"]["prompts"]
    if not isinstance(file, str) or any(override.startswith("hydra.run.dir=") for override in overrides):
        return []
    path = Path(file).expanduser().resolve()
    digest = config_hash({**config, "input": {**config["input"], "prompts": str(path)}})
    return literal([f"hydra.run.dir=outputs/{path.stem}-{digest}"])


def show_help(overrides: list[str], flags: list[str]) -> int:
    """Hydra's help page; its lists of options are one line each, however many there are."""
    page = io.StringIO()
    with redirect_stdout(page), suppress(SystemExit):
        launch(overrides, flags)
    for line in page.getvalue().splitlines():
        indent = " " * (len(line) - len(line.lstrip()) + 2)
        print(textwrap.fill(line, 118, subsequent_indent=indent, break_on_hyphens=False) if len(line) > 118 else line)
    return 0


def complete(overrides: list[str], flags: list[str]) -> int:
    """Answer the shell. The line is half typed, so mistakes in it are no errors."""
    # Hydra completes overrides; it would read the verb as one
    line = os.environ.get("COMP_LINE", "")
    os.environ["COMP_LINE"] = re.sub(r"^(\s*\S+\s+)run\s", r"\1", line)
    with suppress(UsageError):
        launch(overrides, flags)
    return 0


def run_point(composed: DictConfig) -> dict[str, Any]:
    """One run, or one point of a sweep, in the output directory that Hydra made for it; returns run.json."""
    settings = HydraConfig.get()
    folder = Path(settings.runtime.output_dir)
    if settings.mode is RunMode.MULTIRUN:
        print(f"[{settings.job.num}] {' '.join(settings.overrides.task)}", file=sys.stderr)
    with recorded(plain(composed), folder):
        config, origin = split(composed, settings)
        config = check(config, origin)
        for note in origin.notes(config):
            print(note, file=sys.stderr)
        return ranks.run(config, folder)


@contextmanager
def _command_line(words: list[str]) -> Iterator[None]:
    """Hydra reads sys.argv."""
    before = sys.argv
    sys.argv = [before[0], *words]
    try:
        yield
    finally:
        sys.argv = before
