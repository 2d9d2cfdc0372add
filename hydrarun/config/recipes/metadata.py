"""Metadata of a recipe: the section `about`, written by hand, and `evidence`, written by `hydrarun recipe` only.

Neither section is part of the composed configuration.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Optional

from hydrarun.config.recipes.yaml_loader import RecipeError
from hydrarun.config.type_check import describe_hint, format_value, matches_hint
from hydrarun.core.errors import suggest_name

FORMAT = 1  # version of the evidence; grows when the meaning of a key changes
Status = Literal["unverified", "verified", "broken"]
METADATA = ("about", "evidence")
CHANGED = "unverified (changed since it was verified)"


@dataclass
class About:
    """Description and author, for readers."""

    description: str
    author: Optional[str] = None  # noqa: UP045 - dataclasses here are read with typing.get_type_hints on Python 3.10


@dataclass
class RecordedOutput:
    """One output: a picture, video, layered picture or sound."""

    index: int
    prompt: str
    seed: int
    pixels_sha256: str
    fingerprint: str  # block means of the pixels: hydrarun.cli.recipe.pixel_digest
    width: Optional[int] = None  # noqa: UP045
    height: Optional[int] = None  # noqa: UP045
    frames: Optional[int] = None  # noqa: UP045
    samples: Optional[int] = None  # noqa: UP045 - of a sound, which has no width or height
    layers: Optional[int] = None  # noqa: UP045


@dataclass
class RecordedWeights:
    """The weights as run.json records them; `path` is null for a local folder of the author."""

    fingerprint: str
    path: Optional[str] = None  # noqa: UP045
    revision: Optional[str] = None  # noqa: UP045


@dataclass
class RecordedTimings:
    """Seconds; `step_s` is the mean of all steps but the first."""

    load_s: float
    first_step_s: float
    step_s: float
    total_s: float


@dataclass
class Measurement:
    """One run of the recipe: date, weights, machine, versions, timings, memory and outputs."""

    date: str
    config_hash: str
    weights: RecordedWeights
    device: str
    dtype: str
    hardware: dict[str, Any]
    versions: dict[str, Any]
    timings: RecordedTimings
    memory: dict[str, int]
    inputs: list[str]  # sha256 of each input image
    outputs: list[RecordedOutput]
    quality: Optional[dict[str, Any]] = None  # noqa: UP045 - as in run.json, without the folder of the reference run
    sample: Optional[str] = None  # noqa: UP045 - file name of a small picture next to the recipe


@dataclass
class OutputVerdict:
    """Comparison of one output with the recorded one."""

    index: int
    result: Literal["identical", "near", "different"]
    psnr: Optional[float] = None  # noqa: UP045 - dB, of the fingerprints; null: the pixel hashes are equal


@dataclass
class Verification:
    """Date, machine and result of a `hydrarun recipe verify`."""

    date: str
    hardware: dict[str, Any]
    versions: dict[str, Any]
    outputs: list[OutputVerdict]
    found: list[str]  # sentences: timings, quality, the error of a failed run


@dataclass
class Evidence:
    """The section `evidence`, never written by hand. `digest`: see `compute_digest`."""

    format: int
    status: Status
    digest: str
    measured: Optional[Measurement] = None  # noqa: UP045
    verified: Optional[Verification] = None  # noqa: UP045


def parse_dataclass(kind: Any, node: Any, path: str) -> Any:
    """Build an instance of the dataclass `kind` from plain data. Raises RecipeError for a wrong key or value."""
    if not isinstance(node, dict):
        raise RecipeError(f"{path}: is not a mapping.")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    for key in node:
        if key not in fields:
            raise RecipeError(f"{path}.{key}: unknown key.{suggest_name(str(key), fields)} Known: {', '.join(fields)}.")
    if missing := [name for name, field in fields.items() if field.default is dataclasses.MISSING and name not in node]:
        by = "" if path == "about" else "; evidence is not typed by hand, `hydrarun recipe verify` writes it"
        raise RecipeError(f"{path}.{missing[0]}: is missing{by}.")
    return kind(**{key: _parse_value(hints[key], value, f"{path}.{key}") for key, value in node.items()})


def _parse_value(hint: Any, value: Any, path: str) -> Any:
    inner = next((one for one in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(one)), None)
    if inner is not None and value is not None:
        if typing.get_origin(hint) is not list:
            return parse_dataclass(inner, value, path)
        if isinstance(value, list):
            return [parse_dataclass(inner, one, f"{path}[{index}]") for index, one in enumerate(value)]
    if not matches_hint(value, hint):
        raise RecipeError(f"{path}: {format_value(value)} is not {describe_hint(hint)}.")
    return value


def parse_evidence(node: Any) -> Evidence:
    """Parse the section `evidence`. Raises RecipeError."""
    evidence = parse_dataclass(Evidence, node, "evidence")
    if evidence.format != FORMAT:
        raise RecipeError(f"evidence.format: {evidence.format}; this version of hydrarun reads {FORMAT}.")
    return evidence


def to_plain_data(instance: Any) -> dict[str, Any]:
    """Convert a dataclass to plain data, without null values."""
    return dataclasses.asdict(instance, dict_factory=_drop_null)


def _drop_null(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: value for key, value in items if value is not None}


def compute_digest(content: Mapping[str, Any]) -> str:
    """Return the sha256 of a recipe as JSON (sorted keys), without `about` and without the digest in its evidence.

    It shows that choices, values or evidence were changed after the evidence was written. It is not a signature: anyone
    can compute a matching digest.
    """
    evidence = {key: value for key, value in content["evidence"].items() if key != "digest"}
    covered = {key: value for key, value in content.items() if key != "about"} | {"evidence": evidence}
    canonical = json.dumps(covered, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode(errors="surrogatepass")).hexdigest()
