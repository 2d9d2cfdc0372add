"""The kinds of output: pictures, videos, layers and sounds. All differences between them are defined in this table.

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
    """The properties of one kind of output."""

    one: str  # its singular name in messages
    nameless: str  # in file names, if the prompt has no Latin letters or digits
    #: the values of `output.format` that can hold it, with file suffixes ("" for a folder); the last one is lossless
    formats: Mapping[str, str]
    #: the values of `report.metrics` that compare two of them
    metrics: tuple[str, ...]
    #: the largest possible difference between two values of its array
    levels: int
    #: returns the size fields of its record, given the array, the section `output` and the facts of the run
    extent: Callable[[np.ndarray, Mapping[str, Any], Mapping[str, Any]], Record]
    #: describes a constant array, such as `black` or `silence`; None for any other
    monotone: Callable[[np.ndarray], str | None]
    #: returns a picture that represents it, uint8 `[H, W, 3]`
    still: Callable[[np.ndarray], np.ndarray]
    #: formats the size that the section `sampling` requests
    size: Callable[[Mapping[str, Any]], str]
    #: the field of `sampling` that only models of this kind take; None for the default kind
    field: str | None = None
    #: the plural name of its parts, if `field` is their number
    parts: str | None = None
    #: whether pixels are RGBA, including those of input images
    alpha: bool = False

    @property
    def many(self) -> str:
        """Its plural name in messages."""
        return f"{self.one}s"

    @property
    def lossless(self) -> str:
        """The lossless format, which reference runs are written in."""
        return [*self.formats][-1]

    def length(self, sampling: Mapping[str, Any]) -> str | None:
        """Format the number of parts, `81 frames`; None for a kind without parts."""
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
    """Describe pixels of a single colour. A video whose frames have different single colours is not constant."""
    planes = [pixels[..., channel] for channel in range(3)]  # one channel at a time is far faster
    if max(int(plane.max()) - int(plane.min()) for plane in planes) > 1:  # one level is rounding noise, not a picture
        return None
    first = tuple(int(value) for value in pixels.reshape(-1, 3)[0])
    return "black" if pixels.max() <= 1 else f"one colour, RGB {first}"


def _measure_layers(pixels: np.ndarray, *_: Any) -> Record:
    return {**_measure_picture(pixels), "layers": len(pixels)}


def _find_empty_layers(pixels: np.ndarray) -> str | None:
    """Describe layers that are all constant; single layers may be of one colour or fully transparent."""
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
    return f"from {sampling['audio_start_in_s']:g} s to " + ("the end of the longest" if end is None else f"{end:g} s")


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
#: by the number of array dimensions
_BY_AXES = {3: PICTURE, 4: VIDEO, 2: SOUND}


def find_model_kind(model: Mapping[str, Any]) -> Kind:
    """Return the kind that the model of the section `model` generates."""
    return next(kind for kind in KINDS if kind.field is None or kind.field in model["takes"])


def find_format_kind(output_format: str) -> Kind:
    """Return the kind that an output format holds."""
    return next(kind for kind in KINDS if output_format in kind.formats)


def find_array_kind(pixels: np.ndarray) -> Kind:
    """Return the kind of an array, by its shape."""
    return LAYERS if pixels.ndim == 4 and pixels.shape[-1] == 4 else _BY_AXES[pixels.ndim]
