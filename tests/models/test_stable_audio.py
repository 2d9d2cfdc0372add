"""Stable Audio Open: details that the parity tests of whole runs do not cover, such as writing and reading sounds."""

from __future__ import annotations

import json
import re
import wave
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb, get_1d_rotary_pos_embed

from hydrarun.cli import main
from hydrarun.cli.recipe import pixel_digest
from hydrarun.config.checks.checkpoint import check_heads, check_request_fit, max_sound_seconds
from hydrarun.core.errors import RunError, UsageError
from hydrarun.models.layers.rope import make_frequencies, rotate_halves
from hydrarun.models.stable_audio import StableAudioTransformer
from hydrarun.outputs import reader
from hydrarun.outputs.media import wav
from hydrarun.outputs.quality.metrics import compare_outputs
from hydrarun.pipeline.stages.sound import DecodeSound
from hydrarun.pipeline.vae import configure_vae
from tests.helpers import checkpoints, tiny
from tests.helpers.subjects import SHORT

TOLERANCE = 1e-5  # float32, the same operations in another order
#: sample rate of the tiny checkpoint, and samples of a full-length sound
RATE, SAMPLES = 4, 192
PUBLISHED: dict[str, Any] = {"downsampling_ratios": [2, 4, 4, 8, 8], "sampling_rate": 44100}

only = pytest.mark.parametrize("subject", ["stable_audio"], indirect=True)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """diffusers' transformer, and ours loaded from the files it saved."""
    reference = checkpoints.BUILDERS["stable_audio"]().transformer
    folder = tmp_path_factory.mktemp("transformer")
    reference.save_pretrained(folder)
    return reference, tiny.load_transformer(StableAudioTransformer, folder)


@pytest.mark.parametrize("length", [24, 5, 31])
@torch.no_grad()
def test_one_call_and_its_gate_signal(pair, length):
    """Compares the prediction and the input of the first block's attention, for any number of latents."""
    reference, ours = pair
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, length, generator=generator)
    text, seconds = torch.randn(2, 9, 24, generator=generator), torch.randn(2, 1, 48, generator=generator)
    timestep = torch.tensor([0.71, 0.71])
    seen = []
    hook = reference.transformer_blocks[0].attn1.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    rotary = get_1d_rotary_pos_embed(4, length + 1, use_real=True, repeat_interleave_real=False)
    want = reference(latents, timestep, text, seconds, rotary, return_dict=False)[0]
    hook.remove()
    given = {"encoder_hidden_states": text, "global_hidden_states": seconds}
    found = tiny.predict(ours, latents, timestep, given)
    assert found.shape == want.shape == latents.shape
    assert (found - want).abs().max() <= TOLERANCE
    signal = ours.gate_signal(ours.embed(latents, timestep, **given))
    assert (signal - seen[0]).abs().max() <= TOLERANCE


def test_a_part_of_the_channels_is_turned_in_halves():
    x = torch.randn(2, 7, 3, 20, generator=torch.Generator().manual_seed(0))
    rotary = get_1d_rotary_pos_embed(8, 7, use_real=True, repeat_interleave_real=False)
    turned = apply_rotary_emb(x[..., :8].transpose(1, 2), rotary, use_real=True, use_real_unbind_dim=-2).transpose(1, 2)
    found = rotate_halves(x, make_frequencies(torch.arange(7), 8))
    assert (found[..., :8] - turned).abs().max() <= 1e-6
    assert torch.equal(found[..., 8:], x[..., 8:])
    half = rotate_halves(x.bfloat16(), make_frequencies(torch.arange(7), 8))
    assert half.dtype == torch.bfloat16
    assert (half.float() - found).abs().max() < 0.05


