"""The loop: timesteps x experts x guidance branches, one for all models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hydrarun.errors import RunError
from hydrarun.experts import LOW_NOISE
from hydrarun.parallel.cfg import predict_branches
from hydrarun.pipeline import Parts, Stage
from hydrarun.state import State
from hydrarun.timing import Timings


class Denoise(Stage):
    """Predict each branch, combine them, let the scheduler step.

    `passes` names the fields of the state that the transformer takes beside latents, timestep and the branch's own
    conditioning; a field with one row serves all items.
    """

    needs: tuple[str, ...] = (
        "latents",
        "timesteps",
        "conditioning",
        "true_cfg_scale",
        "guidance_scale",
        "guidance_scale_2",
    )
    gives = ("latents",)
    phase = "denoise"

    def __init__(self, passes: Sequence[str] = ()) -> None:
        self.passes = tuple(passes)
        self.needs = (*Denoise.needs, *self.passes)

    def __call__(self, state: State, parts: Parts, timings: Timings) -> None:
        shared = {name: for_all(getattr(state, name), len(state.latents)) for name in self.passes}
        conditioning = {branch: {**state.conditioning[branch], **shared} for branch in parts.guidance.branches(state)}
        scheduler = parts.pipeline.scheduler
        values = state.timesteps.tolist()  # on the host once, not one by one inside the loop
        with parts.progress.phase("denoising", total=len(values)) as advance:
            for timestep, value in zip(state.timesteps, values, strict=True):
                start = timings.now()
                prediction = self.predict(state, parts, conditioning, timestep, parts.experts.name_at(value))
                state.latents = scheduler.step(prediction, timestep, state.latents, return_dict=False)[0]
                timings.steps.append(timings.now() - start)
                advance()
        if not state.latents.isfinite().all():
            raise RunError(
                f"the latents are NaN or infinite after {len(values)} steps: the weights are damaged, or"
                f" {str(parts.dtype).removeprefix('torch.')} is too narrow for this model; try dtype=float32"
            )

    def predict(
        self, state: State, parts: Parts, conditioning: dict[str, dict[str, Any]], timestep: Tensor, expert: str
    ) -> Tensor:
        """The guided prediction of one step, in the shape of the latents."""
        transformer = parts.experts.ready(expert)
        latents, times = state.latents.to(parts.dtype), timestep.expand(len(state.latents))

        def predict(branch: str) -> Tensor:
            return transformer(latents, times, conditioning[branch], branch=branch, expert=expert)

        axis = parts.mesh["cfg"] if parts.mesh else None
        predictions = predict_branches(list(conditioning), predict, axis, latents)
        return parts.guidance.combine(predictions, parts.guidance.scale_for(state, low_noise=expert == LOW_NOISE))


def for_all(value: Any, count: int) -> Any:
    """One row of a tensor repeated for each item, without a copy; anything else as it is."""
    return value.expand(count, *value.shape[1:]) if isinstance(value, Tensor) else value
