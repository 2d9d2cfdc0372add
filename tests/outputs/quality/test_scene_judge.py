"""The judge accepts right pictures and detects each kind of mistake, at several sizes."""

import random
from dataclasses import replace

import numpy as np
import pytest

from hydrarun.outputs.quality.scene_judge import judge_pairs, judge_picture, sample_held_out_prompts, summarize_verdicts
from hydrarun.outputs.quality.scenes import (
    COLORS,
    SHAPES,
    SIZES,
    caption_scene,
    is_held_out,
    parse_caption,
    render_scene,
    sample_scene,
)


def _scenes(count, seed=3):
    rng = random.Random(seed)
    return [sample_scene(rng, held_out=None) for _ in range(count)]


def _other(rng, choices, *taken):
    return rng.choice([choice for choice in choices if choice not in taken])


def _with_object(scene, index, **changes):
    objects = list(scene.objects)
    objects[index] = replace(objects[index], **changes)
    return replace(scene, objects=tuple(objects))


def _wrong_background(scene, rng):
    return replace(scene, background=_other(rng, COLORS, scene.background, *(o.color for o in scene.objects)))


def _wrong_color(scene, rng):
    index = rng.randrange(len(scene.objects))
    return _with_object(scene, index, color=_other(rng, COLORS, scene.background, scene.objects[index].color))


def _wrong_shape(scene, rng):
    index = rng.randrange(len(scene.objects))
    return _with_object(scene, index, shape=_other(rng, SHAPES, scene.objects[index].shape))


def _wrong_place(scene, rng):
    """Turn a pair or triple by 90 degrees, or move a single object to another corner."""
    if len(scene.objects) == 1:
        obj = scene.objects[0]
        x, y = (1 - obj.x, obj.y) if scene.layout == "corner" else (rng.choice([0.25, 0.75]), 0.25)
        return _with_object(scene, 0, x=x, y=y)
    if scene.layout == "diagonal":
        return replace(scene, objects=tuple(replace(o, y=1 - o.y) for o in scene.objects))
    return replace(scene, objects=tuple(replace(o, x=o.y, y=o.x) for o in scene.objects))


def _wrong_size(scene, rng):
    index = rng.randrange(len(scene.objects))
    radius = _other(rng, SIZES.values(), scene.objects[index].radius)
    return _with_object(scene, index, radius=radius)


@pytest.mark.parametrize("size", [64, 128, 256])
def test_drawn_scenes_are_right(size):
    scenes = _scenes({64: 100, 128: 300, 256: 25}[size])
    accuracy = judge_pairs((render_scene(scene, size), caption_scene(scene)) for scene in scenes)
    assert accuracy.pictures == len(scenes)
    assert accuracy.right >= 0.99
    assert accuracy.right_with_size >= 0.99


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize(
    ("mutate", "attribute", "least"),
    [
        (_wrong_color, "color", 0.99),
        (_wrong_shape, "shape", 0.99),
        (_wrong_place, "position", 0.97),
    ],
)
def test_a_wrong_object_is_noticed(mutate, attribute, least, size):
    rng = random.Random(5)
    verdicts = [judge_picture(render_scene(mutate(scene, rng), size), caption_scene(scene)) for scene in _scenes(100)]
    assert np.mean([not verdict.right for verdict in verdicts]) >= least
    assert np.mean([not all(getattr(o, attribute) for o in verdict.objects) for verdict in verdicts]) >= least


@pytest.mark.parametrize("size", [64, 128])
def test_a_wrong_background_is_noticed_where_it_is_said(size):
    rng = random.Random(6)
    said = [scene for scene in _scenes(150) if scene.background_said]
    verdicts = [
        judge_picture(render_scene(_wrong_background(scene, rng), size), caption_scene(scene)) for scene in said
    ]
    assert np.mean([not verdict.background for verdict in verdicts]) >= 0.99
    assert np.mean([not verdict.right for verdict in verdicts]) >= 0.99


