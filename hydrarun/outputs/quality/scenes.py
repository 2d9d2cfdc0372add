"""Captioned scenes of coloured shapes: sampling, writing and parsing captions, drawing.

A scene is a plain background with one to three flat shapes. Lengths are fractions of the picture's side, so a scene can
be drawn at any size. Centres lie on the 8-pixel grid of a 128-pixel picture (one latent cell of an 8x auto-encoder) and
radii are discrete: a shape then has the same latents at any place, which a small model learns much faster.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 39, 40),
    "green": (40, 150, 60),
    "blue": (40, 80, 215),
    "yellow": (245, 215, 50),
    "orange": (245, 135, 25),
    "purple": (135, 60, 175),
    "white": (245, 245, 245),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "star")
# Radius of the unit outline below as a fraction of the side; "" is an object without a size word.
SIZES = {"small": 0.13, "": 0.18, "large": 0.235}
# Three large shapes do not fit side by side, so rows and columns use this radius and no size words.
TRIPLE_RADIUS = 0.15
LAYOUTS = {"one": 14, "corner": 12, "vertical": 22, "horizontal": 22, "diagonal": 10, "row": 10, "column": 10}
HELD_OUT_MODULUS = 16
SUPERSAMPLING = 4

_NEAR, _MIDDLE, _FAR = 0.25, 0.5, 0.75
_TRIPLE_CENTRES = (24 / 128, 64 / 128, 104 / 128)
JITTER = 16 / 128  # maximum shift of a scene from the middle along its free axis; two latent cells


def _outline_shape(shape: str) -> list[tuple[float, float]]:
    """Return the corner points of the shape with radius 1 around the origin, y pointing down."""
    if shape == "circle":
        angles = [2 * math.pi * k / 48 for k in range(48)]
        return [(0.92 * math.cos(a), 0.92 * math.sin(a)) for a in angles]
    if shape == "square":
        return [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]
    if shape == "triangle":
        return [(0.0, -0.95), (1.0, 0.78), (-1.0, 0.78)]
    radii = (1.05, 0.43)
    return [(math.sin(k * math.pi / 5) * radii[k % 2], -math.cos(k * math.pi / 5) * radii[k % 2]) for k in range(10)]


OUTLINES = {shape: _outline_shape(shape) for shape in SHAPES}


@dataclass(frozen=True)
class SceneObject:
    """One flat shape. `x`, `y` and `radius` are fractions of the picture's side; `size` is the size word or ""."""

    shape: str
    color: str
    size: str = ""
    x: float = _MIDDLE
    y: float = _MIDDLE
    radius: float = SIZES[""]


@dataclass(frozen=True)
class Scene:
    """The content of a picture, objects in reading order (top to bottom, then left to right).

    `background` is None only for a parsed caption without a background. `background_said`: whether the caption names
    it. `reversed_wording` selects "b below a" over "a above b", and adds " in the center" to a single object: the scene
    is the same.
    """

    layout: str
    background: str | None
    background_said: bool
    objects: tuple[SceneObject, ...]
    reversed_wording: bool = False


# ---------------------------------------------------------------- placement


def _place_object(obj: SceneObject, x: float, y: float) -> SceneObject:
    return replace(obj, x=x, y=y, radius=SIZES[obj.size])


def place_objects(layout: str, objects: list[SceneObject], variant: str, shift: float) -> tuple[SceneObject, ...]:
    """Return the objects with their centres and radii.

    `variant` is the corner ("top left") of a corner scene, or of the first object of a diagonal scene. `shift`
    (fraction of the side) moves the scene along the axis its caption leaves open, and is ignored if there is none.
    """
    if layout == "one":
        return (_place_object(objects[0], _MIDDLE + shift, _MIDDLE),)
    if layout == "corner":
        return (_place_object(objects[0], *_find_corner(variant)),)
    if layout == "vertical":
        return tuple(_place_object(o, _MIDDLE + shift, y) for o, y in zip(objects, (_NEAR, _FAR), strict=True))
    if layout == "horizontal":
        return tuple(_place_object(o, x, _MIDDLE + shift) for o, x in zip(objects, (_NEAR, _FAR), strict=True))
    if layout == "diagonal":
        first_x, first_y = _find_corner(variant)
        return (_place_object(objects[0], first_x, first_y), _place_object(objects[1], 1 - first_x, 1 - first_y))
    centres = [(c, _MIDDLE + shift) if layout == "row" else (_MIDDLE + shift, c) for c in _TRIPLE_CENTRES]
    return tuple(replace(o, x=x, y=y, radius=TRIPLE_RADIUS) for o, (x, y) in zip(objects, centres, strict=True))


