"""Resolving `model.path` to a folder, without network."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hydrarun.config.hub import resolve_weights
from hydrarun.core.errors import RunError, UsageError
from tests.helpers import tiny

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def source(path: object, revision: str | None = None):
    return resolve_weights({"path": str(path), "revision": revision})


@pytest.fixture
def cached(tiny_folder, tmp_path, monkeypatch) -> Path:
    """A hub cache in huggingface_hub's layout that holds owner/tiny at its main branch."""
    from huggingface_hub import constants

    repository = tmp_path / "hub" / "models--owner--tiny"
    shutil.copytree(tiny_folder, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return repository / "snapshots" / COMMIT


def test_a_folder_is_itself(tiny_folder):
    assert source(tiny_folder).folder == tiny_folder


def test_home_is_expanded(tiny_folder, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny_folder.parent))
    assert source(f"~/{tiny_folder.name}").folder == tiny_folder


def test_the_packages_own_weights(demo_folder):
    assert source("package:demo").folder == demo_folder
    with pytest.raises(UsageError, match="Did you mean 'demo'"):
        source("package:dmeo")
    with pytest.raises(UsageError, match="ships no weights of that name"):
        source("package:../demo")


def test_a_hub_id_is_found_in_the_cache_while_offline(cached):
    found = source("owner/tiny")
    assert found.folder == cached
    assert found.revision == COMMIT
    assert source("owner/tiny", COMMIT).folder == cached


def test_a_hub_id_that_is_not_there_says_what_to_do(cached):
    with pytest.raises(RunError, match="owner/other: not in the local cache, and HF_HUB_OFFLINE is set"):
        source("owner/other")
    with pytest.raises(RunError, match="model.revision=v9"):
        source("owner/tiny", "v9")


def test_a_revision_of_a_folder_is_refused(tiny_folder):
    with pytest.raises(UsageError, match="no effect on a local folder"):
        source(tiny_folder, "main")


def test_it_is_refused_while_composing(tiny_folder):
    with pytest.raises(UsageError, match="model.revision=main has no effect on a local folder"):
        tiny.config(tiny_folder, "model.revision=main")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("qwen_imag", "no such folder. Did you mean 'qwen_image'"),
        ("empty", "no model_index.json in it"),
        ("file.safetensors", "a single file"),
    ],
)
def test_what_is_no_checkpoint_is_refused(tiny_folder, tmp_path, name, message):
    shutil.copytree(tiny_folder, tmp_path / "qwen_image")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match=message):
        source(tmp_path / name)


def test_a_run_from_the_hub_cache_equals_the_folder(cached, tiny_folder):
    """Compares the pictures of two whole runs."""
    from hydrarun.engine.runner import Runner

    by_id = Runner(tiny.config(tiny_folder, "model.path=owner/tiny")).generate(num_inference_steps=2)
    by_folder = tiny.runner(tiny_folder).generate(num_inference_steps=2)
    assert (by_id[0].pixels == by_folder[0].pixels).all()
