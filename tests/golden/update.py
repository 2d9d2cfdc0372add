"""What is written from the code: the resolved configuration of every model and recipe, README's table of models,
and the JSON schema of recipes.

A diff shows what a change gives users.
`make golden` rewrites the files.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from hydrarun.cli.commands import list as listing
from hydrarun.cli.recipe import json_schema as editors
from hydrarun.config.compose import compose_raw
from hydrarun.config.recipes import search as source
from hydrarun.core import resources
from hydrarun.core.tables import format_markdown
from tests.helpers.paths import ROOT

HERE = Path(__file__).resolve().parent


def golden() -> dict[str, str]:
    """File names and their content; a required value that a model leaves open is `???`."""
    models = sorted(file.stem for file in (resources.folder("conf") / "model").glob("*.yaml"))
    cases = {f"model-{name}": f"model={name}" for name in models}
    cases |= {f"recipe-{name.replace('/', '-')}": f"recipe={name}" for name in source.names()}
    return {f"{name}.yaml": _yaml(override) for name, override in cases.items()}


def readme() -> tuple[Path, str]:
    """README.md with its table of models as the code has it: what `hydrarun list models --markdown` prints."""
    file = ROOT / "README.md"
    before, start, rest = file.read_text(encoding="utf-8").partition("<!-- hydrarun list models --markdown -->\n")
    _, end, after = rest.partition("<!-- end -->\n")
    if not (start and end):
        raise ValueError("README.md has lost the marks around its table of models")
    return file, before + start + format_markdown(listing.table("models")) + "\n\n" + end + after


def _yaml(override: str) -> str:
    config, _ = compose_raw([override])
    head = f"# hydrarun --cfg job --resolve {override}\n"
    return head + yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=1000)


if __name__ == "__main__":
    contents = golden()
    for stale in {file.name for file in HERE.glob("*.yaml")} - contents.keys():
        (HERE / stale).unlink()
    for name, text in contents.items():
        (HERE / name).write_text(text, encoding="utf-8")
    path, text = readme()
    path.write_text(text, encoding="utf-8")
    (resources.folder("recipes") / "schema.json").write_text(editors.schema_text(), encoding="utf-8")
    print(f"{len(contents)} files in {HERE}")
