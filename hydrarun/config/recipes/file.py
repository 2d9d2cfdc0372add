"""Recipe files: reads and vets them, and rewrites the evidence. The rest of a file stays unchanged byte for byte."""

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
from hydrarun.config.recipes.yaml_loader import MAX_BYTES, RecipeError, parse_sections
from hydrarun.core.errors import UsageError
from hydrarun.core.files import open_file, write_atomically
from hydrarun.core.printable import make_printable
from hydrarun.core.strict_yaml import StrictLoader, dump_yaml, parse_yaml

MAX_MESSAGE = 1000  # characters; an error message quotes the recipe

MARK = "# written by `hydrarun recipe`, not by hand: a change shows"


@dataclass(frozen=True)
class Recipe:
    """A vetted recipe. `content`: the choices and values that Hydra composes; `whole`: all sections as written."""

    path: Path
    text: str
    whole: dict[str, Any]
    content: dict[str, Any]
    about: About | None
    evidence: Evidence | None

    @property
    def model(self) -> str | None:
        """The chosen option of the group `model`."""
        chosen = [entry["override /model"] for entry in self.content.get("defaults", []) if "override /model" in entry]
        return chosen[-1] if chosen else None

    @property
    def genuine(self) -> bool:
        """Whether the evidence was written for the current content of the file."""
        return self.evidence is not None and self.evidence.digest == compute_digest(self.whole)

    @property
    def status(self) -> str:
        """`unverified`, `verified`, `broken`, or `CHANGED` if the file was changed after its evidence was written."""
        if self.evidence is None:
            return "unverified"
        return self.evidence.status if self.genuine else CHANGED


def read_recipe(path: Path, name: str) -> Recipe:
    """Read and vet the recipe in a file. Raises UsageError, with `name` in the message, for forbidden content."""
    try:
        return _read_bytes(path)
    except RecipeError as refused:
        raise UsageError(f"recipe {name}: {make_printable(str(refused), MAX_MESSAGE)}") from None
    except OSError as error:
        raise UsageError(f"recipe {name}: {error.strerror}") from None


def _read_bytes(path: Path) -> Recipe:
    with open_file(path) as file:
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
    """Return the evidence as plain data, with the digest that covers the recipe and the evidence."""
    unsigned = parse_yaml(format_evidence({**to_plain_data(evidence), "digest": ""}))
    return {**unsigned["evidence"], "digest": compute_digest({**recipe.whole, **unsigned})}


def format_evidence(evidence: dict[str, Any]) -> str:
    """Format the section `evidence` as YAML, with `MARK` above it."""
    return f"{MARK}\n" + dump_yaml({"evidence": evidence})


def replace_evidence(recipe: Recipe, evidence: Evidence) -> str:
    """Return the recipe's text with this evidence instead of the old one. Raises UsageError if it becomes too large."""
    start, end = _find_evidence_section(recipe.text)
    before, after = recipe.text[:start], recipe.text[end:]
    if start == end and before:  # no evidence yet
        before = before.rstrip("\n") + "\n\n"
    section = sign_evidence(recipe, evidence)
    text = before + format_evidence(section) + after
    if not holds_sections(text, {**recipe.whole, "evidence": section}):
        raise UsageError(
            f"recipe {recipe.path}: cannot insert the evidence; write each section of the recipe on lines of its own"
        )
    if len(text.encode()) > MAX_BYTES:
        count = len(evidence.measured.outputs) if evidence.measured else 0
        raise UsageError(
            f"recipe {recipe.path}: the evidence of {count} outputs makes it larger than {MAX_BYTES // 1024} KiB;"
            " let it draw fewer outputs"
        )
    return text


def holds_sections(text: str, whole: dict[str, Any]) -> bool:
    """Return whether `text`, of any length, is the YAML of these sections."""
    try:
        return bool(parse_yaml(text) == whole)
    except ValueError:
        return False


def write_evidence(recipe: Recipe, evidence: Evidence) -> None:
    """Write the evidence into the recipe's file. Raises OSError if the file cannot be written."""
    write_atomically(recipe.path, replace_evidence(recipe, evidence).encode())


def _find_evidence_section(text: str) -> tuple[int, int]:
    """Return start and end of the section `evidence` with `MARK` above it; without one, the end of the text twice."""
    root = yaml.compose(text, StrictLoader)
    for key, value in root.value if isinstance(root, yaml.MappingNode) else ():
        if key.value != "evidence":
            continue
        start = key.start_mark.index
        lines = text[start : value.end_mark.index].splitlines(keepends=True)
        while lines and (not lines[-1].strip() or lines[-1].startswith("#")):
            lines.pop()  # the parser counts blank lines and comments up to the next key as part of a section
        end = start + len("".join(lines))
        return start - len(MARK) - 1 if text[:start].endswith(f"{MARK}\n") else start, end
    return len(text), len(text)
