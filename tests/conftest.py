"""Fixtures shared by all tests: tiny checkpoints that are built once, a fake device and a pool of ranks."""

from __future__ import annotations

import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), "hydrarun-tests-compiled"))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import gc
from pathlib import Path

import pytest
import torch

from hydrarun.cli.commands import list as listing
from tests.helpers import fakeacc, ranks, scheduling, subjects, tiny

torch.set_num_threads(1)  # these models are too small for more

gc.collect()  # freezes the objects of all imported libraries, so that later collections skip them
gc.freeze()


def pytest_addoption(parser) -> None:
    parser.addoption("--write-matrix", action="store_true", help="write the results to docs/matrix.md")


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by marker
def pytest_collection_modifyitems(items) -> None:
    scheduling.mark_others_full(items)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Send the tests of one model to one worker, under `--dist loadscope`."""
    return scheduling.ModelScheduling(config, log) if config.getvalue("dist") == "loadscope" else None


@pytest.fixture(scope="session")
def tiny_pipeline():
    """The reference: diffusers' QwenImagePipeline with random weights, in float32 on the CPU."""
    return tiny.qwen_image()


@pytest.fixture(scope="session")
def tiny_folder(tiny_pipeline, tmp_path_factory) -> Path:
    """The folder of `tiny_pipeline`, saved by diffusers. Do not change it; copy it."""
    folder = tmp_path_factory.mktemp("tiny") / "qwen_image"
    tiny_pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_runner(tiny_folder):
    """Our runner on the checkpoint in `tiny_folder`."""
    return tiny.runner(tiny_folder)


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    """The trained model that the package ships."""
    from hydrarun.core.resources import find_folder

    return find_folder("weights") / "demo"


@pytest.fixture(scope="session")
def built_subjects() -> dict[str, subjects.Subject]:
    """The subjects that tests have requested so far."""
    return {}


@pytest.fixture
def subject(request, built_subjects, tmp_path_factory) -> subjects.Subject:
    """A model option with its tiny checkpoint. Parametrize by name, over `subjects.MODELS`."""
    if request.param not in built_subjects:
        built_subjects[request.param] = subjects.build(request.param, tmp_path_factory.mktemp("subject"))
    return built_subjects[request.param]


@pytest.fixture(scope="module")
def fake():
    """`torch.fake`, the module of a fake device over host memory that counts every byte."""
    if fakeacc.compiler() is None:
        pytest.skip("the fake accelerator needs a C++ compiler, and there is no `c++` here (CXX names another)")
    # freezes existing objects, so that the collection before each byte count skips them; the collection afterwards
    # frees what the tests leave behind
    gc.collect()
    gc.freeze()
    yield fakeacc.load()
    gc.unfreeze()
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def accelerations_table() -> listing.Table:
    """The table of `hydrarun list accelerations`, which takes seconds to build."""
    return listing.make_table("accelerations")


@pytest.fixture
def listed(accelerations_table, monkeypatch) -> None:
    """Make `hydrarun list` use the prebuilt table and configurations."""
    monkeypatch.setattr(listing, "_make_accelerations_table", lambda: accelerations_table)
    monkeypatch.setattr(listing, "compose_models", lambda: [(name, subjects.CONFIGS[name]) for name in subjects.MODELS])


@pytest.fixture(scope="session")
def pool():
    """Processes for tests with several ranks: `pool(size, function, *arguments)`."""
    started = ranks.Pool()
    yield started
    started.close()
