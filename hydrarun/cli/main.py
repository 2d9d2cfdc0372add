"""The command: finds the verb, does it, and turns what goes wrong into an exit code."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence

from hydrarun.cli.arguments import HELP, VERBS, parse_arguments
from hydrarun.config import targets
from hydrarun.core.errors import report_error
from hydrarun.engine.ranks import launch


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
            return get_exit_code(lambda: dispatch_verb(words))
        finally:
            launch.close_executor()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def get_exit_code(action: Callable[[], int]) -> int:
    """The code that `action` returns, or that of its exception, which is printed."""
    try:
        return action()
    except Exception as error:
        return report_error(error)


def dispatch_verb(argv: Sequence[str]) -> int:
    """Do what the command line's verb says; its module is imported only now. Returns the exit code."""
    line = parse_arguments(argv)
    for name in line.targets:
        targets.allow_target(name)
    module_name, _, function = VERBS[line.verb].function.partition(".")
    module = importlib.import_module(f"hydrarun.cli.commands.{module_name}")
    if line.verb != "run" and HELP.keys() & set(line.flags):
        print(module.USAGE)
        return 0
    return getattr(module, function)(line)
