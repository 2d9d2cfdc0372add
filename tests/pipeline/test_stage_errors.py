"""Errors of component libraries while a run's stages run are one line; our own keep their traceback."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from hydrarun.core import errors
from hydrarun.core.errors import RunError, describe_import_error
from hydrarun.pipeline.stage import Stage, translate_library_errors
from tests.helpers import tiny


def test_a_value_that_only_fails_in_a_forward_is_one_line(tiny_folder, tmp_path):
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "checkpoint"))
    file = folder / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"latents_std": [1.0]}))
    with pytest.raises(RunError, match=r"^vae/config\.json: needs latents_mean and latents_std, \d+ numbers each"):
        tiny.runner(folder).generate()


class Encoding(Stage):
    uses = ("text_encoder",)


def call_as(module: str, error: BaseException) -> None:
    """Raise `error` in a function of the module `module`."""
    scope = {"__name__": module, "error": error}
    exec("def fail(): raise error", scope)
    scope["fail"]()


@pytest.mark.parametrize("library", ["diffusers.models.vae", "transformers.models.t5"])
def test_a_librarys_error_names_the_component(library):
    with pytest.raises(RunError) as raised, translate_library_errors(Encoding(), SimpleNamespace(mesh=None)):
        call_as(library, AttributeError("no window\nand more"))
    assert str(raised.value) == (
        f"text_encoder: {library.partition('.')[0]} fails with AttributeError: no window. A value in the checkpoint's"
        " config.json may be wrong, or the library's version"
    )


def test_our_own_error_stays():
    with pytest.raises(AttributeError), translate_library_errors(Encoding(), SimpleNamespace(mesh=None)):
        call_as("hydrarun.pipeline.stages.encode", AttributeError("a bug"))


def test_a_lost_rank_stays():
    """It is a consequence; the cause is another rank's."""
    with pytest.raises(RuntimeError), translate_library_errors(Encoding(), SimpleNamespace(mesh="a mesh")):
        call_as("transformers.models.t5", RuntimeError("Connection closed by peer"))


def test_a_torchvision_of_another_torch_is_named(monkeypatch, capsys):
    broken = RuntimeError("Failed to import transformers.models.clip: operator torchvision::nms does not exist")
    assert describe_import_error(broken) == str(broken)  # none is installed: it cannot be the cause
    monkeypatch.setattr(errors.importlib.util, "find_spec", lambda name: name == "torchvision")
    assert describe_import_error(broken) == f"{broken}; {errors.TORCHVISION}"
    wrapped = ImportError("cannot import name 'X'")
    wrapped.__cause__ = broken
    assert errors.report_error(wrapped) == 1
    assert capsys.readouterr().err == f"cannot import name 'X'; {errors.TORCHVISION}\n"
    assert describe_import_error(ValueError("torchvision")) == "torchvision"
