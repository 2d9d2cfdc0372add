"""What is written from the code: the resolved configuration of every model and recipe, the tables of README.md and
docs/models.md, and the JSON schema of recipes.

A diff shows what a change gives users.
`make golden` rewrites the files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

from hydrarun.cli.commands import list as listing
from hydrarun.cli.recipe import json_schema
from hydrarun.config.compose import compose_unchecked
from hydrarun.config.recipes import search
from hydrarun.core import resources
from hydrarun.core.tables import Table, format_markdown
from tests.helpers.paths import ROOT

HERE = Path(__file__).resolve().parent
MODELS_MARK, END_MARK = "<!-- hydrarun list models --markdown -->\n", "<!-- end -->\n"
CHECK = "✓"


def golden() -> dict[str, str]:
    """File names and their content; a required value that a model leaves open is `???`."""
    models = sorted(file.stem for file in (resources.find_folder("conf") / "model").glob("*.yaml"))
    cases = {f"model-{name}": f"model={name}" for name in models}
    cases |= {f"recipe-{name.replace('/', '-')}": f"recipe={name}" for name in search.list_recipe_names()}
    return {f"{name}.yaml": _yaml(override) for name, override in cases.items()}


def pages() -> dict[Path, str]:
    """README.md and docs/models.md with the tables between their marks as the code has them."""
    tables = {
        (ROOT / "README.md", "<!-- make golden -->\n"): format_markdown(families()).partition("\n\n")[2],
        (ROOT / "docs" / "models.md", MODELS_MARK): format_markdown(listing.make_table("models")),
    }
    return {file: replace_table(file, mark, table) for (file, mark), table in tables.items()}


def replace_table(file: Path, mark: str, table: str) -> str:
    """The file's text with `table` between `mark` and the next end mark."""
    before, start, rest = file.read_text(encoding="utf-8").partition(mark)
    _, end, after = rest.partition(END_MARK)
    if not (start and end):
        raise ValueError(f"{file.name} has lost the marks around its table")
    return before + start + table + "\n\n" + end + after


def families() -> Table:
    """The short form of `hydrarun list accelerations`: one column for each family."""
    details = listing.make_table("accelerations")
    tasks = {row[0]: row[1] for row in listing.make_table("models").rows}
    rows = []
    for cells in details.rows:
        row = dict(zip(details.header, cells, strict=True))
        parallel = family_parallel({method: row[method] for method in listing.METHODS})
        others = (family_group(group, row[group]) for group in listing.ACCELERATIONS)
        rows.append((cells[0], tasks[cells[0]], parallel, *others))
    return Table("families", ("model=", "task", "parallel", *listing.ACCELERATIONS), rows)


def family_parallel(methods: Mapping[str, str]) -> str:
    """A check mark, or the methods that are missing or need something."""
    missing = [name for name, answer in methods.items() if answer == "-"]
    words = [f"no {', '.join(missing)}"] if missing else []
    words += [f"{name} if {answer}" for name, answer in methods.items() if answer not in ("yes", "-")]
    return "; ".join(words) or CHECK


def family_group(group: str, answer: str) -> str:
    """A check mark for all options of a group, or the options that are missing, or the few that there are."""
    every = sorted(file.stem for file in (resources.find_folder("conf") / group).glob("*.yaml") if file.stem != "none")
    if answer in ("all", ", ".join(every)):
        return CHECK
    return answer.replace("all but", "no") if answer.startswith("all but ") else f"only {answer}"


def _yaml(override: str) -> str:
    config, _ = compose_unchecked([override])
    head = f"# hydrarun --cfg job --resolve {override}\n"
    return head + yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=1000)


if __name__ == "__main__":
    contents = golden()
    for stale in {file.name for file in HERE.glob("*.yaml")} - contents.keys():
        (HERE / stale).unlink()
    for name, text in contents.items():
        (HERE / name).write_text(text, encoding="utf-8")
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
    (resources.find_folder("recipes") / "schema.json").write_text(json_schema.format_schema(), encoding="utf-8")
    print(f"{len(contents)} files in {HERE}")
