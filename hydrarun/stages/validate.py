"""Does the loaded checkpoint take this request? A loaded model is asked again and again, with other settings."""

from __future__ import annotations

from hydrarun.fit import check_guidance_scale, check_size
from hydrarun.pipeline import Parts, Stage
from hydrarun.state import State
from hydrarun.timing import Timings


class ValidateInput(Stage):
    """Refuses sizes that the VAE cannot make and settings that the checkpoint would ignore."""

    needs = ("prompts", "height", "width", "guidance_scale")
    phase = "encode"

    def __call__(self, state: State, parts: Parts, timings: Timings) -> None:
        check_size(state.height, state.width, parts.pipeline.image_processor.config.vae_scale_factor)
        check_guidance_scale(state.guidance_scale, parts.transformer.config.get("guidance_embeds", False))
