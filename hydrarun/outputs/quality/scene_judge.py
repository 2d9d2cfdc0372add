"""Judges a picture of a captioned scene by rules: background, and place, colour, shape and size of every object.

It needs no model: the scenes are flat shapes in eight known colours, so thresholds on pixels are enough. It measures
whether a change (a cache, a quantization, fewer steps) costs prompt accuracy, in whole pictures and by attribute.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from hydrarun.outputs.quality.scenes import (
    COLORS,
    JITTER,
    OUTLINES,
    SIZES,
    Scene,
    SceneObject,
    caption_scene,
    normalize_caption,
    parse_caption,
    sample_scene,
)

Mask = NDArray[np.bool_]

WORKING_SIDE = 256  # larger pictures are first reduced to it
SMALLEST_SIDE = 64
LEAST_OBJECT_AREA = 0.004  # of the picture; the smallest star covers 0.022
STRAY_AREA = 0.003  # of the picture, 7 x 7 pixels of 128 x 128; stray marks below it are ignored
PLACE_TOLERANCE = 0.07  # of the side
SHAPE_OVERLAP = 0.75  # intersection over union with the ideal shape in the same box
SQUEEZE = 1.25  # tolerated factor between the proportions of a shape and the ideal ones
RADIUS_TOLERANCE = 0.03  # of the side
_SAME_COLOR_SHARE = 0.6  # of an object's pixels
_NAMES = list(COLORS)
_PALETTE = np.array(list(COLORS.values()), np.float32)
# Half the distance between the closest colours (yellow, orange); pixels nearer to the border colour are background.
_ROUGH_DISTANCE = 42.0


@dataclass(frozen=True)
class ObjectVerdict:
    """The attributes of one object of the caption that are right. All are False for a missing object."""

    present: bool = False
    color: bool = False
    position: bool = False
    shape: bool = False
    size: bool = False


@dataclass(frozen=True)
class SceneVerdict:
    """The judgement of one picture. `clean` is False if there are marks outside the objects of the caption."""

    background: bool
    clean: bool
    objects: tuple[ObjectVerdict, ...]

    @property
    def right(self) -> bool:
        """Whether the background, and colour, position and shape of every object are right, with no stray marks."""
        return self.background and self.clean and all(o.color and o.position and o.shape for o in self.objects)

    @property
    def right_with_size(self) -> bool:
        return self.right and all(o.size for o in self.objects)


@dataclass(frozen=True)
class SceneAccuracy:
    """Number of pictures; shares from 0 to 1 of pictures (`right` to `clean`) and of objects (the others)."""

    pictures: int
    right: float
    right_with_size: float
    background: float
    clean: float
    present: float
    color: float
    position: float
    shape: float
    size: float


def judge_picture(image: NDArray[np.uint8], text: str) -> SceneVerdict:
    """Judge a square picture, uint8 [side, side, 3] with side >= 64, against its caption.

    Raises ValueError for a caption outside the grammar of `hydrarun.outputs.quality.scenes`.
    """
    scene = parse_caption(text)
    pixels = _make_working_copy(image)
    border = _find_border_color(pixels)
    background = _find_color_name(border) == scene.background or not scene.background_said
    distance = np.sqrt(((pixels - border) ** 2).sum(-1))
    taken = np.zeros(distance.shape, bool)
    objects = []
    for obj, region in zip(scene.objects, _find_regions(scene, len(pixels)), strict=True):
        mask = _find_object_mask(pixels, distance, border, region)
        taken |= mask
        objects.append(_judge_object(pixels, mask, obj, scene))
    # Blended edges extend one pixel beyond the half-way contour of an object: they are not stray marks.
    stray = (distance > 1.5 * _ROUGH_DISTANCE) & ~_dilate_mask(_dilate_mask(taken))
    return SceneVerdict(background, bool(stray.mean() < STRAY_AREA), tuple(objects))


def _make_working_copy(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.shape[0] != image.shape[1]:
        raise ValueError(f"expected a square uint8 [side, side, 3] picture, got {image.dtype} {list(image.shape)}")
    side = image.shape[0]
    if side < SMALLEST_SIDE:
        raise ValueError(f"a picture of {side} pixels a side is too small to judge: {SMALLEST_SIDE} at least")
    if side > WORKING_SIDE:
        reduced = Image.fromarray(image).resize((WORKING_SIDE, WORKING_SIDE), Image.Resampling.BOX)
        image = np.asarray(reduced)
    return image.astype(np.float32)


def _find_border_color(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the median colour along the four edges, which objects seldom reach: [3]."""
    width = max(2, len(pixels) // 32)
    edges = (pixels[:width], pixels[-width:], pixels[:, :width], pixels[:, -width:])
    return np.median(np.concatenate([edge.reshape(-1, 3) for edge in edges]), axis=0)


def _find_color_name(color: NDArray[np.float32]) -> str:
    return _NAMES[int(((_PALETTE - color) ** 2).sum(-1).argmin())]


def _find_regions(scene: Scene, side: int) -> list[tuple[slice, slice]]:
    """Return the rows and columns to search for each object."""
    full = slice(0, side)
    halves = (slice(0, side // 2), slice(side // 2, side))
    thirds = [slice(round(side * k / 3), round(side * (k + 1) / 3)) for k in range(3)]
    if scene.layout == "one":
        return [(full, full)]
    if scene.layout == "vertical":
        return [(half, full) for half in halves]
    if scene.layout == "horizontal":
        return [(full, half) for half in halves]
    if scene.layout == "row":
        return [(full, third) for third in thirds]
    if scene.layout == "column":
        return [(third, full) for third in thirds]
    return [(halves[obj.y > 0.5], halves[obj.x > 0.5]) for obj in scene.objects]


def _find_object_mask(
    pixels: NDArray[np.float32],
    distance: NDArray[np.float32],
    border: NDArray[np.float32],
    region: tuple[slice, slice],
) -> Mask:
    """Return the mask of the largest component in a region: bool [side, side], all False if there is none."""
    mask = np.zeros(distance.shape, bool)
    rough = distance[region] > _ROUGH_DISTANCE
    if rough.sum() < LEAST_OBJECT_AREA * mask.size:
        return mask
    # An edge pixel belongs to the object if it is more than half-way from the background to the object's colour.
    body = np.median(pixels[region][rough], axis=0)
    halfway = max(_ROUGH_DISTANCE, 0.5 * float(np.sqrt(((body - border) ** 2).sum())))
    largest = _find_largest_component(distance[region] > halfway)
    if largest.sum() >= LEAST_OBJECT_AREA * mask.size:
        mask[region] = largest
    return mask


def _dilate_mask(mask: Mask) -> Mask:
    """Grow the mask by one pixel up, down, left and right."""
    grown = mask.copy()
    grown[1:] |= mask[:-1]
    grown[:-1] |= mask[1:]
    grown[:, 1:] |= mask[:, :-1]
    grown[:, :-1] |= mask[:, 1:]
    return grown


def _find_largest_component(mask: Mask) -> Mask:
    """Return the 4-connected component with the most pixels."""
    remaining, best, best_area = mask.copy(), np.zeros_like(mask), 0
    while remaining.sum() > best_area:
        part = np.zeros_like(mask)
        part[np.unravel_index(int(remaining.argmax()), mask.shape)] = True
        area = 0
        while part.sum() > area:
            area = int(part.sum())
            part = _dilate_mask(part) & remaining
        remaining &= ~part
        if area > best_area:
            best, best_area = part, area
    return best


def _judge_object(pixels: NDArray[np.float32], mask: Mask, obj: SceneObject, scene: Scene) -> ObjectVerdict:
    if not mask.any():
        return ObjectVerdict()
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    side = len(mask)
    height, width = int(bottom - top), int(right - left)
    outline = np.array(OUTLINES[obj.shape])
    low, high = outline.min(0), outline.max(0)
    # The bounding box of an outline need not be centred on its origin (a star's is not): compare the origins.
    radius = 0.5 * (width / (high - low)[0] + height / (high - low)[1]) / side
    offset = radius * (low + high) / 2
    center = ((left + right) / 2 / side - offset[0], (top + bottom) / 2 / side - offset[1])
    return ObjectVerdict(
        present=True,
        color=_has_color(pixels[mask], obj.color),
        position=_has_position(center, obj, scene.layout),
        shape=_has_shape(mask[top:bottom, left:right], obj.shape),
        size=_has_size(radius, obj, scene.layout),
    )


def _has_color(body: NDArray[np.float32], color: str) -> bool:
    nearest = ((body[:, None] - _PALETTE) ** 2).sum(-1).argmin(-1)
    return bool((nearest == _NAMES.index(color)).mean() >= _SAME_COLOR_SHARE)


def _has_position(center: tuple[float, float], obj: SceneObject, layout: str) -> bool:
    """Check the position: near the layout's place, with `JITTER` of slack along the axis the caption leaves open."""
    slack_x = JITTER if layout in ("one", "vertical", "column") else 0.0
    slack_y = JITTER if layout in ("horizontal", "row") else 0.0
    return bool(
        abs(center[0] - obj.x) <= slack_x + PLACE_TOLERANCE and abs(center[1] - obj.y) <= slack_y + PLACE_TOLERANCE
    )


def _has_shape(box: Mask, shape: str) -> bool:
    height, width = box.shape
    overlaps = {name: _measure_overlap(box, _draw_ideal_shape(name, width, height)) for name in OUTLINES}
    extent = np.ptp(np.array(OUTLINES[shape]), axis=0)
    squeeze = (width / height) / (extent[0] / extent[1])
    in_proportion = 1 / SQUEEZE <= squeeze <= SQUEEZE
    return bool(in_proportion and max(overlaps, key=overlaps.__getitem__) == shape and overlaps[shape] >= SHAPE_OVERLAP)


def _measure_overlap(a: Mask, b: Mask) -> float:
    return float((a & b).sum() / max(1, (a | b).sum()))


@functools.lru_cache(maxsize=4096)
def _draw_ideal_shape(shape: str, width: int, height: int) -> Mask:
    """Draw the shape so that it fills a box: bool [height, width]."""
    scale = 8
    outline = np.array(OUTLINES[shape])
    low, extent = outline.min(0), np.ptp(outline, axis=0)
    points = (outline - low) / extent * (width * scale, height * scale)
    image = Image.new("L", (width * scale, height * scale), 0)
    ImageDraw.Draw(image).polygon([(float(x), float(y)) for x, y in points], fill=255)
    return np.asarray(image.resize((width, height), Image.Resampling.BOX)) > 127


def _has_size(radius: float, obj: SceneObject, layout: str) -> bool:
    """Check the size: near the radius of the caption, and nearer to it than to the radius of any other size word."""
    if abs(radius - obj.radius) > RADIUS_TOLERANCE:
        return False
    if layout in ("row", "column"):
        return True
    return min(SIZES, key=lambda word: abs(radius - SIZES[word])) == obj.size


def sample_held_out_prompts(count: int = 200, seed: int = 2025) -> list[str]:
    """Sample distinct captions for testing, deterministically: held out in any wording, and with a background."""
    rng = random.Random(seed)
    prompts: dict[str, str] = {}
    while len(prompts) < count:
        scene = sample_scene(rng, held_out=True)
        if scene.background_said:
            text = caption_scene(scene)
            prompts.setdefault(normalize_caption(text), text)
    return list(prompts.values())


def summarize_verdicts(verdicts: Iterable[SceneVerdict]) -> SceneAccuracy:
    """Compute the accuracy over many judged pictures."""
    judged = list(verdicts)
    if not judged:
        raise ValueError("no picture to summarize")
    objects = [obj for verdict in judged for obj in verdict.objects]
    by_picture = {
        name: float(np.mean([getattr(verdict, name) for verdict in judged]))
        for name in ("right", "right_with_size", "background", "clean")
    }
    by_object = {
        name: float(np.mean([getattr(obj, name) for obj in objects]))
        for name in ("present", "color", "position", "shape", "size")
    }
    return SceneAccuracy(pictures=len(judged), **by_picture, **by_object)


def judge_pairs(pairs: Iterable[tuple[NDArray[np.uint8], str]]) -> SceneAccuracy:
    """Judge (picture, caption) pairs and return the accuracy over all of them."""
    return summarize_verdicts(judge_picture(image, text) for image, text in pairs)
