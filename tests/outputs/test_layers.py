"""Layers: folders, names, metadata, records, measures, and their display in the report."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hydrarun.cli.recipe.pixel_digest import compare_fingerprints, compute_fingerprint, make_thumbnail
from hydrarun.core.errors import RunError
from hydrarun.outputs import reader
from hydrarun.outputs.media import alpha, frames, png
from hydrarun.outputs.provenance import hash_config
from hydrarun.outputs.quality.metrics import compare_outputs
from hydrarun.outputs.report import thumbnails
from hydrarun.outputs.writer import OutputWriter
from tests.outputs.test_writer import CONFIG, save, writer, written

LAYERS = np.random.default_rng(1).integers(0, 256, (3, 32, 48, 4), dtype=np.uint8)
ONE_COLOUR, TRANSPARENT = np.zeros_like(LAYERS[0]), LAYERS[1] * np.array([1, 1, 1, 0], np.uint8)
ONE_COLOUR[:] = (10, 200, 30, 255)


def layer_writer(folder: Path, metadata: bool = True) -> OutputWriter:
    config = {**CONFIG, "output": {"metadata": metadata, "format": "layers", "fps": None}}
    return writer(folder, config, metadata)


def folder_of(tmp_path: Path) -> Path:
    return tmp_path / "run" / save(layer_writer(tmp_path), pixels=LAYERS)["path"]


def test_layers_are_written_into_a_folder_and_recorded(tmp_path):
    record = save(layer_writer(tmp_path), pixels=LAYERS)
    folder = tmp_path / "run" / record["path"]
    assert record["path"] == f"0000-a-red-circle-7-{hash_config(CONFIG)}"
    assert written(tmp_path) == [record["path"]]
    assert sorted(file.name for file in folder.iterdir()) == ["layer-0.png", "layer-1.png", "layer-2.png"]
    assert record["pixels_sha256"] == hashlib.sha256(LAYERS.tobytes()).hexdigest()
    assert [record[key] for key in ("width", "height", "layers")] == [48, 32, 3]
    assert not {"sha256", "frames", "fps", "caption"} & record.keys()
    assert np.array_equal(frames.read_frames(folder)[0], LAYERS)


def test_every_layer_is_rgba_and_carries_the_recipe_and_its_own_hash(tmp_path):
    folder = folder_of(tmp_path)
    for number in range(3):
        path = folder / f"layer-{number}.png"
        pixels, recipe = png.read_png(path)
        assert np.array_equal(pixels, LAYERS[number])
        assert (recipe["layer"], recipe["layer_sha256"]) == (
            number,
            hashlib.sha256(LAYERS[number].tobytes()).hexdigest(),
        )
        assert recipe["pixels_sha256"] == hashlib.sha256(LAYERS.tobytes()).hexdigest()
        with Image.open(path) as image:
            assert image.mode == "RGBA"
            assert ", Size: 48x32, Layers: 3, Model: demo" in image.text["parameters"]


def test_a_caption_is_recorded_beside_the_prompt_that_was_blank(tmp_path):
    target = layer_writer(tmp_path)
    record = target.save(LAYERS, "", None, 7, {}, caption="a cat on a sofa")
    assert (record["prompt"], record["caption"]) == ("", "a cat on a sofa")
    assert record["path"].startswith("0000-layers-7-")
    with Image.open(tmp_path / "run" / record["path"] / "layer-1.png") as image:
        assert image.text["parameters"].startswith("a cat on a sofa\n")
        recipe = json.loads(image.text["hydrarun"])
    assert (recipe["caption"], recipe["config"]["sampling"]["prompt"]) == ("a cat on a sofa", "")


def test_some_layers_may_be_of_one_colour_or_transparent(tmp_path):
    save(layer_writer(tmp_path), pixels=np.stack([ONE_COLOUR, TRANSPARENT, LAYERS[0]]))


@pytest.mark.parametrize("layers", [[ONE_COLOUR], [TRANSPARENT], [ONE_COLOUR, TRANSPARENT, np.zeros_like(ONE_COLOUR)]])
def test_not_all_of_them(tmp_path, layers):
    wanted = "the layered picture for seed 7 .* is all one colour or transparent in every layer; nothing was written"
    with pytest.raises(RunError, match=wanted):
        save(layer_writer(tmp_path), pixels=np.stack(layers))
    assert written(tmp_path) == []


def test_a_folder_and_one_of_its_layers_are_read_as_what_they_are(tmp_path):
    folder = folder_of(tmp_path)
    (whole,) = reader.load_recorded_run(folder).pictures
    assert np.array_equal(whole.pixels, LAYERS)
    assert whole.part is None
    (one,) = reader.load_recorded_run(folder / "layer-2.png").pictures
    assert np.array_equal(one.pixels, LAYERS[2])
    assert one.part == "layer-2.png"


def test_measures_are_of_what_can_be_seen():
    hidden = LAYERS.copy()
    hidden[LAYERS[..., 3] == 0] = 0
    hidden[0, :16, :16] = (9, 9, 9, 0)
    other = hidden.copy()
    other[0, :16, :16, :3] = 200
    assert compare_outputs(hidden, other, ["psnr", "ssim"]) == {"psnr": 100.0, "ssim": pytest.approx(1.0)}
    other[0, :16, :16, 3] = 255
    error = np.square(alpha.premultiply_alpha(hidden).astype(float) - alpha.premultiply_alpha(other)).mean()
    measured = compare_outputs(hidden, other, ["psnr", "ssim"])
    assert measured["psnr"] == pytest.approx(10 * np.log10(255**2 / error))
    assert measured["ssim"] < 0.99


def test_a_report_shows_them_side_by_side(tmp_path):
    file = folder_of(tmp_path)
    pixels = thumbnails.read_pixels(file)
    assert np.array_equal(pixels, LAYERS)
    nearly = LAYERS.copy()
    nearly[1, 3, 4] = 255 - nearly[1, 3, 4]
    apart = thumbnails.measure_difference(LAYERS, nearly, 512)
    assert apart.psnr == pytest.approx(compare_outputs(LAYERS, nearly, ["psnr"])["psnr"])
    assert apart.pixels.shape == (32, 144, 3)
    assert np.argwhere(apart.pixels.any(axis=-1)).tolist() == [[3, 52]]
    shown = thumbnails.build_cell_media(file, pixels, 16, apart, 512)
    assert (shown.size, shown.reduced, shown.video) == ((48, 32), False, None)
    assert shown.image.startswith("data:image/webp;base64,")


def test_what_a_recipe_keeps_of_them_tells_layers_and_alpha_apart():
    kept = compute_fingerprint(LAYERS)
    assert compare_fingerprints(kept, compute_fingerprint(LAYERS)) == 100
    assert compare_fingerprints(kept, compute_fingerprint(LAYERS[:2])) == 0
    opaque = LAYERS.copy()
    opaque[..., 3] = 255
    assert compare_fingerprints(kept, compute_fingerprint(opaque)) < 15
    assert make_thumbnail(LAYERS)[8:12] == b"WEBP"
