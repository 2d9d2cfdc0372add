"""What a model draws: pictures, videos, layers or sounds. Whatever differs between them stands in this one table.

Arrays are uint8 `[H, W, 3]`, uint8 `[F, H, W, 3]`, uint8 `[L, H, W, 4]` and int16 `[samples, channels]`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

Record = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """One of them."""

    one: str  # in sentences
    nameless: str  # in the name of a file whose prompt has no letters for it
    #: of `output.format`, those that hold it, with their files' suffixes, "" for a folder; the last is without loss
    formats: Mapping[str, str]
    #: how near two of them are, of `report.metrics`
    metrics: tuple[str, ...]
    #: the largest difference of two numbers in its array
    levels: int
    #: what a record says of its size; of the array, the section `output` and the facts of the run
    extent: Callable[[np.ndarray, Mapping[str, Any], Mapping[str, Any]], Record]
    #: what all of it is, if it is nothing but that
    monotone: Callable[[np.ndarray], str | None]
    #: a picture of it, uint8 `[H, W, 3]`
    still: Callable[[np.ndarray], np.ndarray]
    #: how large one will be that the section `sampling` asks for
    size: Callable[[Mapping[str, Any]], str]
    #: the field of `sampling` that no other model takes; None: any may be left
    field: str | None = None
    #: what its parts are called, if that field is their number
    parts: str | None = None
    #: whether pixels are RGBA, those of input images too
    alpha: bool = False

    @property
    def many(self) -> str:
        """In sentences, of several."""
        return f"{self.one}s"

    @property
    def lossless(self) -> str:
        """The format without loss: what twins are written in."""
        return [*self.formats][-1]

    def length(self, sampling: Mapping[str, Any]) -> str | None:
        """How many parts it has, `81 frames`; None where it has none."""
        return f"{sampling[self.field]} {self.parts}" if self.field and self.parts else None


def _measure_picture(pixels: np.ndarray, *_: Any) -> Record:
    return {"width": pixels.shape[-2], "height": pixels.shape[-3]}


def _measure_video(pixels: np.ndarray, output: Mapping[str, Any], facts: Any) -> Record:
    return {**_measure_picture(pixels), "frames": len(pixels), "fps": output["fps"]}


def _measure_sound(samples: np.ndarray, output: Any, facts: Mapping[str, Any]) -> Record:
    count, channels = samples.shape
    rate = facts["sample_rate"]
    return {"duration_s": round(count / rate, 6), "sample_rate": rate, "samples": count, "channels": channels}


def _find_single_colour(pixels: np.ndarray) -> str | None:
    """Frames of one colour, each of another, are a video."""
    planes = [pixels[..., channel] for channel in range(3)]  # one at a time is far faster
    if max(int(plane.max()) - int(plane.min()) for plane in planes) > 1:  # one level is rounding noise, not a picture
        return None
    first = tuple(int(value) for value in pixels.reshape(-1, 3)[0])
    return "black" if pixels.max() <= 1 else f"one colour, RGB {first}"


def _measure_layers(pixels: np.ndarray, *_: Any) -> Record:
    return {**_measure_picture(pixels), "layers": len(pixels)}


def _find_empty_layers(pixels: np.ndarray) -> str | None:
    """One layer may well be of one colour, or wholly transparent, but not all."""
    import numpy as np

    from hydrarun.outputs.media.alpha import premultiply_alpha

    spreads = (int(np.ptp(layer[..., channel])) for layer in premultiply_alpha(pixels) for channel in range(4))
    return None if max(spreads) > 1 else "one colour or transparent in every layer"


def _draw_layers(pixels: np.ndarray) -> np.ndarray:
    from hydrarun.outputs.media.alpha import draw_side_by_side

    return draw_side_by_side(pixels)


def _find_silence(samples: np.ndarray) -> str | None:
    return None if (samples.max(0).astype(int) - samples.min(0)).max() > 1 else "silence"


def _keep_picture(pixels: np.ndarray) -> np.ndarray:
    return pixels


def _pick_middle_frame(pixels: np.ndarray) -> np.ndarray:
    return pixels[len(pixels) // 2]


def _draw_sound(samples: np.ndarray) -> np.ndarray:
    from hydrarun.outputs.media.waveform import draw_waveform

    return draw_waveform(samples)


def _format_size(sampling: Mapping[str, Any]) -> str:
    sized = sampling["width"] is not None and sampling["height"] is not None
    return f"{sampling['width']}x{sampling['height']}" if sized else "the size of the input image"


def _format_seconds(sampling: Mapping[str, Any]) -> str:
    end = sampling["audio_end_in_s"]
    return f"from {sampling['audio_start_in_s']:g} s to " + ("the longest's end" if end is None else f"{end:g} s")


PICTURE = Kind(
    one="picture",
    nameless="picture",
    formats={"png": ".png"},
    metrics=("psnr", "ssim"),
    levels=255,
    extent=_measure_picture,
    monotone=_find_single_colour,
    still=_keep_picture,
    size=_format_size,
)
VIDEO = replace(
    PICTURE,
    one="video",
    nameless="video",
    formats={"mp4": ".mp4", "frames": ""},
    extent=_measure_video,
    still=_pick_middle_frame,
    field="num_frames",
    parts="frames",
)
LAYERS = replace(
    PICTURE,
    one="layered picture",
    nameless="layers",
    formats={"layers": ""},
    extent=_measure_layers,
    monotone=_find_empty_layers,
    still=_draw_layers,
    field="layers",
    parts="layers",
    alpha=True,
)
SOUND = Kind(
    one="sound",
    nameless="sound",
    formats={"wav": ".wav"},
    metrics=("snr",),
    levels=65535,
    extent=_measure_sound,
    monotone=_find_silence,
    still=_draw_sound,
    size=_format_seconds,
    field="audio_end_in_s",
)
KINDS = (VIDEO, LAYERS, SOUND, PICTURE)
#: by the number of the array's axes
_BY_AXES = {3: PICTURE, 4: VIDEO, 2: SOUND}


def find_model_kind(model: Mapping[str, Any]) -> Kind:
    """What the model of the section `model` draws."""
    return next(kind for kind in KINDS if kind.field is None or kind.field in model["takes"])


def find_format_kind(output_format: str) -> Kind:
    """The kind that a format is of."""
    return next(kind for kind in KINDS if output_format in kind.formats)


def find_array_kind(pixels: np.ndarray) -> Kind:
    """What an array is."""
    return LAYERS if pixels.ndim == 4 and pixels.shape[-1] == 4 else _BY_AXES[pixels.ndim]
