import pytest

from hydrarun.core import resources
from hydrarun.core.errors import RunError


def test_the_folders_of_a_checkout_lie_beside_the_package():
    assert (resources.find_folder("conf") / "config.yaml").is_file()
    assert resources.find_folder("recipes").is_absolute()


def test_inside_the_package_wins_as_in_a_wheel(tmp_path, monkeypatch):
    (tmp_path / "hydrarun" / "conf").mkdir(parents=True)
    (tmp_path / "conf").mkdir()
    monkeypatch.setattr(resources, "PACKAGE", tmp_path / "hydrarun")
    assert resources.find_folder("conf") == tmp_path / "hydrarun" / "conf"


def test_an_incomplete_installation_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(resources, "PACKAGE", tmp_path / "hydrarun")
    with pytest.raises(RunError, match="'weights' is missing"):
        resources.find_folder("weights")
