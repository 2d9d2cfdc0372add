"""`hydrarun recipe`: list, run, export and verify recipes, and the schema for editors."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from hydrarun.cli.arguments import Arguments
from hydrarun.core.errors import UsageError
from hydrarun.core.files import find_file_problem
from hydrarun.core.tables import print_tables

USAGE = """\
usage: hydrarun recipe list [hydra.searchpath=[DIR]] [--json]
       hydrarun recipe run FILE|DIR [KEY=VALUE ...] [--yes]
       hydrarun recipe export RUN_DIR [FILE.yaml]
       hydrarun recipe verify FILE|NAME [model.path=...] [hydra.run.dir=DIR]
       hydrarun recipe schema

list     lists the shipped recipes, and those of collections
run      runs a recipe from somebody else: shows what it will do and asks first; --yes skips the question
export   writes the recipe of a finished run: the settings that differ from the defaults, and its results as evidence
verify   runs a recipe, compares pixels, times and quality with its evidence, and writes the result into the file. A
         recipe without evidence is run twice to create it. Exit code: 0 verified, 1 not verified, 2 cannot be run
schema   prints the JSON schema with which editors check and complete recipes
See docs/recipes.md."""


def show_usage(line: Arguments) -> int:
    """Print the usage for `hydrarun recipe` without a verb."""
    print(USAGE)
    return 2


def list_recipes(line: Arguments) -> int:
    """List the named recipes: shipped ones and those of collections."""
    from hydrarun.cli.commands.list import make_table
    from hydrarun.config.recipes import catalogue, search

    if strange := [word for word in line.words if not word.startswith(f"{search.SEARCHPATH}=")]:
        raise UsageError(f"recipe list: {strange[0]}: it takes {search.SEARCHPATH}=[DIR] and --json.")
    search.set_collections(line.words)
    if "--json" in line.flags:
        print(json.dumps([asdict(entry) for entry in catalogue.list_entries()], indent=2))
    else:
        print_tables([make_table("recipes")])
    return 0


def run_recipe(line: Arguments) -> int:
    """Show what an untrusted recipe does, ask for consent, and run it like `recipe=FILE`."""
    from hydrarun.cli.commands.run import run_overrides
    from hydrarun.cli.recipe.preview import describe_recipe, quote_recipe
    from hydrarun.config.compose import check_composed, compose_unchecked
    from hydrarun.config.recipes import search
    from hydrarun.core.quoting import quote_overrides

    (name,) = _take_names(line, 1, 1)
    file = str(find_recipe_file(Path(name)))
    overrides = [quote_recipe(file), *quote_overrides(_take_settings(line))]
    config, origin = compose_unchecked(overrides)
    config = check_composed(config, origin)
    for text in describe_recipe(search.load_recipe(file), file, config, describe_destination(overrides)):
        print(text, file=sys.stderr)
    if "--yes" not in line.flags:
        if not sys.stdin.isatty():
            raise UsageError("recipe run: add --yes to run it; there is no terminal to ask on.")
        if not ask_consent():
            print("not run", file=sys.stderr)
            return 1
    return run_overrides(overrides, [])


def find_recipe_file(path: Path) -> Path:
    """Return the recipe file for a file, or a folder with a single recipe. Raises UsageError."""
    if os.path.isdir(path):
        found = sorted(path.glob("*.yaml"))
        if len(found) != 1:
            listed = f": {', '.join(one.name for one in found)}; give the path of one" if found else ""
            raise UsageError(f"recipe run: {path} holds {len(found) or 'no'} files that end in .yaml{listed}.")
        (path,) = found
        if path.is_symlink():
            raise UsageError(f"recipe run: {path} is a link; give the path of the file itself.")
    if path.suffix != ".yaml" or not os.path.lexists(path):
        raise UsageError(f"recipe run: {path}: not a file that ends in .yaml, nor a folder that holds one.")
    if problem := find_file_problem(path):
        raise UsageError(f"recipe run: {path}: {problem}.")
    return path.absolute()


def describe_destination(overrides: Sequence[str]) -> str:
    """Return the output folder, as far as it is known before the run."""
    given = [override.partition("=")[2] for override in overrides if override.startswith("hydra.run.dir=")]
    return given[-1] if given else os.path.join(os.getcwd(), "outputs/…")


def ask_consent() -> bool:
    """Ask the user on the terminal; return whether the answer is yes."""
    print("run this? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def export_recipe(line: Arguments) -> int:
    """Write the recipe of a finished run."""
    from hydrarun.cli.recipe.export import export_run

    run_dir, *file = (Path(word) for word in _take_names(line, 1, 2))
    export_run(run_dir, file[0] if file else run_dir / "recipe.yaml")
    return 0


def verify_recipe(line: Arguments) -> int:
    """Run a recipe and compare it with its evidence."""
    from hydrarun.cli.recipe.verify import verify_evidence

    (name,) = _take_names(line, 1, 1)
    return verify_evidence(name, _take_settings(line))


def print_schema(line: Arguments) -> int:
    """Print the JSON schema of recipes."""
    from hydrarun.cli.recipe.json_schema import format_schema

    if line.words:
        raise UsageError(f"recipe schema: {line.words[0]}: it takes no arguments.")
    print(format_schema(), end="")
    return 0


def _take_names(line: Arguments, least: int, most: int) -> list[str]:
    """Return the words that are files, folders or names. Raises UsageError for a wrong count."""
    names = [word for word in line.words if _is_name(word)]
    if not least <= len(names) <= most:
        wanted = "one file" if most == 1 else "a folder, and a file to write"
        raise UsageError(f"{line.verb} takes {wanted}.", *USAGE.splitlines())
    return names


def _take_settings(line: Arguments) -> list[str]:
    """Return the words that are `key=value`."""
    return [word for word in line.words if not _is_name(word)]


def _is_name(word: str) -> bool:
    return "=" not in word or os.path.exists(word)
