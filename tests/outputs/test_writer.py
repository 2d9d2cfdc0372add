"""Files, names, metadata and run.json."""

import hashlib
import json
import re
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hydrarun.core import files
from hydrarun.core.errors import RunError
from hydrarun.outputs import writer as outputs
from hydrarun.outputs.media import png
from hydrarun.outputs.provenance import hash_config
from hydrarun.outputs.writer import OutputWriter

CONFIG = {
    "model": {"name": "demo", "path": "package:demo", "scheduler": None, "facts": {}},
    "sampling": {
        "prompt": ["a red circle", "一只猫"],
        "negative_prompt": " ",
        "num_inference_steps": 24,
        "true_cfg_scale": 3.0,
        "guidance_scale": None,
        "height": 32,
        "width": 48,
        "seed": [7, 8],
        "num_images_per_prompt": None,
    },
    "input": {"images": None},
    "output": {"metadata": True, "format": "png", "fps": None},
    "device": "auto",
}
FACTS = {
    "weights": {"path": "package:demo", "revision": None, "fingerprint": "0123abcd"},
    "inputs": [{"path": "/data/a.png", "sha256": "ab" * 32, "width": 64, "height": 48}],
    "device": "cpu",
    "dtype": "float32",
    "attention": "SDPA",
    "scheduler": "FlowMatchEulerDiscreteScheduler",
    "compile": "none",
    "quantization": "none",
    "versions": {"hydrarun": "0.1.0", "torch": "2.13.0"},
    "hardware": {"cpu": "a cpu"},
}
TIMINGS = {"load_s": 1.0, "encode_s": 0.1, "denoise_s": 0.5, "decode_s": 0.2, "steps_s": [0.3, 0.2], "total_s": 1.9}
MEMORY = {"peak_host_bytes": 1000, "peak_device_bytes": 0}
MEASURED = {"timings": TIMINGS, "memory": MEMORY, "cache": {"steps": {}}}
VIDEO = np.random.default_rng(0).integers(0, 256, (5, 32, 48, 3), dtype=np.uint8)
PIXELS = VIDEO[0]


def writer(folder: Path, config: dict = CONFIG, metadata: bool = True) -> OutputWriter:
    return OutputWriter(folder / "run", config, FACTS, metadata)


def save(
    target: OutputWriter,
    prompt: str = "a red circle",
    negative: str | None = " ",
    seed: int = 7,
    pixels: np.ndarray = PIXELS,
) -> dict:
    return target.save(pixels, prompt, negative, seed, TIMINGS)


def written(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "run").iterdir())


