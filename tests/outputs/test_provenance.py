"""Configuration hash, versions and hardware, and redaction."""

import json
import re
from pathlib import Path

import pytest

from hydrarun.outputs import provenance

CONFIG = {
    "model": {"name": "demo", "path": "package:demo", "facts": {"parameters": "3.5M"}},
    "sampling": {"prompt": "a cat", "seed": 7, "num_inference_steps": 4},
    "output": {"metadata": True},
    "device": "cpu",
}


@pytest.fixture
def home(monkeypatch, tmp_path) -> Path:
    folder = tmp_path / "home" / "alice"
    folder.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(folder))
    return folder


def changed(section: str, **values) -> dict:
    return {**CONFIG, section: {**CONFIG[section], **values}}


def test_hash_is_eight_hex_digits_and_ignores_the_order_of_keys():
    shuffled = dict(reversed(CONFIG.items()))
    assert re.fullmatch("[0-9a-f]{8}", provenance.hash_config(CONFIG))
    assert provenance.hash_config(CONFIG) == provenance.hash_config(shuffled)


@pytest.mark.parametrize(
    "other",
    [
        changed("sampling", seed=8),
        changed("sampling", prompt="a cat "),
        changed("sampling", num_inference_steps=5),
        changed("model", path="elsewhere"),
        {**CONFIG, "device": "cuda"},
    ],
)
def test_hash_changes_with_what_may_change_the_pixels(other):
    assert provenance.hash_config(other) != provenance.hash_config(CONFIG)


@pytest.mark.parametrize(
    "other",
    [
        changed("output", metadata=False),
        changed("model", facts={}),
        changed("model", judge="scenes"),
        {**CONFIG, "plan": {"auto": False, "device": None}},
        {**CONFIG, "report": {"metrics": ["psnr"]}},
        {**CONFIG, "verify": True},
        {**CONFIG, "warmup": 2},
        {**CONFIG, "compile": {"cache_dir": "/elsewhere"}},
    ],
)
def test_hash_ignores_what_cannot_reach_the_pixels(other):
    assert provenance.hash_config(other) == provenance.hash_config(CONFIG)


def test_hash_survives_redaction(home):
    config = changed("model", path=str(home / "weights"))
    assert provenance.hash_config(provenance.redact_config(config)) == provenance.hash_config(config)


def test_home_folder_becomes_tilde_and_comes_back(home):
    config = changed("model", path=str(home / "weights"), also=[{"cache": str(home)}])
    redacted = provenance.redact_config(config)
    assert redacted["model"]["path"] == "~/weights"
    assert redacted["model"]["also"] == [{"cache": "~"}]
    assert str(home) not in json.dumps(redacted)
    assert provenance.expand_home(redacted) == config
    assert provenance.redact_config(redacted) == redacted


def test_only_whole_folder_names_count_as_home(home):
    config = changed("model", path=f"{home}-two/weights", revision="~other")
    assert provenance.redact_config(config) == config
    assert provenance.expand_home(config) == config


def test_prompts_are_kept_to_the_letter(home):
    sampling = {"prompt": ["~/ is home", f"{home}/x"], "token": "hf_abcdefghijkl"}
    config = {**CONFIG, "sampling": sampling}
    assert provenance.redact_config(config)["sampling"] == sampling
    assert provenance.expand_home(config)["sampling"] == sampling


@pytest.mark.parametrize("key", ["token", "hf_token", "password", "API_KEY", "apikey", "client_secret"])
def test_secrets_are_left_out_by_name(key):
    assert provenance.redact_config({"model": {"name": "demo", key: "x"}, key: "y"}) == {"model": {"name": "demo"}}


def test_tokens_are_cut_from_texts():
    redacted = provenance.redact_config({"model": {"path": "https://u:hf_AbCdEfGh12345678@host/x", "max_tokens": 5}})
    assert redacted == {"model": {"path": "https://u:[removed]@host/x", "max_tokens": 5}}


def test_messages_are_redacted_anywhere(home):
    assert provenance.redact_text(f"cannot open '{home}/a': hf_abcdefghijkl") == "cannot open '~/a': [removed]"


def test_versions_name_everything_that_computes_pixels():
    versions = provenance.collect_versions()
    assert set(versions) == {
        "hydrarun", "python", "torch", "diffusers", "transformers", "safetensors", "numpy", "pillow", "cache-dit",
        "torchao",
        "torchsde",
    }  # fmt: skip
    assert all(versions.values())


def test_a_missing_package_is_none(monkeypatch):
    monkeypatch.setattr(provenance, "PACKAGES", ("no-such-package-here",))
    assert provenance.collect_versions()["no-such-package-here"] is None


def test_hardware_of_the_cpu():
    hardware = provenance.describe_hardware("cpu")
    assert hardware["cpu"]
    assert hardware["cpu_cores"] >= 1
    assert hardware["torch_threads"] >= 1
    assert "gpu" not in hardware
    json.dumps(hardware)


def test_peak_host_memory_is_in_bytes():
    # the interpreter alone needs more than 20 MB, and a wrong unit is off by 1024
    assert 20e6 < provenance.measure_peak_host_bytes() < 100e9
