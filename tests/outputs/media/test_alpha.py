"""Layers with alpha: how they are compared and displayed."""

import numpy as np

from hydrarun.outputs.media import alpha, frames, kinds, png

GENERATOR = np.random.default_rng(0)
LAYERS = GENERATOR.integers(0, 256, (3, 20, 12, 4), dtype=np.uint8)


def test_colours_are_multiplied_by_alpha():
    found = alpha.premultiply_alpha(LAYERS)
    wanted = np.round(LAYERS[..., :3].astype(float) * LAYERS[..., 3:] / 255)
    assert np.array_equal(found[..., :3], wanted)
    assert np.array_equal(found[..., 3], LAYERS[..., 3])


def test_what_cannot_be_seen_is_equal():
    one, other = LAYERS.copy(), LAYERS.copy()
    one[..., 3] = other[..., 3] = 0
    other[..., :3] = 0
    assert np.array_equal(alpha.make_comparable(one), alpha.make_comparable(other))
    assert alpha.make_comparable(LAYERS[..., :3]) is not None
    assert np.array_equal(alpha.make_comparable(LAYERS[..., :3]), LAYERS[..., :3])


def test_layers_stand_side_by_side_over_a_checkerboard():
    layers = LAYERS.copy()
    layers[0, ..., 3], layers[1, ..., 3] = 255, 0
    shown = alpha.draw_side_by_side(layers)
    assert shown.shape == (20, 36, 3)
    assert np.array_equal(shown[:, :12], layers[0, ..., :3])
    squares = [int(shown[row, 12 + column, 0]) for row, column in ((0, 0), (0, 8), (8, 0), (8, 8))]
    assert squares == [255, 204, 204, 255]
    assert set(np.unique(shown[:, 12:24])) == {204, 255}


def test_what_stands_for_an_output():
    video = LAYERS[..., :3]
    for pixels, want in ((video, video[1]), (video[0], video[0])):
        assert np.array_equal(kinds.find_array_kind(pixels).still(pixels), want)
    assert kinds.find_array_kind(LAYERS) is kinds.LAYERS
    assert kinds.LAYERS.still(LAYERS).shape == (20, 36, 3)


def test_a_png_keeps_alpha(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png.encode_png(LAYERS[0], {"hydrarun": '{"a": 1}'}))
    pixels, record = png.read_png(path)
    assert np.array_equal(pixels, LAYERS[0])
    assert record == {"a": 1}


def test_a_folder_of_layers_in_the_order_of_their_numbers(tmp_path):
    many = np.concatenate([LAYERS] * 4)
    many[:, 0, 0, 0] = np.arange(12)
    frames.write_frames(tmp_path / "layers", many, [{"hydrarun": f'{{"layer": {n}}}'} for n in range(12)], "layers")
    names = {f"layer-{number}.png" for number in range(12)}
    assert {file.name for file in (tmp_path / "layers").iterdir()} == names
    pixels, record = frames.read_frames(tmp_path / "layers")
    assert np.array_equal(pixels, many)
    assert record == {"layer": 0}
