"""Nodes of the cache group for tests, and a toy transformer whose results can be computed by hand."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any, ClassVar

import torch
from torch import nn

from hydrarun.acceleration.cache.base import Cache, Schedule
from hydrarun.models.layers.tokens import Tokens
from hydrarun.models.transformer import Inputs, Step, Transformer

#: the identity polynomial
SAME = [1.0, 0.0]


@cache
def option(name: str, predictor: str | None) -> dict[str, Any]:
    from hydrarun.config.compose import compose_unchecked

    chosen = [f"cache={name}"] + ([f"cache/predictor={predictor}"] if predictor else [])
    return compose_unchecked(chosen)[0]["cache"]


def node(name: str, predictor: str | None = None, order: int | None = None, **gate: Any) -> dict[str, Any]:
    """Return an option of conf/cache with these gate values; TeaCache gets the identity polynomial."""
    made = copy.deepcopy(option(name, predictor))
    made["gate"].update(gate)
    if order is not None:
        made["predictor"]["order"] = order
    if name == "teacache":
        made["gate"]["fit"] = {"coefficients": {"transformer": SAME, "transformer_2": SAME}}
    return made


def mask(steps: list[int], predictor: str | None = None, order: int | None = None) -> dict[str, Any]:
    return node("mask", predictor, order, steps=steps, density=None)


class Adds(nn.Module):
    """A block that adds a polynomial of the timestep to each token."""

    def __init__(self, coefficients: list[float]) -> None:
        super().__init__()
        self.coefficients = coefficients

    def forward(self, hidden_states: Any, encoder_hidden_states: Any, tokens: Any) -> tuple[Any, Any]:
        added = sum(c * tokens.temb**power for power, c in enumerate(self.coefficients))
        return hidden_states + added * encoder_hidden_states, encoder_hidden_states


class Toy(Transformer):
    """Two blocks that add a polynomial of the timestep, times the conditioning of the branch."""

    block_lists: ClassVar = ("blocks",)

    def __init__(self, coefficients: list[float]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Adds(coefficients), Adds([0.5 * c for c in coefficients])])
        self.run_at: list[float] = []
        self.blocks[1].register_forward_pre_hook(lambda module, args: self.run_at.append(float(args[2].temb)))

    def embed(self, hidden_states: Any, timestep: Any, *, factor: float) -> Tokens:
        return Tokens(hidden_states, torch.full_like(hidden_states, factor), temb=timestep[0])

    def head(self, tokens: Any) -> Any:
        return tokens.hidden_states

    def gate_signal(self, tokens: Any) -> Any:
        return tokens.hidden_states + tokens.temb


def schedule(timesteps: list[float], boundary: float = 0.0) -> Schedule:
    names = ["transformer" if time >= boundary else "transformer_2" for time in timesteps]
    return Schedule(tuple(Step(i, time, name) for i, (time, name) in enumerate(zip(timesteps, names, strict=True))))


def loop(cache: Cache, toys: dict[str, Toy], plan: Schedule, factors: dict[str, float]) -> list[dict[str, Any]]:
    """Return the predictions of all steps of a request, on the same latents."""
    cache.start(plan, list(factors), None)
    latents = torch.linspace(-1, 1, 2 * 5 * 3, dtype=torch.float64).view(2, 5, 3)
    conditioning = {branch: {"factor": factor} for branch, factor in factors.items()}
    made = []
    for step in plan.steps:
        inputs = Inputs(latents, torch.full((2,), step.timestep, dtype=torch.float64), conditioning)
        made.append(toys[step.expert](inputs, step, cache))
    cache.end()
    return made
