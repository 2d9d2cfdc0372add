"""A recipe's file: read and vetted, and its evidence rewritten with all else left byte for byte."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hydrarun.config.recipes import paths, vet
from hydrarun.config.recipes.metadata import (
    CHANGED,
    METADATA,
    About,
    Evidence,
    compute_digest,
    parse_dataclass,
    parse_evidence,
    to_plain_data,
)
from hydrarun.config.recipes.yaml_loader import MAX_BYTES, RecipeError, StrictLoader, dump_yaml, parse_sections
from hydrarun.core.errors import UsageError
from hydrarun.core.files import write_atomically
from hydrarun.core.quoting import make_printable

MAX_MESSAGE = 1000  # characters; a refusal quotes what it refuses

MARK = "# written by `hydrarun recipe`, not by hand: a change shows"


@dataclass(frozen=True)
class Recipe:
    """A vetted recipe. `content`: its choices and values as Hydra composes them; `whole`: all sections as written."""

    path: Path
    text: str
    whole: dict[str, Any]
    content: dict[str, Any]
    about: About | None
    evidence: Evidence | None

    @property
    def model(self) -> str | None:
        """The option of `model` that it chooses."""
        chosen = [entry["override /model"] for entry in self.content.get("defaults", []) if "override /model" in entry]
        return chosen[-1] if chosen else None

    @property
    def genuine(self) -> bool:
        """Whether the evidence was written for what the file holds now."""
        return self.evidence is not None and self.evidence.digest == compute_digest(self.whole)

    @property
    def status(self) -> str:
        """`unverified`, `verified`, `broken`, or that it was changed since."""
        if self.evidence is None:
            return "unverified"
        return self.evidence.status if self.genuine else CHANGED


def read_recipe(path: Path, name: str) -> Recipe:
    """The recipe in a file. Raises UsageError, which calls it `name`, for what it may not hold."""
    try:
        return _read_bytes(path)
    except RecipeError as refused:
        raise UsageError(f"recipe {name}: {make_printable(str(refused), MAX_MESSAGE)}") from None
    except OSError as error:
        raise UsageError(f"recipe {name}: {error.strerror}") from None


def _read_bytes(path: Path) -> Recipe:
    with path.open("rb") as file:
        text, whole = parse_sections(file.read(MAX_BYTES + 1))
    content = {key: value for key, value in whole.items() if key not in METADATA}
    for problem in vet.find_problems(text, content):
        raise RecipeError(problem)
    about = parse_dataclass(About, whole["about"], "about") if "about" in whole else None
    evidence = parse_evidence(whole["evidence"]) if "evidence" in whole else None
    try:
        compute_digest({"evidence": {}, **whole})
    except TypeError:
        raise RecipeError("evidence: holds something that is not a plain value.") from None
    content = paths.locate_files(content, path.absolute().parent.resolve())
    return Recipe(path, text, whole, vet.escape_texts(content), about, evidence)


def sign_evidence(recipe: Recipe, evidence: Evidence) -> dict[str, Any]:
    """The evidence as data, with the digest of it and of the recipe."""
    unsigned = yaml.load(format_evidence({**to_plain_data(evidence), "digest": ""}), StrictLoader)
    return {**unsigned["evidence"], "digest": compute_digest({**recipe.whole, **unsigned})}


def format_evidence(evidence: dict[str, Any]) -> str:
    """The section as it stands in a file."""
    return f"{MARK}\n" + dump_yaml({"evidence": evidence})


def replace_evidence(recipe: Recipe, evidence: Evidence) -> str:
    """The recipe's text with this evidence in the place of an older one. Raises UsageError if it grows too large."""
    start, end = _find_evidence_section(recipe.text)
    before, after = recipe.text[:start], recipe.text[end:]
    if start == end and before:  # it had none
        before = before.rstrip("\n") + "\n\n"
    section = sign_evidence(recipe, evidence)
    text = before + format_evidence(section) + after
    if not holds_sections(text, {**recipe.whole, "evidence": section}):
        raise UsageError(
            f"recipe {recipe.path}: evidence has no place in it; write each of its sections on lines of its own"
        )
    if len(text.encode()) > MAX_BYTES:
        count = len(evidence.measured.outputs) if evidence.measured else 0
        raise UsageError(
            f"recipe {recipe.path}: with the evidence of {count} outputs larger than {MAX_BYTES // 1024} KiB; a recipe"
            " draws a few, as a sample"
        )
    return text


def holds_sections(text: str, whole: dict[str, Any]) -> bool:
    """Whether a text of any length is the YAML of these sections."""
    try:
        return bool(yaml.load(text, StrictLoader) == whole)
    except yaml.YAMLError:
        return False


def write_evidence(recipe: Recipe, evidence: Evidence) -> None:
    """Put the evidence into the file. Raises OSError where it cannot be written."""
    write_atomically(recipe.path, replace_evidence(recipe, evidence).encode())


def _find_evidence_section(text: str) -> tuple[int, int]:
    """Where the section `evidence` stands in the text, with the mark above it; at its end if there is none."""
    root = yaml.compose(text, StrictLoader)
    for key, value in root.value if isinstance(root, yaml.MappingNode) else ():
        if key.value != "evidence":
            continue
        start = key.start_mark.index
        lines = text[start : value.end_mark.index].splitlines(keepends=True)
        while lines and (not lines[-1].strip() or lines[-1].startswith("#")):
            lines.pop()  # what follows a section counts as its own up to the next key
        end = start + len("".join(lines))
        return start - len(MARK) - 1 if text[:start].endswith(f"{MARK}\n") else start, end
    return len(text), len(text)
