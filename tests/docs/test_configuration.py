"""The commands that --help and docs/configuration.md show can be typed."""

import re
import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from hydrarun.cli import arguments
from hydrarun.cli.commands import list as listing
from hydrarun.config.compose import check_composed, compose_unchecked
from hydrarun.config.recipes import search
from hydrarun.core import resources
from hydrarun.core.quoting import quote_overrides
from tests.helpers.paths import ROOT

DOCS = [ROOT / "docs" / "configuration.md", ROOT / "docs" / "sweeps.md"]
PAGES = [*DOCS, resources.find_folder("conf") / "hydra" / "help" / "hydrarun.yaml"]


def commands() -> list[str]:
    """Lines that start with `hydrarun`, without the synopses, and those that need an extra (`hydra/…=`)."""
    lines = [line.strip() for page in PAGES for line in page.read_text(encoding="utf-8").splitlines()]
    found = [
        line
        for line in lines
        if re.match(r"hydrarun($| )", line) and not re.search(r"…|\.\.\.|runs diffusion|hydra/", line)
    ]
    assert len(found) >= 8
    return found


@pytest.mark.parametrize("line", commands())
def test_a_shown_command_can_be_typed(line):
    words = arguments.parse_arguments(shlex.split(line, comments=True)[1:])
    overrides = quote_overrides(words.words)
    if "-m" in words.flags:
        parsed = OverridesParser.create().parse_overrides(overrides)
        assert any(override.is_sweep_override() for override in parsed)
        overrides = [line.input_line for line in parsed if not line.is_sweep_override()]
    config, origin = compose_unchecked(overrides)
    if "/data/" in line:  # a folder of the reader's
        config["model"]["path"] = "Qwen/Qwen-Image"
    check_composed(config, origin)


def test_the_tables_of_groups_are_complete():
    text = PAGES[0].read_text(encoding="utf-8")
    for group in ["model", "recipe", *listing.list_table_names()[2:-1]]:
        assert f"| `{group}` |" in text


def test_the_recipe_that_is_shown_is_the_one_that_is_shipped():
    shipped = (resources.find_folder("recipes") / "demo" / "quick.yaml").read_text(encoding="utf-8")
    assert shipped.partition("\n# written by")[0] in (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")


def test_every_shipped_recipe_is_told():
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in search.list_recipe_names())
