"""The house rule: whatever is not `conf/model` or `hydrarun/models` knows no model."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import hydrarun
from hydrarun.core import resources

PACKAGE = Path(hydrarun.__file__).parent
MODULES = sorted(file for file in PACKAGE.rglob("*.py") if file.parent.name != "models")
#: the families that are there: the modules' names, and the first word of the options'
FAMILIES = {file.stem.split("_")[0] for file in (PACKAGE / "models").glob("[a-z]*.py")}
# the list of what may be built has to name it; the demo model's judge is about the demo model
MAY_NAME = {"targets.py", "judge.py", "scenes.py"}


def named(text: str) -> list[str]:
    """Families that are named: as words, or as the start of CamelCase (`wanted` is none)."""
    words = "|".join(sorted(FAMILIES))
    camel = "|".join(family.capitalize() for family in sorted(FAMILIES))
    return [match[0] for match in re.finditer(rf"(?<![A-Za-z])(?:{words})(?![a-z])|(?:{camel})(?![a-z])", text)]


def code(file: Path) -> str:
    """A module without its docstrings and comments, which may give a source."""
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


def test_a_family_is_one_module_of_at_most_400_lines():
    for file in (PACKAGE / "models").glob("*.py"):
        assert len(file.read_text(encoding="utf-8").splitlines()) <= 400, file.name


def test_a_model_option_is_data():
    """No option brings code of its own beside its family's module: every target is on the shared list."""
    from hydrarun.config.targets import ALLOWED

    for file in (resources.folder("conf") / "model").glob("*.yaml"):
        for target in re.findall(r"_target_: (\S+)", file.read_text(encoding="utf-8")):
            assert target in ALLOWED, (file.name, target)
