"""Checks a request against the loaded checkpoint. A loaded model serves requests with different settings."""

from __future__ import annotations

from hydrarun.config.checks.checkpoint import check_request_fit
from hydrarun.core.timing import Timings
from hydrarun.pipeline.stage import Components, Stage
from hydrarun.pipeline.state import State


class ValidateInput(Stage):
    """Refuses sizes and lengths that the checkpoint cannot make, and settings that it would ignore."""

    needs = ("height", "width", "num_frames", "guidance_scale", "audio_start_in_s", "audio_end_in_s")
    phase = "encode"

    def __call__(self, state: State, parts: Components, timings: Timings) -> None:
        sampling = {name: getattr(state, name) for name in self.needs}
        check_request_fit(sampling, parts.pipeline.vae.config, parts.experts.config, parts.patch_size)
