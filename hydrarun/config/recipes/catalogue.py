"""The recipes that have a name, with what each says about itself."""

from __future__ import annotations

from dataclasses import dataclass

from hydrarun.config.recipes import search as source
from hydrarun.core.errors import UsageError
from hydrarun.core.quoting import printable

HEADER = ("recipe=", "what it is", "model", "status", "evidence from")


@dataclass(frozen=True)
class Entry:
    """One recipe; `status` says why where it is refused."""

    name: str
    status: str
    description: str = ""
    author: str | None = None
    model: str | None = None
    hardware: str | None = None
    date: str | None = None

    def cells(self) -> tuple[str, ...]:
        """A row of the table."""
        return tuple(
            printable(text or "") for text in (self.name, self.description, self.model, self.status, self.hardware)
        )


def entries() -> list[Entry]:
    """All of them; one that may not be used is listed with the reason."""
    return [entry(name) for name in source.names()]


def entry(name: str) -> Entry:
    """One of them."""
    try:
        recipe = source.recipe(name)
    except UsageError as error:
        return Entry(name, f"refused: {error}")
    about, measured = recipe.about, recipe.evidence.measured if recipe.evidence else None
    return Entry(
        name,
        recipe.status,
        " ".join(about.description.split()) if about else "",
        about.author if about else None,
        recipe.model,
        machine(measured.hardware) if measured else None,
        measured.date if measured else None,
    )


def machine(hardware: dict[str, object]) -> str:
    """The GPU, or else the processor, of run.json's `hardware`."""
    return str(hardware.get("gpu") or hardware.get("cpu") or "?")
