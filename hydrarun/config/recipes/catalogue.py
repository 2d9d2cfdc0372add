"""The named recipes, each with its description, model and status."""

from __future__ import annotations

from dataclasses import dataclass

from hydrarun.config.recipes import search
from hydrarun.core.errors import UsageError
from hydrarun.core.printable import make_printable

HEADER = ("recipe=", "what it is", "model", "status", "evidence from")

MAX_CELL = 300  # most characters of a cell


@dataclass(frozen=True)
class CatalogueEntry:
    """One recipe. For a refused recipe, `status` holds the reason."""

    name: str
    status: str
    description: str = ""
    author: str | None = None
    model: str | None = None
    hardware: str | None = None
    date: str | None = None

    def cells(self) -> tuple[str, ...]:
        """Return the entry as a table row."""
        texts = (self.name, self.description, self.model, self.status, self.hardware)
        return tuple(make_printable(text or "", MAX_CELL) for text in texts)


def list_entries() -> list[CatalogueEntry]:
    """Return an entry for every named recipe. A refused recipe is listed with the reason."""
    return [read_entry(name) for name in search.list_recipe_names()]


def read_entry(name: str) -> CatalogueEntry:
    """Return the entry of one recipe."""
    try:
        recipe = search.load_recipe(name)
    except UsageError as error:
        return CatalogueEntry(name, f"refused: {error}")
    about, measured = recipe.about, recipe.evidence.measured if recipe.evidence else None
    return CatalogueEntry(
        name,
        recipe.status,
        " ".join(about.description.split()) if about else "",
        about.author if about else None,
        recipe.model,
        name_machine(measured.hardware) if measured else None,
        measured.date if measured else None,
    )


def name_machine(hardware: dict[str, object]) -> str:
    """Return the GPU, or without one the processor, of the `hardware` section of run.json."""
    return str(hardware.get("gpu") or hardware.get("cpu") or "?")
