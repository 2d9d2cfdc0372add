"""Project rules: only `conf/model`, `hydrarun/models` and the stages of a family name a model; files are short."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import hydrarun

PACKAGE = Path(hydrarun.__file__).parent
ROOT = PACKAGE.parent
#: file names of the model families; the contract and the experts are not families
OF_FAMILIES = {file.name for file in (PACKAGE / "models").glob("[a-z]*.py")} - {"transformer.py", "experts.py"}
#: the files of the families: transformers and stages
OWN = {PACKAGE / folder / name for folder in ("models", "pipeline/stages") for name in OF_FAMILIES}
MODULES = sorted(file for file in PACKAGE.rglob("*.py") if file not in OWN)
#: names of the families: the first word of each module name
FAMILIES = {name.removesuffix(".py").split("_")[0] for name in OF_FAMILIES}
# the judge of the demo model may name it
MAY_NAME = {"scene_judge.py", "scenes.py"}


def named(text: str) -> list[str]:
    """Return the families named in a text: as words or as the start of CamelCase (`wanted` does not count)."""
    words = "|".join(sorted(FAMILIES))
    camel = "|".join(family.capitalize() for family in sorted(FAMILIES))
    return [match[0] for match in re.finditer(rf"(?<![A-Za-z])(?:{words})(?![a-z])|(?:{camel})(?![a-z])", text)]


def code(file: Path) -> str:
    """Return the code of a module without docstrings and comments, which may cite a source."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            body[0].value.value = ""
    return ast.unparse(tree)


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_model_is_named(file):
    if file.name in MAY_NAME:
        return
    assert named(code(file)) == []


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_nothing_branches_on_the_models_name(file):
    assert not re.search(r"model(_name|\.name)? (==|!=|in|not in) |\['name'\] (==|!=|in|not in) ", code(file))


def test_the_rule_can_fail():
    assert {"qwen", "flux", "wan"} <= FAMILIES
    assert named("if x: FluxTransformer() or 'wan22_t2v' and QWEN and not wanted") == ["Flux", "wan"]
    assert set(named(code(PACKAGE / "models" / "wan.py"))) == {"Wan"}


@pytest.mark.parametrize("file", sorted(ROOT.glob("[btht]*/**/*.py")), ids=lambda file: str(file.relative_to(ROOT)))
def test_no_file_is_longer_than_400_lines(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_file_says_what_it_is_for(file):
    first = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split("\n")[0]
    assert len(first.split()) >= 3


def test_a_room_says_what_it_is_for():
    for folder in {file.parent for file in PACKAGE.rglob("*.py")}:
        doc = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
        assert doc, folder
        assert "\n" not in doc, folder
