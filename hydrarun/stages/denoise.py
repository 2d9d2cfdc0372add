"""The loop: timesteps x guidance branches, one for all models."""

from __future__ import annotations

from torch import Tensor

from hydrarun.errors import RunError
from hydrarun.pipeline import Parts, Stage
from hydrarun.state import State
from hydrarun.timing import Timings


class Denoise(Stage):
    """Predict each branch, combine them, let the scheduler step."""

    needs = ("latents", "timesteps", "conditioning", "grid", "true_cfg_scale")
    gives = ("latents",)
    phase = "denoise"

    def __call__(self, state: State, parts: Parts, timings: Timings) -> None:
        branches = parts.guidance.branches(state.true_cfg_scale)
        with parts.progress.phase("denoising", total=len(state.timesteps)) as advance:
            for timestep in state.timesteps:
                start = timings.now()
                batch_timestep = timestep.expand(len(state.latents))
                predictions = {branch: self.predict(state, parts, batch_timestep, branch) for branch in branches}
                prediction = parts.guidance.combine(predictions, state.true_cfg_scale)
                state.latents = parts.pipeline.scheduler.step(prediction, timestep, state.latents, return_dict=False)[0]
                timings.steps.append(timings.now() - start)
                advance()
        if not state.latents.isfinite().all():
            raise RunError(
                f"the latents are NaN or infinite after {len(state.timesteps)} steps: the weights are damaged, or"
                f" {str(parts.dtype).removeprefix('torch.')} is too narrow for this model; try dtype=float32"
            )

    def predict(self, state: State, parts: Parts, timestep: Tensor, branch: str) -> Tensor:
        """The transformer's prediction `[N, S, C]` for one branch."""
        conditioning = {**state.conditioning[branch], "grid": state.grid}
        return parts.transformer(state.latents, timestep, conditioning, branch=branch)
