"""What a recipe says about itself, beside its choices and values: `about`, by hand, and `evidence`, by `verify` alone.

Neither reaches the configuration.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Optional

from hydrarun.config.recipes.yaml_loader import Refused
from hydrarun.config.type_check import describe, fits, show
from hydrarun.core.errors import nearest

FORMAT = 1  # of the evidence; grows when a key changes its meaning
Status = Literal["unverified", "verified", "broken"]
METADATA = ("about", "evidence")
CHANGED = "unverified (changed since it was verified)"


@dataclass
class About:
    """For people."""

    description: str
    author: Optional[str] = None  # noqa: UP045 - dataclasses here are read with typing.get_type_hints on Python 3.10


@dataclass
class Output:
    """A picture, video or sound that was drawn."""

    index: int
    prompt: str
    seed: int
    pixels_sha256: str
    fingerprint: str  # what is kept of its pixels: hydrarun.cli.recipe.fingerprint
    width: Optional[int] = None  # noqa: UP045
    height: Optional[int] = None  # noqa: UP045
    frames: Optional[int] = None  # noqa: UP045
    samples: Optional[int] = None  # noqa: UP045 - of a sound, which has no width and no height
    layers: Optional[int] = None  # noqa: UP045


@dataclass
class Weights:
    """As run.json has them; `path` is null for a folder of the author's."""

    fingerprint: str
    path: Optional[str] = None  # noqa: UP045
    revision: Optional[str] = None  # noqa: UP045


@dataclass
class Timings:
    """Seconds; `step_s` is the mean of all steps but the first."""

    load_s: float
    first_step_s: float
    step_s: float
    total_s: float


@dataclass
class Measured:
    """A run of the recipe: where, with what, how fast, what came of it."""

    date: str
    config_hash: str
    weights: Weights
    device: str
    dtype: str
    hardware: dict[str, Any]
    versions: dict[str, Any]
    timings: Timings
    memory: dict[str, int]
    inputs: list[str]  # sha256 of each input image
    outputs: list[Output]
    quality: Optional[dict[str, Any]] = None  # noqa: UP045 - of run.json, without the twin's folder
    sample: Optional[str] = None  # noqa: UP045 - name of a small picture beside the recipe


@dataclass
class Verdict:
    """How an output that was drawn again compares."""

    index: int
    result: Literal["identical", "near", "different"]
    psnr: Optional[float] = None  # noqa: UP045 - dB, of the fingerprints; null: the hashes are equal


@dataclass
class Verified:
    """When and where `verify` ran it, and what it found."""

    date: str
    hardware: dict[str, Any]
    versions: dict[str, Any]
    outputs: list[Verdict]
    found: list[str]  # sentences: timings, quality, the error of a run that failed


@dataclass
class Evidence:
    """The section that is never typed by hand. `digest`: see `digest`."""

    format: int
    status: Status
    digest: str
    measured: Optional[Measured] = None  # noqa: UP045
    verified: Optional[Verified] = None  # noqa: UP045


def take(kind: Any, node: Any, path: str) -> Any:
    """An instance of the dataclass `kind` from plain data. Raises Refused for a key or value that does not belong."""
    if not isinstance(node, dict):
        raise Refused(f"{path}: is not a mapping.")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    for key in node:
        if key not in fields:
            raise Refused(f"{path}.{key}: unknown key.{nearest(str(key), fields)} Known: {', '.join(fields)}.")
    if missing := [name for name, field in fields.items() if field.default is dataclasses.MISSING and name not in node]:
        by = "" if path == "about" else "; evidence is not typed by hand, `hydrarun recipe verify` writes it"
        raise Refused(f"{path}.{missing[0]}: is missing{by}.")
    return kind(**{key: _value(hints[key], value, f"{path}.{key}") for key, value in node.items()})


def _value(hint: Any, value: Any, path: str) -> Any:
    inner = next((one for one in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(one)), None)
    if inner is not None and value is not None:
        if typing.get_origin(hint) is not list:
            return take(inner, value, path)
        if isinstance(value, list):
            return [take(inner, one, f"{path}[{index}]") for index, one in enumerate(value)]
    if not fits(value, hint):
        raise Refused(f"{path}: {show(value)} is not {describe(hint)}.")
    return value


def evidence_of(node: Any) -> Evidence:
    """The section `evidence`. Raises Refused."""
    evidence = take(Evidence, node, "evidence")
    if evidence.format != FORMAT:
        raise Refused(f"evidence.format: {evidence.format}; this version of hydrarun reads {FORMAT}.")
    return evidence


def plain(instance: Any) -> dict[str, Any]:
    """A dataclass as data, without what is null."""
    return dataclasses.asdict(instance, dict_factory=_without_null)


def _without_null(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: value for key, value in items if value is not None}


def digest(content: Mapping[str, Any]) -> str:
    """sha256 of a whole recipe as JSON (sorted keys), without `about` and without the digest in its evidence.

    It tells that the choices, the values or the evidence were changed since the evidence was written. It is no
    signature: who wants to can make one that fits.
    """
    evidence = {key: value for key, value in content["evidence"].items() if key != "digest"}
    covered = {key: value for key, value in content.items() if key != "about"} | {"evidence": evidence}
    canonical = json.dumps(covered, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode(errors="surrogatepass")).hexdigest()
