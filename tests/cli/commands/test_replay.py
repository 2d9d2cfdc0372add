"""`hydrarun replay`: drawing a picture again from its file alone."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hydrarun.cli import main
from hydrarun.cli.commands import replay
from hydrarun.cli.main import dispatch_verb
from hydrarun.core.errors import UsageError
from hydrarun.engine.runs.single import run_single
from hydrarun.outputs import reader
from hydrarun.outputs.media import png
from hydrarun.outputs.writer import OutputWriter, hash_pixels
from tests.helpers import tiny

BATCH = ('sampling.prompt=["a red circle", "一只猫, ${sitting}"]', "sampling.seed=[7, 8]")


@pytest.fixture(scope="session")
def finished(tiny_folder, tmp_path_factory) -> Path:
    """The folder of a finished run with two prompts of different length in one batch. Do not change it; copy it."""
    from hydrarun.engine.runner import Runner

    folder = tmp_path_factory.mktemp("finished")
    config = tiny.config(tiny_folder, *BATCH, "sampling.true_cfg_scale=2")
    run_single(Runner(config), config, folder)
    return folder


@pytest.fixture
def second(finished, tmp_path) -> Path:
    """The second picture, alone in a folder of its own."""
    return Path(shutil.copy(sorted(finished.glob("0001-*.png"))[0], tmp_path / "stranger.png"))


def configured(config: dict, *overrides: str) -> dict:
    facts = dict.fromkeys(reader.FACTS)
    return replay.rebuild_config(reader.RecordedRun(config, facts, []), overrides)


@pytest.fixture
def config(tiny_folder) -> dict:
    return tiny.config(tiny_folder)


def complaint(config: dict, *overrides: str) -> str:
    with pytest.raises(UsageError) as caught:
        configured(config, *overrides)
    return str(caught.value)


# --- end to end ------------------------------------------------------------------------------------------------------


def test_a_picture_of_a_batch_is_reproduced_exactly_from_its_file_alone(second, tmp_path, capsys):
    assert main.main(["replay", str(second), f"hydra.run.dir={tmp_path / 'again'}"]) == 0
    assert capsys.readouterr().out == "stranger.png: identical pixels\n"
    (again,) = (tmp_path / "again").glob("0001-*.png")
    assert np.array_equal(png.read_png(again)[0], png.read_png(second)[0])


def test_run_json_replays_every_picture(finished, tmp_path, capsys):
    assert dispatch_verb(["replay", str(finished / "run.json"), f"hydra.run.dir={tmp_path}"]) == 0
    assert capsys.readouterr().out.count("identical pixels") == 2


def test_a_different_draw_is_measured_and_exits_with_1(second, tmp_path, capsys):
    arguments = [str(second), f"hydra.run.dir={tmp_path / 'again'}", "sampling.num_inference_steps=3"]
    assert dispatch_verb(["replay", *arguments]) == 1
    assert "stranger.png: different pixels, largest difference" in capsys.readouterr().out


def test_what_differs_is_said(second, tmp_path, capsys):
    pixels, record = png.read_png(second)
    record["versions"]["torch"] = "1.0\x1b[2J"
    record["hardware"]["cpu_cores"] = -1
    second.write_bytes(png.encode_png(pixels, {"hydrarun": json.dumps(record)}))
    assert dispatch_verb(["replay", str(second), f"hydra.run.dir={tmp_path / 'again'}"]) == 0
    identical, *lines = capsys.readouterr().out.splitlines()
    assert "identical" in identical
    assert lines == [
        f"  hardware.cpu_cores: -1 then, {os.cpu_count()} now",
        f"  versions.torch: 1.0?[2J then, {tiny.torch.__version__} now",
    ]


def test_an_index_beyond_the_batch(second, tmp_path):
    pixels, record = png.read_png(second)
    record["batch"]["index"] = 2
    second.write_bytes(png.encode_png(pixels, {"hydrarun": json.dumps(record)}))
    with pytest.raises(UsageError, match=r"number 2 .* of a run that draws 2"):
        dispatch_verb(["replay", str(second), f"hydra.run.dir={tmp_path / 'again'}"])
    assert not (tmp_path / "again").exists()


def test_bad_files_are_refused_before_torch_is_imported(second, tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(b"GIF89a")
    pixels, record = png.read_png(second)
    record["config"]["parallel"]["hsdp_degree"] = 1000
    record["config"]["plan"]["auto"] = True
    second.write_bytes(png.encode_png(pixels, {"hydrarun": json.dumps(record)}))
    code = f"""
import sys
from hydrarun.cli.main import dispatch_verb
from hydrarun.core.errors import UsageError
for path in ({str(path)!r}, {str(second)!r}):
    try:
        dispatch_verb(["replay", path])
    except UsageError as error:
        print(error)
