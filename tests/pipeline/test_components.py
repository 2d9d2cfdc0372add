"""VAE, text encoder, tokenizer and scheduler: complete and intact, or refused by name."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hydrarun.core.errors import RunError
from hydrarun.pipeline import components
from hydrarun.pipeline.components import quiet_libraries
from tests.helpers import tiny

WEIGHTS = {"vae": "diffusion_pytorch_model.safetensors", "text_encoder": "model.safetensors"}


@pytest.fixture
def folder(tiny_folder, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "checkpoint"))


@pytest.mark.parametrize("entry", [None, [None, None]])
def test_a_missing_component(folder, entry):
    """Some checkpoints are published without one of their text encoders."""
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "text_encoder": entry}))
    with pytest.raises(RunError, match=r"json: text_encoder is missing, and QwenImagePipeline needs it$"):
        tiny.runner(folder)


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_missing_tensor_is_an_error_not_random_numbers(folder, name):
    path = folder / name / WEIGHTS[name]
    tensors = load_file(path)
    gone = sorted(key for key in tensors if key.endswith("weight"))[3]
    del tensors[gone]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(RunError, match=rf"{name}: '\S*{gone.rpartition('layers')[2]}' is missing"):
        tiny.runner(folder)  # transformers adds a prefix to some names


@pytest.mark.parametrize("name", WEIGHTS)
def test_an_unexpected_tensor(folder, name):
    path = folder / name / WEIGHTS[name]
    save_file({**load_file(path), "stray.weight": torch.zeros(3)}, path, metadata={"format": "pt"})
    with pytest.raises(RunError, match=rf"{name}: .*stray.weight.* has no place"):
        tiny.runner(folder)


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_wrong_shape(folder, name):
    path = folder / name / WEIGHTS[name]
    tensors = load_file(path)
    key = next(key for key in sorted(tensors) if tensors[key].ndim > 1)
    tensors[key] = torch.zeros(*tensors[key].shape, 2)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(RunError, match=rf"{name}: '{key}' has another shape"):
        tiny.runner(folder)


@pytest.mark.parametrize("name", ["vae", "text_encoder", "transformer"])
def test_a_truncated_file(folder, name):
    path = folder / name / WEIGHTS.get(name, WEIGHTS["vae"])
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RunError, match=rf"{name}/.*: truncated"):
        tiny.runner(folder)


def test_a_checkpoint_of_another_pipeline(folder):
    path = folder / "model_index.json"
    path.write_text(path.read_text().replace("QwenImagePipeline", "FluxPipeline"))
    with pytest.raises(RunError, match="a checkpoint of FluxPipeline, and this model option runs QwenImagePipeline"):
        tiny.runner(folder)


@pytest.mark.parametrize(
    "entry", [["os", "system"], ["my_code", "Vae"], ["diffusers", "__version__"], ["transformers", "RagRetriever"]]
)
def test_a_component_of_foreign_code_is_refused(folder, entry):
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "vae": entry}))
    with pytest.raises(RunError, match="model_index.json: vae"):
        tiny.runner(folder)


def test_a_missing_folder(folder):
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(RunError, match="tokenizer"):
        tiny.runner(folder)


def test_the_scheduler_can_be_another(folder):
    """A `_target_` with arguments replaces the checkpoint's scheduler."""
    runner = tiny.runner(folder, "model.scheduler={_target_: diffusers.FlowMatchEulerDiscreteScheduler, shift: 3.0}")
    assert runner.built.parts.pipeline.scheduler.config.shift == 3.0
    own = tiny.runner(folder).built.parts.pipeline.scheduler.config
    assert {key: own[key] for key in tiny.SCHEDULER} == tiny.SCHEDULER


def test_libraries_that_bring_others_along_are_quiet_only_while_they_are_loaded():
    """If torchao is installed, the libraries import it, and it warns about each kernel that it cannot load."""
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    before = [logger.level for logger in loggers]
    with quiet_libraries():
        assert not any(logger.isEnabledFor(logging.WARNING) for logger in loggers)
        assert all(logger.isEnabledFor(logging.ERROR) for logger in loggers)
    assert [logger.level for logger in loggers] == before


def test_text_encoders_go_straight_to_their_device(tiny_folder, fake, monkeypatch):
    """Every parameter is on the device before `move_module`."""
    seen = []
    monkeypatch.setattr(
        components, "move_module", lambda module, device: seen.extend(p.device.type for p in module.parameters())
    )
    entry = ("transformers", "Qwen2_5_VLForConditionalGeneration")
    device = torch.device("fake")
    encoder = components.load_component(tiny_folder, "text_encoder", entry, device=device, dtype=torch.bfloat16)
    assert set(seen) == {"fake"}
    assert not [name for name, module in encoder.named_modules() if hasattr(module, "_hf_hook")]
