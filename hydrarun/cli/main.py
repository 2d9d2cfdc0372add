"""The command `hydrarun`: runs the verb and turns exceptions into exit codes."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence

from hydrarun.cli.arguments import HELP, VERBS, parse_arguments
from hydrarun.config import targets
from hydrarun.core.errors import report_error
from hydrarun.core.interruption import get_interruption_code, interrupt_on_signals
from hydrarun.core.printable import printable_output
from hydrarun.engine.ranks import launch


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (default: sys.argv) and return the exit code.

    0: success; 1: the run, or a point of the sweep, failed; 2: the user's mistake; 130: Ctrl-C; 143: SIGTERM;
    129: SIGHUP. An unexpected exception is printed with its traceback and gives 1.
    """
    # makes Hydra raise all exceptions; without it Hydra prints some of them and exits
    os.environ["HYDRA_FULL_ERROR"] = "1"
    words = list(sys.argv[1:] if argv is None else argv)
    with printable_output():
        try:
            with interrupt_on_signals():
                try:
                    return get_exit_code(lambda: dispatch_verb(words))
                finally:
                    launch.close_executor()
        except KeyboardInterrupt as error:
            print("interrupted", file=sys.stderr)
            return get_interruption_code(error)


def get_exit_code(action: Callable[[], int]) -> int:
    """Run `action` and return its exit code; print an exception and return the code for it."""
    try:
        return action()
    except Exception as error:
        return report_error(error)


def dispatch_verb(argv: Sequence[str]) -> int:
    """Import the module of the verb, run the verb and return its exit code."""
    line = parse_arguments(argv)
    for name in line.targets:
        targets.allow_target(name)
    module_name, _, function = VERBS[line.verb].function.partition(".")
    module = importlib.import_module(f"hydrarun.cli.commands.{module_name}")
    if line.verb != "run" and HELP.keys() & set(line.flags):
        print(module.USAGE)
        return 0
    return getattr(module, function)(line)