def test_a_picture_is_written_under_its_name_and_recorded(tmp_path):
    record = save(writer(tmp_path))
    path = tmp_path / "run" / record["path"]
    assert record["path"] == f"0000-a-red-circle-7-{hash_config(CONFIG)}.png"
    assert written(tmp_path) == [record["path"]]
    assert record["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert record["pixels_sha256"] == hashlib.sha256(PIXELS.tobytes()).hexdigest()
    assert (record["width"], record["height"]) == (48, 32)
    assert (record["prompt"], record["negative_prompt"], record["seed"]) == ("a red circle", " ", 7)
    assert np.array_equal(png.read_png(path)[0], PIXELS)


def test_equal_pictures_get_different_names(tmp_path):
    target = writer(tmp_path)
    assert [save(target)["path"][:4] for _ in range(3)] == ["0000", "0001", "0002"]
    assert len(written(tmp_path)) == 3


def test_metadata_reproduces_this_picture_alone_and_its_batch(tmp_path):
    target = writer(tmp_path)
    save(target)
    record = save(target, prompt="一只猫", seed=8)
    metadata = png.read_png(tmp_path / "run" / record["path"])[1]
    alone = {"prompt": "一只猫", "negative_prompt": " ", "seed": 8, "num_images_per_prompt": 1}
    assert metadata["config"]["sampling"] == {**CONFIG["sampling"], **alone}
    assert metadata["batch"]["index"] == 1
    metadata["config"]["sampling"].update(metadata["batch"]["sampling"])
    assert metadata["config"] == CONFIG
    assert metadata["config_hash"] == hash_config(metadata["config"])
    assert metadata["pixels_sha256"] == record["pixels_sha256"]
    assert metadata["timings"] == TIMINGS
    assert {key: metadata[key] for key in FACTS} == FACTS


def test_parameters_follow_the_convention(tmp_path):
    record = save(writer(tmp_path), negative="blurry")
    with Image.open(tmp_path / "run" / record["path"]) as image:
        assert image.text["parameters"] == (
            "a red circle\nNegative prompt: blurry\n"
            "Steps: 24, Sampler: FlowMatchEulerDiscreteScheduler, CFG scale: 3.0, Seed: 7, Size: 48x32, Model: demo,"
            " Version: hydrarun 0.1.0"
        )


def test_the_guidance_in_parameters_is_the_one_the_model_takes():
    record = {"prompt": "a", "negative_prompt": None, "seed": 1, "width": 8, "height": 8}
    for scales, said in (((3.0, None), "CFG scale: 3.0"), ((None, 3.5), "CFG scale: 3.5"), ((None, None), None)):
        sampling = CONFIG["sampling"] | dict(zip(("true_cfg_scale", "guidance_scale"), scales, strict=True))
        settings = (
            outputs.format_parameters({**CONFIG, "sampling": sampling}, FACTS, record).splitlines()[1].split(", ")
        )
        assert [text for text in settings if "CFG" in text] == ([said] if said else [])


@pytest.mark.parametrize("negative", [None, "", " "])
def test_parameters_leave_out_an_empty_negative_prompt(tmp_path, negative):
    record = save(writer(tmp_path), negative=negative, prompt="一只猫")
    with Image.open(tmp_path / "run" / record["path"]) as image:
        assert image.text["parameters"].startswith("一只猫\nSteps: 24, Sampler: ")


def test_metadata_can_be_left_out(tmp_path):
    record = save(writer(tmp_path, metadata=False))
    path = tmp_path / "run" / record["path"]
    assert png.read_png(path)[1] is None
    with Image.open(path) as image:
        assert image.text == {}


def test_run_json_has_every_key(tmp_path):
    target = writer(tmp_path)
    save(target)
    record = target.finish(MEASURED)
    assert json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8")) == record
    assert record["format"] == 1
    assert record["status"] == "complete"
    assert record["config"] == CONFIG
    assert record["config_hash"] == hash_config(CONFIG)
    assert [output["path"] for output in record["outputs"]] == written(tmp_path)[:1]
    assert {key: record["timings"][key] for key in TIMINGS} == TIMINGS
    assert record["timings"]["save_s"] > 0
    assert (record["memory"], record["cache"]) == (MEMORY, MEASURED["cache"])
    assert {key: record[key] for key in FACTS} == FACTS
    assert datetime.fromisoformat(record["created"]).utcoffset().total_seconds() == 0


def test_a_failed_run_keeps_what_was_made_and_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/alice")
    target = writer(tmp_path)
    made = save(target)
    target.fail(RunError("no space in /home/alice/x"), {**MEASURED, "timings": {"load_s": 1.0}})
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "failed"
    assert record["error"] == {"type": "RunError", "message": "no space in ~/x"}
    assert record["outputs"] == [made]
    assert (tmp_path / "run" / made["path"]).exists()


def test_no_home_folder_and_no_token_in_any_file(tmp_path, monkeypatch):
    home = tmp_path / "alice"
    (home / "weights").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    config = {**CONFIG, "model": {**CONFIG["model"], "path": str(home / "weights"), "token": "hf_abcdefghijkl"}}
    config["input"] = {"images": [str(home / "me.png")]}
    weights = {"path": str(home / "weights"), "revision": None, "fingerprint": "x"}
    facts = {**FACTS, "weights": weights, "inputs": [{**FACTS["inputs"][0], "path": str(home / "me.png")}]}
    target = OutputWriter(tmp_path / "run", config, facts, metadata=True)
    record = save(target)
    target.finish(MEASURED)
    metadata = png.read_png(tmp_path / "run" / record["path"])[1]
    assert metadata["config"]["model"]["path"] == metadata["weights"]["path"] == "~/weights"
    assert metadata["config"]["input"]["images"] == [metadata["inputs"][0]["path"]] == ["~/me.png"]
    for text in (json.dumps(metadata), (tmp_path / "run" / "run.json").read_text()):
        assert "alice" not in text
        assert "hf_" not in text


def test_a_relative_checkpoint_folder_is_recorded_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    config = {**CONFIG, "model": {**CONFIG["model"], "path": "weights"}}
    assert writer(tmp_path, config).config["model"]["path"] == str(tmp_path / "weights")
    hub = {**CONFIG, "model": {**CONFIG["model"], "path": "Qwen/Qwen-Image"}}
    assert writer(tmp_path, hub).config["model"]["path"] == "Qwen/Qwen-Image"


def test_relative_input_images_are_recorded_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = {**CONFIG, "input": {"images": ["a.png", "../b.png", "/data/c.png"]}}
    facts = {**FACTS, "inputs": [{**FACTS["inputs"][0], "path": "a.png"}]}
    target = OutputWriter(tmp_path / "run", config, facts, metadata=True)
    expected = [str(tmp_path / "a.png"), str(tmp_path.parent / "b.png"), "/data/c.png"]
    assert target.config["input"]["images"] == expected
    assert target.facts["inputs"] == [{**FACTS["inputs"][0], "path": expected[0]}]
    assert config["input"]["images"][0] == "a.png"
    assert writer(tmp_path, {**CONFIG, "input": {"images": "a.png"}}).config["input"]["images"] == expected[:1]
    assert writer(tmp_path).config["input"]["images"] is None


@pytest.mark.parametrize(("value", "said"), [(0, "black"), (1, "black"), (255, "(255, 255, 255)"), (90, "one colour")])
def test_a_picture_of_one_colour_is_an_error_and_no_file(tmp_path, value, said):
    target = writer(tmp_path)
    pixels = np.full((32, 48, 3), value, np.uint8)
    pixels[5, 5] -= value > 0  # one level of rounding noise still counts as one colour
    with pytest.raises(RunError, match="seed 7") as caught:
        target.save(pixels, "a cat", None, 7, TIMINGS)
    assert said in str(caught.value)
    assert "overflow" not in str(caught.value)  # in float32 there is no wider dtype to try
    target.facts |= {"dtype": "float16", "attention": "sdpa"}
    with pytest.raises(RunError, match=r"overflow of float16 \(try dtype=bfloat16 or dtype=float32\)") as caught:
        target.save(pixels, "a cat", None, 7, TIMINGS)
    assert "attention=sdpa" not in str(caught.value)
    assert written(tmp_path) == []
    assert target.outputs == []


def test_a_nearly_plain_picture_is_a_picture(tmp_path):
    pixels = np.full((32, 48, 3), 200, np.uint8)
    pixels[4:8, 4:8] = (200, 197, 200)
    assert writer(tmp_path).save(pixels, "snow", None, 7, TIMINGS)["path"]


def test_a_crash_while_writing_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    path.write_text("old")

    def crash(*_):
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "replace", crash)
    with pytest.raises(OSError, match="disk full"):
        files.write_atomically(path, b"new")
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a large red circle, above!", "a-large-red-circle-above"),
        ("../../etc/passwd", "etc-passwd"),
        ("..\\..\\x:y|z", "x-y-z"),
        ("Café Ünïcode", "cafe-unicode"),
        ("一只猫 cat", "cat"),
        ("一只猫", "picture"),
        ("", "picture"),
        ("...", "picture"),
        ("\0\n\t", "picture"),
        ("x" * 100, "x" * 40),
        ("a large red circle above a small blue square", "a-large-red-circle-above-a-small-blue"),
        ("aaaa " * 8 + "b", "aaaa-" * 7 + "aaaa"),
    ],
)
def test_slug(prompt, expected):
    assert outputs.slugify_prompt(prompt, "picture") == expected


def test_slugs_are_always_safe():
    random = np.random.default_rng(0)
    for length in random.integers(0, 80, 300):
        prompt = "".join(map(chr, random.integers(0, 0x2FFF, length)))
        assert re.fullmatch(r"[a-z0-9](-?[a-z0-9])*", outputs.slugify_prompt(prompt, "picture")), prompt
        assert len(outputs.slugify_prompt(prompt, "picture")) <= 40
