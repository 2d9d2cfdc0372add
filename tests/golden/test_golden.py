"""What every shipped model and recipe resolves to is on record in tests/golden."""

import importlib.util
from pathlib import Path

import pytest

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


def test_the_readmes_table_of_models_is_current(listed):
    file, text = load_update().readme()
    assert file.read_text(encoding="utf-8") == text, "run `make golden` and look at the diff"