print([name for name in ("torch", "diffusers", "transformers") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    bad, many, imported = done.stdout.splitlines()
    assert bad == f"{path}: not a PNG file, or damaged at its start"
    assert ", with hsdp 1000 and vae 1: 1000 ranks, and this machine starts " in many
    assert many.endswith(": use smaller degrees, or parallel.max_ranks=1000 on the command line")
    assert imported == "[]"


# --- arguments -------------------------------------------------------------------------------------------------------


def test_help(capsys):
    assert dispatch_verb(["replay", "--help"]) == 0
    assert "usage: hydrarun replay FILE" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [[], ["a.png", "b.png"], ["device=cpu"]])
def test_exactly_one_file(argv):
    with pytest.raises(UsageError, match="one file"):
        dispatch_verb(["replay", *argv])


def test_flags_are_refused():
    with pytest.raises(UsageError, match="replay: --fast: no such flag; it takes none but --help"):
        dispatch_verb(["replay", "a.png", "--fast"])


def test_a_file_with_an_equals_sign_in_its_name(tmp_path):
    path = tmp_path / "seed=7.png"
    path.touch()
    assert replay.split_words([str(path), "device=cpu"])[::2] == (path, ["device=cpu"])


def test_results_go_to_a_directory_of_their_own(tmp_path):
    assert replay.split_words(["a.png"])[1].match("outputs/*/*-replay")
    assert replay.split_words(["a.png", "hydra.run.dir=x"])[1] == Path("x")
    with pytest.raises(UsageError, match="would be overwritten"):
        replay.split_words([str(tmp_path / "a.png"), f"hydra.run.dir={tmp_path}"])


# --- the configuration -----------------------------------------------------------------------------------------------


def test_a_composed_configuration_passes_unchanged(config):
    assert configured(config) == config


def test_texts_are_taken_literally(config):
    config["sampling"]["prompt"] = "${oc.env:HOME} ${device"
    assert configured(config)["sampling"]["prompt"] == "${oc.env:HOME} ${device"


def test_overrides_change_how_it_is_drawn(config):
    changed = configured(config, "device=cuda:1", "vae.tiling=true", "sampling.true_cfg_scale=2.5", "attention=flash")
    assert (changed["device"], changed["vae"]["tiling"], changed["sampling"]["true_cfg_scale"]) == ("cuda:1", True, 2.5)
    assert changed["attention"] == {"_target_": "hydrarun.models.layers.attention_backends.FlashAttention"}
    assert config["device"] == "cpu"


def test_the_limit_on_ranks_is_set_beside_an_option(config):
    changed = configured(config, "parallel.max_ranks=16", "parallel.ring_degree=2", "parallel=ulysses8")
    assert [changed["parallel"][key] for key in ("max_ranks", "ring_degree", "ulysses_degree")] == [16, 2, 8]


def test_the_scheduler_can_be_another(config):
    assert configured(config, "scheduler=heun")["scheduler"]["_target_"].endswith("HeunDiscreteScheduler")
    assert configured(config, "scheduler.shift=2")["scheduler"] == {"shift": 2}
    assert "Did you mean 'heun'?" in complaint(config, "scheduler=huen")


def test_other_places_of_the_input_images(config):
    config["input"]["images"] = ["/data/a.png", "/data/b.png"]
    config["model"]["input_images"] = [1, 2]
    changed = configured(config, "input.images=[/elsewhere/a (1).png, b.png]")
    assert changed["input"]["images"] == ["/elsewhere/a (1).png", "b.png"]
    assert "1 to 2" in complaint(config, "input.images=[a.png,b.png,c.png]")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("devise=cpu", "'device'"),
        ("vae.tilin=true", "'tiling'"),
        ("vae.tiling.x=1", "no such key"),
        ("vae=none", "not whole sections"),
        ("model=demo", "not whole sections"),
        ("model.stages=[]", "not whole sections"),
        ("attention=flsh", "flash"),
        ("device=cpu,cuda", "draws once"),
        ("+device=cpu", "only changes values"),
        ("~device", "only changes values"),
        ("hydra.run.dri=x", "no such key"),
        ("sampling.seed=8", "hydrarun sampling.seed=8"),
        ("sampling.prompt=a dog", "hydrarun sampling.prompt=a dog"),
        ("dtype=float", "dtype"),
        ("sampling.height=-1", "sampling.height"),
    ],
)
def test_bad_overrides(config, override, said):
    assert said in complaint(config, override)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("attention", {"_target_": "os.system"}),
        ("attention", {"_target_": "hydrarun.models.layers.attention_backends.SDPA", "_partial_": True}),
        ("model.scheduler", {"_target_": "torch.load"}),
        ("model.pipeline", {"_target_": "diffusers.QwenImagePipeline", "trust_remote_code": True}),
        ("model.facts", {"deep": [{"_target_": "builtins.eval"}]}),
        ("hydra", {"callbacks": {}}),
        ("extra", 1),
        ("device", 5),
        ("model", None),
        ("sampling.height", "64"),
        ("sampling.num_inference_steps", True),
        ("sampling.seed", -1),
        ("sampling.prompt", {"a": 1}),
        ("output.metadata", "yes"),
        ("vae", []),
        ("parallel.max_ranks", 1000),
        ("parallel", []),
    ],
)
def test_a_hostile_or_damaged_configuration_is_refused(config, path, value):
    *parents, name = path.split(".")
    section = config
    for part in parents:
        section = section[part]
    section[name] = value
    assert complaint(config)


