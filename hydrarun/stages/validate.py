"""Does the loaded checkpoint take this request?"""

from __future__ import annotations

from hydrarun.errors import UsageError
from hydrarun.pipeline import Parts, Stage
from hydrarun.sizes import check_size
from hydrarun.state import State
from hydrarun.timing import Timings


class ValidateInput(Stage):
    """Refuses sizes that the VAE cannot make and settings that the checkpoint would ignore."""

    needs = ("prompts", "height", "width", "guidance_scale")
    phase = "encode"

    def __call__(self, state: State, parts: Parts, timings: Timings) -> None:
        check_size(state.height, state.width, parts.pipeline.image_processor.config.vae_scale_factor)
        if state.guidance_scale is not None:
            raise UsageError(
                f"sampling.guidance_scale={state.guidance_scale}: this checkpoint is not guidance-distilled and would"
                " ignore it; use sampling.true_cfg_scale"
            )
