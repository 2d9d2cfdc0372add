"""VAE, text encoder, tokenizer and scheduler: complete and intact, or refused by name."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hydrarun.core.errors import RunError, UsageError
from hydrarun.models.weights.safetensors import MAX_CONFIG_BYTES, check_library_files
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


@pytest.mark.parametrize("name", WEIGHTS)
def test_integers_in_the_place_of_weights(folder, name):
    path = folder / name / WEIGHTS[name]
    tensors = load_file(path)
    key = next(key for key in sorted(tensors) if key.endswith("weight"))
    save_file(tensors | {key: tensors[key].to(torch.int8)}, path, metadata={"format": "pt"})
    with pytest.raises(RunError, match=rf"{WEIGHTS[name]}: '{key}' has the dtype I8.*not quantized"):
        tiny.runner(folder)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("vae", {"num_res_blocks": 9000}, "num_res_blocks: 9000, and the weights hold"),
        ("vae", {"num_res_blocks": 900}, "asks for more than"),
        ("vae", {"base_dim": 50_000}, "asks for .* numbers, and the weights hold"),
        ("vae", {"base_dim": -4}, "no model can be built with these values"),
        ("vae", {"dim_mult": "x"}, "no model can be built with these values"),
        ("text_encoder", {"text_config": {"num_hidden_layers": 9000}}, "num_hidden_layers: 9000, and the"),
        ("text_encoder", {"text_config": {"intermediate_size": 10**9}}, "asks for .* numbers, and the weights hold"),
        ("text_encoder", {"text_config": 5}, "no model can be built with these values"),
        ("text_encoder", {"vision_config": {"depth": 9000}}, "depth: 9000, and the weights hold"),
    ],
    ids=str,
)
def test_sizes_that_the_weights_do_not_have(folder, name, change, message):
    path = folder / name / "config.json"
    config = json.loads(path.read_text())
    for key, value in change.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    path.write_text(json.dumps(config))
    with pytest.raises(RunError, match=rf"{name}/config.json: {message}") as caught:
        tiny.runner(folder)
    assert "\n" not in str(caught.value)


#: files that a library opens by itself
LIBRARY_FILES = ("tokenizer/tokenizer_config.json", "text_encoder/config.json", "scheduler/scheduler_config.json")


@pytest.mark.parametrize("name", [*LIBRARY_FILES, "tokenizer/vocab.txt", "tokenizer/templates/a.jinja"])
def test_what_is_no_file_is_refused_before_a_library_opens_it(folder, name):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with pytest.raises(RunError, match=rf"{name}: a pipe, not a regular file$"):
        tiny.runner(folder)
    path.unlink()
    path.touch()
    os.truncate(path, 8 * 2**30)
    with pytest.raises(RunError, match=rf"{name}: larger than \d+ bytes$"):
        tiny.runner(folder)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "{", '{"a": 1, "a": 2}'], ids=lambda text: text[:9])
@pytest.mark.parametrize("name", LIBRARY_FILES)
def test_damaged_json_is_refused_before_a_library_opens_it(folder, name, text):
    (folder / name).write_text(text)
    with pytest.raises(RunError, match=rf"{name}: not JSON: "):
        tiny.runner(folder)


def test_a_checkpoint_of_another_pipeline(folder):
    path = folder / "model_index.json"
    path.write_text(path.read_text().replace("QwenImagePipeline", "FluxPipeline"))
    with pytest.raises(UsageError, match="does not run a checkpoint of FluxPipeline: use model=flux"):
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


@pytest.mark.parametrize("name", ["/outside/te", "../te", "x/y", ".te", "", "a b"])
def test_a_component_is_a_folder_of_the_checkpoint(name, tmp_path):
    with pytest.raises(RunError, match="is not the name of a component"):
        components.check_index(tmp_path, {"_class_name": "X", name: ["transformers", "T5EncoderModel"]})


def test_a_large_config_is_parsed_as_strictly_as_a_small_one(tmp_path):
    file = tmp_path / "text_encoder" / "generation_config.json"
    file.parent.mkdir()
    file.write_text('{"custom_generate": "a/b", "twice": 1, "twice": 2' + " " * MAX_CONFIG_BYTES + "}")
    with pytest.raises(RunError, match="generation_config.json: not JSON"):
        check_library_files(tmp_path)