@pytest.mark.parametrize("size", [64, 128])
def test_a_wrong_size_is_noticed_and_costs_only_the_size(size):
    rng = random.Random(7)
    sized = [scene for scene in _scenes(150) if len(scene.objects) < 3]
    verdicts = [judge_picture(render_scene(_wrong_size(scene, rng), size), caption_scene(scene)) for scene in sized]
    assert np.mean([not verdict.right_with_size for verdict in verdicts]) >= 0.99
    assert np.mean([verdict.right for verdict in verdicts]) >= 0.95


def test_swapped_places_of_different_objects_are_noticed():
    scene = parse_caption("a red circle above a blue square on a yellow background")
    first, second = scene.objects
    swapped = replace(scene, objects=(replace(first, y=second.y), replace(second, y=first.y)))
    assert not judge_picture(render_scene(swapped), caption_scene(scene)).right


def test_an_object_too_many_and_one_too_few_are_noticed():
    text = "a red circle in the top left on a yellow background"
    scene = parse_caption(text)
    extra = replace(scene, objects=(*scene.objects, replace(scene.objects[0], color="blue", x=0.75, y=0.75)))
    verdict = judge_picture(render_scene(extra), text)
    assert not verdict.clean
    assert not verdict.right
    scrap = render_scene(scene).copy()
    scrap[90:98, 90:98] = COLORS["red"]
    assert not judge_picture(scrap, text).clean
    empty = judge_picture(render_scene(replace(scene, objects=())), text)
    assert not empty.objects[0].present
    assert not empty.right


def test_noise_blank_pictures_and_squeezed_shapes_are_not_right():
    rng = np.random.default_rng(0)
    text = "a large red circle above a small blue square on a yellow background"
    assert not judge_picture(rng.integers(0, 256, (128, 128, 3), dtype=np.uint8), text).right
    assert not judge_picture(np.full((128, 128, 3), COLORS["yellow"], np.uint8), text).right
    # A 2:1 rectangle fills its bounding box like a square, but is not a square.
    flat = render_scene(parse_caption(text)).copy()
    flat[72:120, 40:88] = COLORS["yellow"]
    flat[88:104, 48:80] = COLORS["blue"]
    assert not judge_picture(flat, text).objects[1].shape


def test_slight_noise_is_forgiven():
    rng = np.random.default_rng(1)
    pairs = []
    for scene in _scenes(50):
        noisy = render_scene(scene).astype(np.int16) + rng.integers(-12, 13, (128, 128, 3))
        pairs.append((noisy.clip(0, 255).astype(np.uint8), caption_scene(scene)))
    assert judge_pairs(pairs).right_with_size >= 0.98


def test_large_pictures_are_reduced_before_judging():
    scene = _scenes(1)[0]
    assert judge_picture(render_scene(scene, 512), caption_scene(scene)).right_with_size


def test_held_out_prompts_are_fixed_different_and_never_trained_on():
    prompts = sample_held_out_prompts(200)
    assert len(set(prompts)) == 200
    assert prompts == sample_held_out_prompts(200)
    assert prompts[:48] == sample_held_out_prompts(48)
    assert all(is_held_out(prompt) and parse_caption(prompt).background_said for prompt in prompts)


def test_what_cannot_be_judged_is_refused():
    picture = np.zeros((128, 128, 3), np.uint8)
    with pytest.raises(ValueError, match="'hexagon'"):
        judge_picture(picture, "a red hexagon")
    with pytest.raises(ValueError, match="too small"):
        judge_picture(picture[:32, :32], "a red circle")
    with pytest.raises(ValueError, match="square uint8"):
        judge_picture(picture[:64], "a red circle")
    with pytest.raises(ValueError, match="square uint8"):
        judge_picture(picture.astype(np.float32), "a red circle")
    with pytest.raises(ValueError, match="no picture"):
        summarize_verdicts([])
