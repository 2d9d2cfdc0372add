"""What every shipped model and recipe resolves to is on record in tests/golden."""

import importlib.util
from pathlib import Path

import pytest

from hydrarun.cli.commands import list as listing
from tests.helpers.paths import ROOT

FOLDER = Path(__file__).parent


def load_update():
    spec = importlib.util.spec_from_file_location("golden_update", FOLDER / "update.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CONTENTS = load_update().golden()


@pytest.mark.parametrize("name", CONTENTS)
def test_the_record_is_current(name):
    assert (FOLDER / name).read_text(encoding="utf-8") == CONTENTS[name], "run `make golden` and look at the diff"


def test_nothing_is_recorded_that_is_not_shipped():
    assert {file.name for file in FOLDER.glob("*.yaml")} == set(CONTENTS)


def test_the_tables_of_readme_and_of_models_are_current(listed):
    for file, text in load_update().pages().items():
        assert file.read_text(encoding="utf-8") == text, "run `make golden` and look at the diff"


def test_a_family_is_a_check_mark_or_says_what_is_missing():
    update = load_update()
    methods = dict.fromkeys(listing.METHODS, "yes")
    assert update.family_parallel(methods) == "✓"
    assert update.family_parallel({**methods, "cfg": "a > 1", "vae": "-", "ring": "-"}) == "no ring, vae; cfg if a > 1"
    assert update.family_group("compile", "blocks, full") == update.family_group("cache", "all") == "✓"
    assert update.family_group("compile", "blocks") == "only blocks"
    assert update.family_group("cache", "all but teacache, mask") == "no teacache, mask"


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