@only
def test_a_sound_hangs_on_its_seed_alone(subject):
    """The scheduler's noise does too; neither depends on the batch or on the global random generator."""
    torch.manual_seed(1)
    batch = subject.draw(prompt=[SHORT, SHORT], seed=[3, 4], num_inference_steps=5)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    alone = subject.draw(prompt=SHORT, seed=4, num_inference_steps=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert (alone.latents[0] - batch.latents[1]).abs().max() <= 1e-4
    assert (batch.latents[0] - batch.latents[1]).abs().max() > 0.1
    assert torch.equal(subject.draw(prompt=SHORT, seed=4, num_inference_steps=5).latents, alone.latents)


@only
def test_an_empty_negative_prompt_is_not_none(subject):
    fields = {"guidance_scale": 3.0, "num_inference_steps": 2}
    none = subject.draw(**fields, negative_prompt=None)
    assert not none.conditioning["negative"]["encoder_hidden_states"].any()
    assert (
        none.conditioning["negative"]["global_hidden_states"] is none.conditioning["positive"]["global_hidden_states"]
    )
    assert (subject.draw(**fields, negative_prompt="").latents - none.latents).abs().max() > 1e-2


@only
@pytest.mark.parametrize(("start", "end"), [(0.0, None), (0.0, 10.0), (5.3, 31.0), (47.9, 48.0), (0.3, 0.6)])
def test_the_part_that_is_asked_for(subject, start, end):
    """Cuts from `int(start * rate)` to `int(end * rate)` like the reference. The samples equal the whole sound's."""
    state = subject.draw(audio_start_in_s=start, audio_end_in_s=end, num_inference_steps=1)
    first, stop = int(start * RATE), int((end or 48.0) * RATE)
    assert state.frames.shape == (1, stop - first, 2)
    parts = subject.runner.built.parts
    state.audio_start_in_s, state.audio_end_in_s = 0.0, None
    DecodeSound()(state, parts, None)
    assert state.frames.shape == (1, SAMPLES, 2)
    again = state.frames[:, first:stop]
    state.audio_start_in_s, state.audio_end_in_s = start, end
    DecodeSound()(state, parts, None)
    assert np.array_equal(state.frames, again)


@only
def test_what_is_too_loud_is_cut_off_and_said(subject, monkeypatch):
    parts, said = subject.runner.built.parts, []
    state = subject.draw(num_inference_steps=1)
    monkeypatch.setattr(parts.progress, "note", said.append)
    quiet = state.frames.astype(int)
    loud = parts.pipeline.vae.decode(state.latents).sample * 40
    monkeypatch.setattr(parts.pipeline.vae, "decode", lambda latents: type("Sound", (), {"sample": loud}))
    DecodeSound()(state, parts, None)
    beyond = float((loud.abs() > 1).float().mean())
    assert 0.05 < beyond < 1
    assert said == [f"cut off at full scale: {100 * beyond:.2g} % of the samples"]
    assert state.frames.max() == -state.frames.min() == 32767
    assert np.array_equal(np.sign(state.frames[np.abs(quiet) > 9]), np.sign(quiet[np.abs(quiet) > 9]))
    loud[0, 0, 0] = torch.nan
    with pytest.raises(RunError, match="the VAE decoded NaN or infinity"):
        DecodeSound()(state, parts, None)


@only
def test_tiles_of_the_vae_draw_nearly_the_same(subject):
    vae = subject.pipeline.vae
    latents = torch.randn(2, 4, 24, generator=torch.Generator().manual_seed(0))
    settings = {"slicing": True, "tiling": True, "channels_last": False}
    with torch.inference_mode():
        plain = vae.decode(latents).sample
        configure_vae(vae, settings, None)
        vae.tile_latent_min_length, vae.tile_latent_overlap = 16, 5
        try:
            tiled = vae.decode(latents).sample
        finally:
            vae.disable_tiling()
            vae.disable_slicing()
    assert tiled.shape == plain.shape
    assert 0 < (tiled - plain).abs().max() < 0.3 * plain.abs().max()


# --- from the command line -------------------------------------------------------------------------------------------


def run(subject, folder: Path, *overrides: str) -> dict[str, Any]:
    """Run a command that must succeed and return its run.json."""
    words = [*subject.overrides(), "sampling.num_inference_steps=3", f"hydra.run.dir={folder}"]
    if any(word.startswith("input.prompts=") for word in overrides):
        words.remove("sampling.prompt=a cat")
    assert main.main([*words, *overrides]) == 0
    return json.loads((folder / "run.json").read_text())


@only
def test_a_command_writes_a_wav_that_is_drawn_again_from_itself(subject, tmp_path, capsys):
    """Two readers decode it to the requested seconds; its recipe and run.json state its length."""
    asked = ("sampling.audio_start_in_s=2.5", "sampling.audio_end_in_s=40", "sampling.num_images_per_prompt=2")
    record = run(subject, tmp_path / "run", *asked)
    assert record["sample_rate"] == RATE
    count = round(37.5 * RATE)
    for output in record["outputs"]:
        file = tmp_path / "run" / output["path"]
        assert re.fullmatch(r"000\d-a-cat-\d-[0-9a-f]{8}\.wav", file.name)
        told = {key: output[key] for key in ("duration_s", "sample_rate", "samples", "channels")}
        assert told == {"duration_s": 37.5, "sample_rate": RATE, "samples": count, "channels": 2}
        with av.open(str(file)) as container:
            samples = np.concatenate([frame.to_ndarray().reshape(-1, 2) for frame in container.decode(audio=0)])
            assert container.streams.audio[0].rate == RATE
            assert "Seconds: 37.5, Sample rate: 4, Model: stable_audio" in container.metadata["ISBJ"]
        with wave.open(str(file)) as other:
            assert (other.getnframes(), other.getframerate(), other.getnchannels()) == (count, RATE, 2)
            assert other.readframes(count) == samples.tobytes()
        assert len(samples) == count
        assert wav.read_wav(file)[1]["config"]["sampling"]["audio_end_in_s"] == 40
    drawn = reader.load_recorded_run(file).pictures[0]
    assert (drawn.index, drawn.lossy) == (1, False)
    assert np.array_equal(drawn.pixels, samples)
    assert main.main(["replay", str(file), f"hydra.run.dir={tmp_path / 'again'}"]) == 0
    assert capsys.readouterr().out.endswith(f"{file.name}: identical samples\n")
    changed = ["replay", str(file), f"hydra.run.dir={tmp_path / 'other'}", "sampling.guidance_scale=3"]
    assert main.main(changed) == 1
    found = re.search(
        r"different samples, largest difference (\d+) of 65535, PSNR ([\d.]+) dB", capsys.readouterr().out
    )
    other = wav.read_wav(next((tmp_path / "other").glob("0001-*.wav")))[0].astype(int)
    assert int(found[1]) == np.abs(other - samples).max()
    assert float(found[2]) == pytest.approx(10 * np.log10(65535**2 / np.square(other - samples).mean()), abs=0.06)


@only
def test_a_batch_its_quality_and_its_report(subject, tmp_path):
    lines = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "rain"}, {"prompt": "a bell", "audio_end_in_s": 10.0, "seed": 3}, {"prompt": "wind", "seed": 1}]
    lines.write_text("\n".join(map(json.dumps, rows)))
    words = [
        "batch_size=2",
        "report.metrics=[snr]",
        f"report.twins={tmp_path / 'twins'}",
        "cache=every_n",
        "cache.gate.n=2",
    ]
    record = run(subject, tmp_path / "run", f"input.prompts={lines}", "sampling.num_inference_steps=5", *words)
    assert [output["duration_s"] for output in record["outputs"]] == [48.0, 10.0, 48.0]
    twins = {
        seed: wav.read_wav(file)[0] for seed in (0, 1, 3) for file in (tmp_path / "twins").glob(f"*/*-{seed}-*.wav")
    }
    for output in record["outputs"]:
        samples, twin = (
            wav.read_wav(tmp_path / "run" / output["path"])[0].astype(float),
            twins[output["seed"]].astype(float),
        )
        want = 10 * np.log10(np.square(twin).mean() / np.square(samples - twin).mean())
        assert output["quality"]["snr"] == pytest.approx(want)
        assert want < 60
    assert record["quality"]["snr"]["worst"] == min(output["quality"]["snr"] for output in record["outputs"])
    assert main.main(["report", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count('<audio controls preload="metadata" src="data:audio/wav;base64,') == 3
    assert page.count(f"SNR {record['outputs'][0]['quality']['snr']:.1f} dB") >= 1
    assert "48.0 s, 10.0 s" in page


@only
@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("output.format=png", r"output.format .*: 'png': model stable_audio draws sounds: wav\."),
        ("output.format=mp4", r"output.format .*: 'mp4': model stable_audio draws sounds: wav\."),
        ("output.fps=16", r"output.fps .*: 16: model stable_audio draws sounds, which have none\."),
        ("sampling.height=64", r"sampling.height .*: model stable_audio does not take it: it draws sounds\."),
        ("sampling.audio_start_in_s=null", r"sampling.audio_start_in_s .*: null, and model stable_audio needs it\."),
        (
            "sampling.audio_start_in_s=-1",
            r"sampling.audio_start_in_s .*: -1.0 is not a finite number >= 0\.",
        ),
        (
            "sampling.audio_end_in_s=48.5",
            r"sampling.audio_end_in_s=48.5: this checkpoint's sounds are 48.00 s long; .*null",
        ),
        (
            "sampling.audio_start_in_s=48",
            r"sampling.audio_start_in_s=48: leaves nothing of a sound that ends at 48 s; ",
        ),
        (
            "report.metrics=[psnr]",
            r"report.metrics .*: 'psnr' measures videos, layered pictures, pictures, but model stable_audio draws"
            r" sounds\. Use snr\.",
        ),
        (
            "parallel.vae_degree=2",
            r"parallel.vae_degree: ranks share the rows of a picture, and a sound has none. Use ",
        ),
        ("parallel.tensor_degree=4", r"parallel.tensor_degree=4: this checkpoint has 3 groups of heads, .*=3 at most"),
    ],
)
def test_what_a_sound_has_not_is_refused_in_words(subject, override, sentence, capsys):
    assert main.main([*subject.overrides(), override]) == 2
    assert re.search(sentence, capsys.readouterr().err)


