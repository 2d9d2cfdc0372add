"""Modulation tables: a block's shifts, scales and gates for all steps, instead of the weights that compute them.

These values depend on the timestep and the global conditioning, not on the tokens, and both are known before the first
step. The weights, up to a third of a model's, are not loaded with the model: they are read layer by layer when a table
is made, and released afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hydrarun.acceleration.offload.strategies import NoOffload
from hydrarun.acceleration.parallel.hsdp import unshard_rest
from hydrarun.core.progress import Progress
from hydrarun.models.layers.norm import Modulation, select_by_token
from hydrarun.models.transformer import Step, Transformer
from hydrarun.models.weights.loader import Placement, find_placement, read_parameter, set_parameter
from hydrarun.models.weights.safetensors import Checkpoint

MIB = 2**20


class ModulationOffload(NoOffload):
    """Replaces the modulation weights by tables, on every device; the weights stay in their files."""

    def skip_loading(self, transformer: Transformer) -> list[str]:
        return [name for name, module in transformer.named_modules() if isinstance(module, Modulation)]


class ModulationTable(nn.Module):
    """Replaces a `Modulation` by its values `[R, parts * D]`, one row for each conditioning."""

    table: Tensor | None

    def __init__(self, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.register_buffer("table", None, persistent=False)

    def forward(self, rows: Tensor, index: Tensor | None = None) -> tuple[Tensor, ...]:
        """Look up rows `[B, K]`: `parts` tensors `[B, K, D]`, or `[B, S, D]` by each token's `index` `[S]`."""
        assert self.table is not None
        return select_by_token(self.table[rows], index).chunk(self.parts, dim=-1)


class TableSlot(NamedTuple):
    """A table, and the module on the meta device that computes it, with the sources of its weights."""

    table: ModulationTable
    modulation: Modulation
    sources: Mapping[str, Placement]  # {parameter of the modulation: where it is read from}


class ModulationTables:
    """The tables of one transformer, which replace all its `Modulation`s.

    They are made again when a request's timesteps or global conditioning differ from the last request's.
    """

    def __init__(
        self, transformer: Transformer, folder: Path, device: torch.device, dtype: torch.dtype, progress: Progress
    ) -> None:
        """`transformer` was loaded from `folder` without the modulations' weights; it is changed in place."""
        self.transformer = transformer
        self.checkpoint = Checkpoint(folder)
        self.device = device
        self.dtype = dtype
        self.progress = progress
        self.places = list(insert_tables(transformer))
        self.made_of: Tensor | None = None

    def find_rows(self, timesteps: Tensor, conditioning: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Tensor]]:
        """Make the tables and return `{branch: [B, K]}` for each of the timesteps `[N]`: the rows that replace `temb`.

        Equal conditioning shares a row. Raises `RunError` for weights that can no longer be read.
        """
        with unshard_rest(self.transformer):
            each = [self.make_temb(timesteps, one) for one in conditioning.values()]
        temb = torch.stack(each, dim=1)  # [N, branches, B, K, D]
        # float32 holds every value of the narrower dtypes, which not every device can sort
        found, rows = temb.flatten(0, -2).float().unique(dim=0, return_inverse=True)
        self.make_tables(found.to(temb.dtype))
        return [dict(zip(conditioning, step, strict=True)) for step in rows.view(temb.shape[:-1])]

    def make_temb(self, timesteps: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
        """Return `temb` of one branch's items `[B]` at the timesteps `[N]`: `[N, B, K, D]`."""
        items = next(len(value) for value in conditioning.values() if isinstance(value, Tensor))
        return torch.stack(
            [self.transformer.make_temb(timesteps, self.dtype, **select_item(conditioning, i)) for i in range(items)],
            dim=1,
        )

    def make_tables(self, temb: Tensor) -> None:
        """Make the tables of `temb` `[R, D]`, unless they exist already."""
        if self.made_of is not None and torch.equal(self.made_of, temb):
            return
        self.made_of = None  # if an error interrupts this, the tables count as not made
        with self.progress.phase("making modulation tables"):
            for place in self.places:
                place.table.table = None  # free the old table before the new one is allocated
                place.table.table = self.compute_table(place, temb)
        self.made_of = temb
        tables, weights = self.count_bytes()
        self.progress.note(f"modulation tables: {tables / MIB:.1f} MiB instead of {weights / MIB:.1f} MiB of weights")

    def compute_table(self, place: TableSlot, temb: Tensor) -> Tensor:
        """Return one table. Its weights are on the device only during this call."""
        weights = {
            name: read_parameter(source, self.checkpoint, self.device, self.dtype)
            for name, source in place.sources.items()
        }
        for name, weight in weights.items():
            set_parameter(place.modulation, name, weight)
        values = place.modulation.values(temb)
        place.modulation.to("meta")
        return values

    def count_bytes(self) -> tuple[int, int]:
        """Return the bytes of all tables, and of the weights that they replace."""
        tables = sum(place.table.table.nbytes for place in self.places if place.table.table is not None)
        numbers = sum(p.numel() for place in self.places for p in place.modulation.parameters())
        return tables, numbers * self.dtype.itemsize


def insert_tables(transformer: Transformer) -> Iterator[TableSlot]:
    """Replace every modulation by a table; yield a slot for each."""
    for name, module in list(transformer.named_modules()):
        if isinstance(module, Modulation):
            weights = {leaf: tuple(parameter.shape) for leaf, parameter in module.named_parameters()}
            sources = {leaf: find_placement(transformer, f"{name}.{leaf}", shape) for leaf, shape in weights.items()}
            owner, _, attribute = name.rpartition(".")
            table = ModulationTable(module.parts)
            setattr(transformer.get_submodule(owner), attribute, table)
            yield TableSlot(table, module, sources)


def select_item(conditioning: Mapping[str, Any], index: int) -> dict[str, Any]:
    """Return one item's conditioning, as one row that serves all timesteps."""
    return {
        name: value[index : index + 1] if isinstance(value, Tensor) else value for name, value in conditioning.items()
    }


def find_step_rows(
    tables: Mapping[str, ModulationTables],
    steps: Sequence[Step],
    timesteps: Tensor,
    conditioning: Mapping[str, Mapping[str, Any]],
) -> dict[int, dict[str, Tensor]]:
    """Make the tables and return each step's rows in them, `{step: {branch: [B, K]}}`; {} without tables."""
    found: dict[int, dict[str, Tensor]] = {}
    for name, own in tables.items():
        indices = [step.index for step in steps if step.expert == name]
        found |= zip(indices, own.find_rows(timesteps[indices], conditioning), strict=True)
    return found
