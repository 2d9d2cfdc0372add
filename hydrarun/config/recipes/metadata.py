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

from hydrarun.config.recipes.yaml_loader import RecipeError
from hydrarun.config.type_check import describe_hint, format_value, matches_hint
from hydrarun.core.errors import suggest_name

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
class RecordedOutput:
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
class RecordedWeights:
    """As run.json has them; `path` is null for a folder of the author's."""

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
    """A run of the recipe: where, with what, how fast, what came of it."""

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
    quality: Optional[dict[str, Any]] = None  # noqa: UP045 - of run.json, without the twin's folder
    sample: Optional[str] = None  # noqa: UP045 - name of a small picture beside the recipe


@dataclass
class OutputVerdict:
    """How an output that was drawn again compares."""

    index: int
    result: Literal["identical", "near", "different"]
    psnr: Optional[float] = None  # noqa: UP045 - dB, of the fingerprints; null: the hashes are equal


@dataclass
class Verification:
    """When and where `verify` ran it, and what it found."""

    date: str
    hardware: dict[str, Any]
    versions: dict[str, Any]
    outputs: list[OutputVerdict]
    found: list[str]  # sentences: timings, quality, the error of a run that failed


@dataclass
class Evidence:
    """The section that is never typed by hand. `digest`: see `digest`."""

    format: int
    status: Status
    digest: str
    measured: Optional[Measurement] = None  # noqa: UP045
    verified: Optional[Verification] = None  # noqa: UP045


def parse_dataclass(kind: Any, node: Any, path: str) -> Any:
    """An instance of the dataclass `kind` from plain data. Raises Refused for a key or value that does not belong."""
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
    """The section `evidence`. Raises Refused."""
    evidence = parse_dataclass(Evidence, node, "evidence")
    if evidence.format != FORMAT:
        raise RecipeError(f"evidence.format: {evidence.format}; this version of hydrarun reads {FORMAT}.")
    return evidence


def to_plain_data(instance: Any) -> dict[str, Any]:
    """A dataclass as data, without what is null."""
    return dataclasses.asdict(instance, dict_factory=_drop_null)


def _drop_null(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: value for key, value in items if value is not None}


def compute_digest(content: Mapping[str, Any]) -> str:
    """sha256 of a whole recipe as JSON (sorted keys), without `about` and without the digest in its evidence.

    It tells that the choices, the values or the evidence were changed since the evidence was written. It is no
    signature: who wants to can make one that fits.
    """
    evidence = {key: value for key, value in content["evidence"].items() if key != "digest"}
    covered = {key: value for key, value in content.items() if key != "about"} | {"evidence": evidence}
    canonical = json.dumps(covered, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode(errors="surrogatepass")).hexdigest()