def test_other_models_draw_no_sounds(capsys):
    for override, sentence in (
        ("output.format=wav", "'wav': model demo draws pictures: png."),
        ("report.metrics=[snr]", "'snr' measures sounds, but model demo draws pictures. Use psnr, ssim."),
        ("sampling.audio_end_in_s=3", "model demo does not take it"),
    ):
        assert main.main([override]) == 2
        assert sentence in capsys.readouterr().err


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_the_published_length():
    """It is 47.55 s, which is every sample that the VAE decodes."""
    seconds = max_sound_seconds(PUBLISHED, {"sample_size": 1024})
    assert seconds == pytest.approx(47.554, abs=1e-3)
    assert int(seconds * 44100) == 1024 * 2048
    sampling = {"height": None, "width": None, "num_frames": None, "audio_start_in_s": 0.0}
    check_request_fit({**sampling, "audio_end_in_s": seconds}, PUBLISHED, {"sample_size": 1024}, 1)
    with pytest.raises(UsageError, match=r"audio_end_in_s=47\.6: this checkpoint's sounds are 47\.55 s long"):
        check_request_fit({**sampling, "audio_end_in_s": 47.6}, PUBLISHED, {"sample_size": 1024}, 1)


def test_a_recipe_tells_sounds_apart_by_their_loudness_over_time():
    time = np.arange(20000)
    bell = np.round(20000 * np.exp(-time / 4000) * np.sin(time / 9))[:, None].astype(np.int16)
    nearly = (bell + np.random.default_rng(0).integers(-20, 21, bell.shape)).astype(np.int16)
    first, second, other = (pixel_digest.compute_fingerprint(sound) for sound in (bell, nearly, bell[::-1]))
    assert pixel_digest.compare_fingerprints(first, second) > 30 > pixel_digest.compare_fingerprints(first, other)
    assert pixel_digest.measure_loudness(np.array([[0, 0], [-32768, 5]], np.int16)).tolist() == [0] * 384 + [255] * 384
    assert pixel_digest.make_thumbnail(bell)[8:12] == b"WEBP"