def _find_corner(name: str) -> tuple[float, float]:
    return (_NEAR if "left" in name else _FAR, _NEAR if "top" in name else _FAR)


def name_corner(obj: SceneObject) -> str:
    """Return the name of the quarter that contains the object, such as "top left"."""
    return f"{'top' if obj.y < _MIDDLE else 'bottom'} {'left' if obj.x < _MIDDLE else 'right'}"


# ---------------------------------------------------------------- sampling


def sample_scene(rng: random.Random, held_out: bool | None = False) -> Scene:
    """Sample a scene. `held_out`: False for captions of the training split, True for the test split, None for both."""
    while True:
        scene = _sample_any(rng)
        if held_out is None or is_held_out(caption_scene(scene)) == held_out:
            return scene


def _sample_any(rng: random.Random) -> Scene:
    background = rng.choice(list(COLORS))
    layout = rng.choices(list(LAYOUTS), list(LAYOUTS.values()))[0]
    count = {"one": 1, "corner": 1, "row": 3, "column": 3}.get(layout, 2)
    objects = [_sample_object(rng, background, says_size=count < 3) for _ in range(count)]
    corners = ["top left", "top right"] + (["bottom left", "bottom right"] if layout == "corner" else [])
    placed = place_objects(layout, objects, rng.choice(corners), rng.choice([-JITTER, 0.0, JITTER]))
    said = rng.random() < 0.88
    return Scene(layout, background, said, placed, reversed_wording=rng.random() < 0.5)


def _sample_object(rng: random.Random, background: str, says_size: bool) -> SceneObject:
    color = rng.choice([c for c in COLORS if c != background])
    size = rng.choice(["", "", "small", "large"]) if says_size else ""
    return SceneObject(rng.choice(SHAPES), color, size)


def sample_loose_scene(rng: random.Random) -> Scene:
    """Sample up to five overlapping shapes at any place, without a caption: more variety to train an auto-encoder."""
    background = rng.choice(list(COLORS))
    objects = [
        replace(
            _sample_object(rng, background, says_size=False),
            x=rng.uniform(0.1, 0.9),
            y=rng.uniform(0.1, 0.9),
            radius=rng.uniform(0.08, 0.3),
        )
        for _ in range(rng.randint(1, 5))
    ]
    return Scene("random", background, False, tuple(objects))


# ---------------------------------------------------------------- captions


def _add_article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def _format_object(obj: SceneObject) -> str:
    return _add_article(" ".join(word for word in (obj.size, obj.color, obj.shape) if word))


def caption_scene(scene: Scene) -> str:
    """Write the caption, such as "a large red circle above a small blue square on a yellow background"."""
    phrases = [_format_object(obj) for obj in scene.objects]
    turned = scene.reversed_wording
    if scene.layout == "one":
        words = phrases[0] + (" in the center" if turned else "")
    elif scene.layout == "corner":
        words = f"{phrases[0]} in the {name_corner(scene.objects[0])}"
    elif scene.layout == "vertical":
        words = f"{phrases[1]} below {phrases[0]}" if turned else f"{phrases[0]} above {phrases[1]}"
    elif scene.layout == "horizontal":
        words = f"{phrases[1]} right of {phrases[0]}" if turned else f"{phrases[0]} left of {phrases[1]}"
    elif scene.layout == "diagonal":
        places = [name_corner(obj) for obj in scene.objects]
        words = f"{phrases[0]} in the {places[0]} and {phrases[1]} in the {places[1]}"
    elif scene.layout in ("row", "column"):
        words = f"a {scene.layout} of {phrases[0]}, {phrases[1]} and {phrases[2]}"
    else:
        raise ValueError(f"a scene of layout {scene.layout!r} has no caption")
    if scene.background_said and scene.background:
        words += f" on {_add_article(scene.background)} background"
    return words