def test_a_deeply_nested_configuration_is_refused(config):
    for _ in range(5000):
        config["model"]["facts"] = {"x": config["model"]["facts"]}
    assert "nested too deeply" in complaint(config)


def test_home_comes_back(config, monkeypatch):
    monkeypatch.setenv("HOME", "/home/bob")
    config["model"]["path"] = "~/weights"
    assert configured(config)["model"]["path"] == "/home/bob/weights"


def test_what_was_left_open_is_pinned_to_what_was_used(config):
    config.update(device="auto", dtype="bfloat16")
    used = {"weights": {"revision": "abc123"}, "device": "cuda", "dtype": "float32"}
    found = reader.RecordedRun(config, {**dict.fromkeys(reader.FACTS), **used}, [])
    pinned = replay.rebuild_config(found, [])
    assert (pinned["model"]["revision"], pinned["device"], pinned["dtype"]) == ("abc123", "cuda", "bfloat16")
    assert replay.rebuild_config(found, ["device=cpu"])["device"] == "cpu"


def test_another_checkpoint_does_not_inherit_the_recorded_revision(config):
    facts = {**dict.fromkeys(reader.FACTS), "weights": {"revision": "abc123"}}
    found = reader.RecordedRun(config, facts, [])
    assert replay.rebuild_config(found, ["model.path=/elsewhere"])["model"]["revision"] is None
    chosen = replay.rebuild_config(found, ["model.path=owner/other", "model.revision=v2"])
    assert chosen["model"]["revision"] == "v2"


# --- the comparison --------------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(tmp_path) -> tuple[np.ndarray, dict]:
    """Some pixels, written as the only picture of a run."""
    pixels = np.random.default_rng(0).integers(1, 255, (16, 16, 3), dtype=np.uint8)
    return pixels, written(pixels, tmp_path, "png")


def written(pixels: np.ndarray, folder: Path, kind: str, metadata: bool = False) -> dict:
    """Write `pixels` into `folder` as a run does; return its run.json."""
    config = {
        "model": {"name": "demo", "path": "package:demo"},
        "sampling": {"num_inference_steps": 4, "true_cfg_scale": None, "guidance_scale": None},
        "input": {"images": None},
        "output": {"format": kind, "fps": None if kind == "png" else 16},
    }
    writer = OutputWriter(folder, config, {"scheduler": "?", "versions": {"hydrarun": "?"}, "inputs": []}, metadata)
    writer.save(pixels, "a", None, 1, {})
    return writer.finish({"timings": {}, "memory": {}})


def compared(pixels: np.ndarray | None, record: dict, folder: Path, digest: str = "?") -> bool:
    return replay.compare_picture(reader.RecordedPicture("old.png", 0, digest, pixels), record, folder)


def test_equal_hashes_are_identical_even_without_the_old_pixels(drawn, tmp_path, capsys):
    pixels, record = drawn
    assert compared(None, record, tmp_path, hash_pixels(pixels))
    assert capsys.readouterr().out == "old.png: identical pixels\n"


def test_the_distance_is_the_largest_difference_and_the_psnr(drawn, tmp_path, capsys):
    pixels, record = drawn
    old = pixels.copy()
    old[0, 0, 0] += 1
    old[1, 1, 1] -= 1
    # mean squared error 2/768: 10 log10(255^2 * 384)
    assert not compared(old, record, tmp_path)
    assert capsys.readouterr().out == "old.png: different pixels, largest difference 1 of 255, PSNR 74.0 dB\n"


def test_other_sizes_and_lost_pixels_are_said(drawn, tmp_path, capsys):
    pixels, record = drawn
    assert not compared(pixels[:8], record, tmp_path)
    assert not compared(None, record, tmp_path)
    first, second = capsys.readouterr().out.splitlines()
    assert "16x8 then, 16x16 now" in first
    assert "no longer available" in second


def test_a_file_of_an_older_version_lacks_what_that_did_not_know(finished, tmp_path, capsys):
    record = json.loads((finished / "run.json").read_text())
    for section, name in ((record["config"], "batch_size"), (record["config"]["vae"], "channels_last")):
        del section[name]
    del record["config"]["plan"]
    (tmp_path / "run.json").write_text(json.dumps(record))
    for file in finished.glob("*.png"):
        shutil.copy(file, tmp_path)
    assert main.main(["replay", str(tmp_path / "run.json"), f"hydra.run.dir={tmp_path / 'again'}"]) in (0, 1)
    assert capsys.readouterr().out.count(".png: ") == 2
    # without `channels_last` other kernels decode; their rounding depends on the CPU: 1 of 255 at most
    for then, now in zip(sorted(finished.glob("*.png")), sorted((tmp_path / "again").glob("*.png")), strict=True):
        assert abs(png.read_png(now)[0].astype(int) - png.read_png(then)[0].astype(int)).max() <= 1