def test_groups_of_heads_are_what_ranks_share():
    check_heads(12, {"num_attention_heads": 24, "num_key_value_attention_heads": 12})
    with pytest.raises(UsageError, match="12 groups of heads"):
        check_heads(13, {"num_attention_heads": 24, "num_key_value_attention_heads": 12})


def test_snr_is_the_twins_power_over_the_differences():
    twin = np.array([[3000], [-4000]], np.int16)
    assert compare_outputs(twin + np.int16(5), twin, ["snr"]) == {"snr": pytest.approx(10 * np.log10(12.5e6 / 25))}
    assert compare_outputs(twin, twin, ["snr"]) == {"snr": 100.0}
    extremes = np.array([[32767], [-32767]], np.int16)
    assert compare_outputs(-extremes, extremes, ["snr"])["snr"] == pytest.approx(-6.02, abs=0.01)


@only
def test_calibrating(subject, tmp_path, capsys):
    """Calibrates TeaCache, whose polynomial is then used in a run, and a mask, which is scored by SNR."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("rain\na bell\n")
    plain = [word for word in subject.overrides() if "prompt=" not in word]
    words = [*plain, "sampling.num_inference_steps=5", f"input.prompts={prompts}"]
    for cache in (["cache=teacache"], ["cache=mask", "cache.budget=0.6", "cache.evaluations=4"]):
        assert main.main(["calibrate", *words, *cache, f"hydra.run.dir={tmp_path}"]) == 0
    assert re.search(
        r"best: latents' mean squared error [\d.e-]+, SNR -?[\d.]+ dB, computed \[0, ", capsys.readouterr().out
    )
    (option,) = (tmp_path / "cache").glob("*teacache*.yaml")
    assert "fitted by hydrarun calibrate" in option.read_text()
    asked = [
        f"--config-dir={tmp_path}",
        f"cache={option.stem}",
        "sampling.num_inference_steps=5",
        "cache.gate.threshold=1000000",
    ]
    record = run(subject, tmp_path / "run", *asked)
    assert record["cache"]["blocks"]["run"] < record["cache"]["blocks"]["all"]