_OBJECT = rf"an? (?:(?:small|large) )?(?:{'|'.join(COLORS)}) (?:{'|'.join(SHAPES)})"
_CORNER = r"(?:top|bottom) (?:left|right)"
_PATTERNS = {
    "one": rf"(?P<a>{_OBJECT})(?P<turned> in the center)?",
    "corner": rf"(?P<a>{_OBJECT}) in the (?P<corner>{_CORNER})",
    "vertical": rf"(?P<a>{_OBJECT}) (?P<relation>above|below) (?P<b>{_OBJECT})",
    "horizontal": rf"(?P<a>{_OBJECT}) (?P<relation>left of|right of) (?P<b>{_OBJECT})",
    "diagonal": rf"(?P<a>{_OBJECT}) in the (?P<corner>{_CORNER}) and (?P<b>{_OBJECT}) in the (?P<other>{_CORNER})",
    "triple": rf"a (?P<layout>row|column) of (?P<a>{_OBJECT}), (?P<b>{_OBJECT}) and (?P<c>{_OBJECT})",
}
_COMPILED = {name: re.compile(pattern) for name, pattern in _PATTERNS.items()}
_BACKGROUND = re.compile(rf"(?P<body>.*) on an? (?P<color>{'|'.join(COLORS)}) background")
_VOCABULARY = {
    *COLORS, *SHAPES, "small", "large", "a", "an", "and", "in", "on", "of", "the", "center", "top", "bottom", "left",
    "right", "above", "below", "row", "column", "background",
}  # fmt: skip


def parse_caption(text: str) -> Scene:
    """Parse a caption. The shift along the free axis, which it leaves open, becomes 0 (the middle).

    Raises ValueError that names the unknown words or the unknown arrangement.
    """
    words = " ".join(text.lower().split()).rstrip(".")
    unknown = [word for word in re.findall(r"[^\s,]+", words) if word not in _VOCABULARY]
    if unknown:
        raise ValueError(f"caption {text!r}: not understood: {', '.join(map(repr, unknown))}")
    found = _BACKGROUND.fullmatch(words)
    body, background = (found["body"], found["color"]) if found else (words, None)
    for layout, pattern in _COMPILED.items():
        match = pattern.fullmatch(body)
        if match:
            return _build_scene(text, layout, match, background)
    raise ValueError(f"caption {text!r}: arrangement not understood: {body!r}")


def _build_scene(text: str, layout: str, match: re.Match[str], background: str | None) -> Scene:
    groups = match.groupdict()
    objects = [_parse_object(groups[key]) for key in ("a", "b", "c") if groups.get(key)]
    layout = groups.get("layout") or layout
    clash = next((obj for obj in objects if obj.color == background), None)
    if clash:
        raise ValueError(f"caption {text!r}: a {clash.color} {clash.shape} cannot be seen on a {background} background")
    if layout in ("row", "column") and any(obj.size for obj in objects):
        raise ValueError(f"caption {text!r}: a {layout} of three takes no size words")
    variant = groups.get("corner") or ""
    turned = bool(groups.get("turned")) or groups.get("relation") in ("below", "right of")
    if layout == "diagonal":
        if tuple(1 - c for c in _find_corner(variant)) != _find_corner(groups["other"]):
            raise ValueError(f"caption {text!r}: {variant!r} and {groups['other']!r} are not opposite corners")
        if variant.startswith("bottom"):
            objects, variant = objects[::-1], groups["other"]
    elif len(objects) == 2 and turned:
        objects = objects[::-1]
    return Scene(layout, background, background is not None, place_objects(layout, objects, variant, 0.0), turned)


def _parse_object(words: str) -> SceneObject:
    *modifiers, color, shape = words.split()[1:]
    return SceneObject(shape, color, modifiers[0] if modifiers else "")


def normalize_caption(text: str) -> str:
    """Return the same wording for all captions of a scene ("b below a" becomes "a above b")."""
    return caption_scene(replace(parse_caption(text), reversed_wording=False))


def is_held_out(text: str) -> bool:
    """Return whether a caption is in the test split: one scene in sixteen, by a hash of its normalized caption.

    The split depends on the scene and not on the wording, so no paraphrase of a test caption is trained on.
    """
    digest = hashlib.sha256(normalize_caption(text).encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_MODULUS == 0


# ---------------------------------------------------------------- drawing


def render_scene(scene: Scene, size: int = 128) -> NDArray[np.uint8]:
    """Draw the scene, anti-aliased: uint8 [size, size, 3]."""
    if scene.background is None:
        raise ValueError("a scene without a background cannot be drawn: set one")
    side = size * SUPERSAMPLING
    image = Image.new("RGB", (side, side), COLORS[scene.background])
    draw = ImageDraw.Draw(image)
    for obj in scene.objects:
        points = [((obj.x + obj.radius * x) * side, (obj.y + obj.radius * y) * side) for x, y in OUTLINES[obj.shape]]
        draw.polygon(points, fill=COLORS[obj.color])
    return np.asarray(image.resize((size, size), Image.Resampling.BOX))
