"""A model at its published size with random weights, and its denoising loops: diffusers', and ours with accelerations.

No checkpoint is read. All rows share the weights (bench/shared_weights.py), the initial noise and the random text
embeddings. The loop of diffusers is its own pipeline with embedded prompts. Ours are the stages of a run between
encoding and decoding.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from measuring import Drawn, asked, theirs
from shared_weights import SharedTables, diffusers_transformer, own_bytes, quantized, random_transformer, smaller, twin
from torch import Tensor

from hydrarun.acceleration.cache.base import NoCache
from hydrarun.config.compose import compose_unchecked
from hydrarun.config.targets import instantiate, load_class
from hydrarun.core.device import read_peak_bytes
from hydrarun.core.errors import UsageError
from hydrarun.core.progress import Progress
from hydrarun.core.timing import Timings
from hydrarun.engine.plan.configs import read_known_shapes
from hydrarun.engine.plan.dry_forward import DryForward
from hydrarun.engine.plan.estimate import build_meta_transformer, shorten_blocks
from hydrarun.engine.plan.meter import META, Meter, Work
from hydrarun.models.experts import Experts
from hydrarun.models.transformer import NEGATIVE, POSITIVE
from hydrarun.pipeline.components import quiet_libraries
from hydrarun.pipeline.request import make_state
from hydrarun.pipeline.stage import Components, Stage, run_stages


@dataclass(frozen=True)
class Case:
    """A model option with a size, the number of text tokens per branch, and a note for the table."""

    model: str
    width: int
    height: int
    text: int
    note: str = ""


CASES = {
    "qwen_image": Case("qwen_image", 1024, 1024, 128),
    "flux_dev": Case("flux_dev", 1024, 1024, 512),
    "wan22_480p": Case("wan22_t2v_a14b", 832, 480, 512, ", 81 frames, one of the two experts for all steps"),
}

#: our transformers' text inputs: the arguments of diffusers, and the keys of config.json for their width
TEXT = {"encoder_hidden_states": "prompt_embeds", "pooled_projections": "pooled_prompt_embeds"}
WIDTHS = {
    "encoder_hidden_states": ("joint_attention_dim", "text_dim"),
    "pooled_projections": ("pooled_projection_dim",),
}

REFERENCE, COMPILED = "diffusers", "diffusers compiled"
CACHE = ("cache=every_n", "cache/predictor=taylor", "cache.gate.last=0")  # half of the steps, if their number is even
#: our rows, with the accelerations they add to a plain run
OURS: dict[str, tuple[str, ...]] = {
    "hydrarun": (),
    "+compile": ("compile",),
    "+tables": ("tables",),
    "+fp8": ("fp8",),
    "+compile +fp8": ("compile", "fp8"),
    "+cache": ("cache",),
    "+all": ("compile", "tables", "fp8", "cache"),
}
ROWS = (REFERENCE, COMPILED, *OURS)


@dataclass
class Row:
    """A loop that is ready to run, and its measurements."""

    transformer: Any
    #: the pipeline of diffusers, or our `Components`
    runs: Any
    #: overrides of the cache
    cache: tuple[str, ...] = ()
    #: bytes of its weights, shared or not, plus its largest allocation in addition to them
    peak: int = 0
    #: in each round, the time of a skipped step divided by that of a computed step
    skipped: list[float] = field(default_factory=list)


class Bench:
    """All rows of a case, built at first use. `blocks` (of each list) and `heads`: None for the published ones."""

    def __init__(
        self,
        case: Case,
        steps: int,
        device: torch.device,
        dtype: torch.dtype,
        blocks: int | None = None,
        heads: int | None = None,
    ) -> None:
        self.case, self.device, self.dtype = case, device, dtype
        sampling = {
            "num_inference_steps": steps,
            "width": case.width,
            "height": case.height,
            "guidance_scale_2": "null",  # one expert
        }
        overrides = [f"model={case.model}", *(f"sampling.{key}={value}" for key, value in sampling.items())]
        config, _ = compose_unchecked(overrides)
        self.model = config["model"]
        self.configs = smaller(read_known_shapes(self.model["facts"]["shapes"]), blocks, heads)
        self.cls = load_class(self.model["transformer"], "model.transformer")
        self.guidance = instantiate(self.model["guidance"], "model.guidance")
        nodes = enumerate(self.model["stages"])
        stages: list[Stage] = [instantiate(node, f"model.stages[{index}]") for index, node in nodes]
        #: the stages between text encoder and VAE
        self.stages = [stage for stage in stages if not {"text_encoder", "vae"} & set(stage.uses)]
        self.state = make_state({**config["sampling"], "prompt": ""})
        self.generator = torch.Generator().manual_seed(0)
        names = [name for node in self.model["stages"] for name in node.get("returns", ()) if name]
        branches = self.guidance.branches(self.state)
        self.state.conditioning = {branch: {name: self.text(name) for name in names} for branch in branches}
        self.rows: dict[str, Row] = {}

    def text(self, name: str) -> Tensor | None:
        """Return random values in the shape of a text encoder's output; None for a mask, because nothing is padded."""
        if name not in WIDTHS:
            return None
        config = self.configs.components["transformer"]
        width = next(config[key] for key in WIDTHS[name] if key in config)
        tokens = (self.case.text,) if name == "encoder_hidden_states" else ()
        return torch.randn(1, *tokens, width, generator=self.generator).to(self.device, self.dtype)

    def parts(self, transformer: Any, device: torch.device) -> Components:
        """Return the components of a run; the VAE is on the meta device, for its config only."""
        with torch.device("meta"), quiet_libraries():
            vae = self.configs.cls("vae").from_config(self.configs.components["vae"])
        pipeline = SimpleNamespace(scheduler=self.scheduler(), vae=vae)
        guided = (self.guidance, self.model["patch_size"])
        return Components(
            Experts({"transformer": transformer}), pipeline, *guided, device, self.dtype, Progress(quiet=True)
        )

    def scheduler(self) -> Any:
        return self.configs.cls("scheduler").from_config(self.configs.components["scheduler"])

    @cached_property
    def weights(self) -> Any:
        """Our transformer, whose weights all rows share."""
        return random_transformer(self.cls, self.configs, self.device, self.dtype)

    @cached_property
    def reference(self) -> Any:
        """The transformer of diffusers."""
        return diffusers_transformer(self.weights, self.configs, self.device)

    @cached_property
    def eight_bits(self) -> Any:
        """Our transformer, quantized. Raises `UsageError` if the device does not support it."""
        node = compose_unchecked(["quantization=fp8"])[0]["quantization"]
        return quantized(self.weights, instantiate(node, "quantization"), self.device)

    def work(self) -> Work:
        """Count the work of one step with all its branches, on the meta device."""
        meter = Meter()
        transformer = build_meta_transformer(self.cls, self.configs, "transformer", self.dtype, None)
        meter.leave_out(transformer)
        shorten_blocks(transformer, meter, 2)
        state = replace(self.state)
        state.conditioning = {
            branch: {name: None if value is None else value.to(META) for name, value in texts.items()}
            for branch, texts in self.state.conditioning.items()
        }
        estimates = DryForward(self.stages, self.parts(transformer, META), meter).run(state)
        return sum((estimate.work for estimate in estimates), Work()) * (1 / state.num_inference_steps)

    def row(self, name: str) -> Row:
        """Return the row, building it if needed. Raises `UsageError` if the device or the model does not support it."""
        if name not in self.rows:
            self.rows[name] = self.ours(OURS[name]) if name in OURS else self.diffusers(name == COMPILED)
        return self.rows[name]

    def diffusers(self, compiled: bool) -> Row:
        """Build the pipeline of diffusers without text encoder and VAE."""
        transformer = twin(self.reference)
        if compiled:
            transformer.compile_repeated_blocks(fullgraph=True)
        components = {name: None for name, value in self.configs.index.items() if isinstance(value, list)}
        cls = load_class(self.model["pipeline"], "model.pipeline")
        with quiet_libraries():
            pipeline = cls(**components | {"scheduler": self.scheduler(), "transformer": transformer})
        pipeline.set_progress_bar_config(disable=True)
        return Row(transformer, pipeline)

    def ours(self, settings: tuple[str, ...]) -> Row:
        """Build the components of a run with these accelerations."""
        transformer = twin(self.eight_bits if "fp8" in settings else self.weights)
        parts = self.parts(transformer, self.device)
        if "tables" in settings:
            tables = SharedTables(transformer, self.dtype)
            if not tables.places:
                raise UsageError("this model's blocks have no modulation weights")
            parts.tables = {"transformer": tables}
        if "compile" in settings:
            instantiate(compose_unchecked(["compile=blocks"])[0]["compile"], "compile").apply(transformer)
        return Row(transformer, parts, CACHE if "cache" in settings else ())

    def draw(self, name: str) -> Drawn:
        """Run one loop and record its peak memory."""
        row, loop = self.row(name), self.our_loop if name in OURS else self.their_loop
        if self.device.type == "cpu":
            return loop(row)
        module = torch.get_device_module(self.device)
        before = module.memory_allocated(self.device)
        module.reset_peak_memory_stats(self.device)
        drawn = loop(row)
        row.peak = own_bytes(row.transformer) + read_peak_bytes(self.device) - before
        return drawn

    def their_loop(self, row: Row) -> Drawn:
        texts = {
            prefix + TEXT[name]: value
            for branch, prefix in ((POSITIVE, ""), (NEGATIVE, "negative_"))
            for name, value in self.state.conditioning.get(branch, {}).items()
            if value is not None
        }
        with quiet_libraries():
            return theirs(row.runs, row.transformer, asked(row.runs, self.state, **texts), self.device)

    def our_loop(self, row: Row) -> Drawn:
        row.runs.cache = instantiate(compose_unchecked(row.cache)[0]["cache"], "cache") if row.cache else NoCache()
        state, timings = replace(self.state), Timings(self.device)
        run_stages(self.stages, state, row.runs, timings)
        if row.cache:
            found = row.runs.cache.summarize(timings.steps)
            row.skipped.append(found["skipped_step_s"] / found["computed_step_s"])
        return Drawn(timings.steps, state.latents)
