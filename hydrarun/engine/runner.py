"""The runner: builds once, then draws. The command and the Python API both use it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from hydrarun.acceleration.cache.base import Cache
from hydrarun.acceleration.parallel.data import find_own_indices, gather_frames
from hydrarun.config.checks.configuration import check_configuration
from hydrarun.config.checks.notes import find_notes
from hydrarun.core.device import choose_device, read_peak_bytes, reset_peak_bytes
from hydrarun.core.distributed.mesh import Axis
from hydrarun.core.errors import UsageError, suggest_name
from hydrarun.core.inputs import image_paths
from hydrarun.core.progress import Progress, SilentProgress
from hydrarun.core.timing import Timings
from hydrarun.engine.build import build_pipeline, make_backends, make_cache
from hydrarun.engine.plan.out_of_memory import name_memory_errors
from hydrarun.models.weights.safetensors import fingerprint_weights
from hydrarun.outputs.media import images, kinds
from hydrarun.outputs.media.images import InputImage
from hydrarun.outputs.provenance import collect_versions, describe_hardware, measure_peak_host_bytes
from hydrarun.outputs.writer import Picture
from hydrarun.pipeline.request import make_state, restore_sampling
from hydrarun.pipeline.stage import Stage, run_stages
from hydrarun.pipeline.state import State
from hydrarun.pipeline.truncation import describe_cut, gather_readings, list_records


class Runner:
    """A model with its weights loaded, built from a composed configuration (`hydrarun.config.compose`)."""

    def __init__(self, config: dict[str, Any], progress: Progress | None = None, device: str | None = None) -> None:
        """`device`: this rank's own device, where `config` names one for all ranks.

        Raises `UsageError` for settings that the user must change, `RunError` for weights that cannot be used.
        """
        self.config = config
        name = device or config["device"]
        self.progress = progress or SilentProgress()
        start = time.perf_counter()
        make_backends(config)  # refuses a backend that this machine lacks before weights are read
        with name_memory_errors(lambda: config, lambda: "loading", lambda: choose_device(name, Progress(quiet=True))):
            self.built = build_pipeline(config, self.progress, name)
        self.load_s = time.perf_counter() - start
        self.read_bytes = self.built.read_bytes

    def generate(self, **sampling: Any) -> list[Picture]:
        """Draw with the loaded model; keywords are fields of `sampling` and override the configuration's.

        `images=` replaces `input.images`.
        """
        fields = self.config["sampling"]
        given = dict(self.config["input"])
        if "images" in sampling:
            given["images"] = sampling.pop("images")
        for name in sampling:
            if name not in fields:
                raise UsageError(f"sampling has no field {name!r}.{suggest_name(name, [*fields, 'images'])}")
        changed = {**self.config, "sampling": {**fields, **sampling}, "input": given}
        check_configuration(changed)
        for note in find_notes(changed, "negative_prompt" in sampling):
            self.progress.warn(note)
        state = self.prepare_state(changed, self.read_images(changed))
        return make_pictures(self.draw(state, Timings(self.built.parts.device), changed["cache"]))

    def read_images(self, config: dict[str, Any]) -> list[InputImage]:
        """Read the input images. Notes what was changed while reading one."""
        alpha = kinds.find_model_kind(config["model"]).alpha
        read = [images.read_image(path, alpha) for path in image_paths(config)]
        for image in read:
            if image.note:
                self.progress.warn(f"{image.path.name}: {image.note}")
        return read

    def prepare_state(self, config: dict[str, Any], given: list[InputImage]) -> State:
        """Return the initial state of the batch that `config` asks for."""
        state = make_state(config["sampling"], [image.image for image in given])
        state.strict_prompt = config["strict_prompt"]
        return state

    def warm_up(self, config: dict[str, Any], given: list[InputImage], timings: Timings) -> None:
        """Draw the run of `config` for `warmup` steps of each transformer, and discard the result.

        Adds its duration to `timings`. Restores the random generators, so the run itself is unchanged.
        """
        count, parts = config["warmup"], self.built.parts
        if not count:
            return
        self.progress.note(f"warming up, {count} step{'' if count == 1 else 's'} of each transformer:")
        own = Timings(parts.device)
        start = own.now()
        devices = [] if parts.device.type == "cpu" else [parts.device]
        parts.warmup = count
        try:
            with torch.random.fork_rng(devices, device_type=parts.device.type if devices else None):
                self.draw(self.prepare_state(config, given), own, config["cache"])
        finally:
            parts.warmup = None
        timings.warmup, timings.compile = own.now() - start, own.compile

    def draw(self, state: State, timings: Timings, cache: dict[str, Any] | None = None) -> State:
        """Run the stages on this rank's share of the items, and return a state with the frames of all items.

        `cache`: the node of the cache; None: that of the runner's own configuration.
        """
        own = self.local_shard(state)
        self.run_stages(self.built.stages, state, own, timings, cache)
        return self.gather(state, own)

    def local_shard(self, state: State) -> State:
        """Return this rank's share of a request."""
        axis = self.data_axis()
        return state.select(find_own_indices(len(state.prompts), axis)) if axis else state

    def run_stages(
        self,
        stages: Sequence[Stage],
        state: State,
        own: State,
        timings: Timings,
        cache: dict[str, Any] | None = None,
    ) -> None:
        """Run these stages on this rank's share of the request `state`."""
        parts = self.built.parts
        parts.cache = self.get_cache(cache or self.config["cache"])
        with name_memory_errors(
            lambda: {**self.config, "sampling": restore_sampling(state)},
            lambda: timings.running,
            lambda: parts.device,
        ):
            run_stages(stages, own, parts, timings)

    def get_cache(self, node: dict[str, Any]) -> Cache:
        """Return the cache of a node: the one built with the model if the nodes are equal. Each request restarts it."""
        built = self.built
        return built.cache if node == self.config["cache"] else make_cache(node, built.source.folder)

    def gather(self, state: State, own: State) -> State:
        """Return the request `state` with the frames of every rank. `own`: this rank's share, drawn."""
        axis = self.data_axis()
        if not axis:
            return own
        whole = replace(own, prompts=state.prompts, negative_prompts=state.negative_prompts, seeds=state.seeds)
        device = self.built.parts.device
        whole.frames = gather_frames(own.frames, len(state.prompts), axis, device)
        whole.readings = gather_readings(own.readings, axis, device)
        for prompt in whole.readings.keys() - own.readings.keys():  # of other ranks, which print nothing
            self.progress.warn(describe_cut(prompt, whole.readings[prompt]))
        return whole

    def data_axis(self) -> Axis | None:
        """Return this rank's data-parallel axis; None if pictures are not split across ranks."""
        mesh = self.built.parts.mesh
        return mesh["data"] if mesh else None

    def redraw(
        self, config: dict[str, Any], given: list[InputImage], cache: dict[str, Any]
    ) -> tuple[list[Picture], dict[str, Any]]:
        """Draw the run of `config` again with the cache of this node. Returns the pictures and the `results`."""
        start = time.perf_counter()
        timings = Timings(self.built.parts.device)
        state = self.draw(self.prepare_state(config, given), timings, cache)
        return make_pictures(state), self.collect_results(timings, start)

    def reset_stats(self) -> None:
        """Reset load time, bytes read and peak device memory, for another run with the loaded model."""
        self.load_s, self.read_bytes = 0.0, 0
        reset_peak_bytes(self.built.parts.device)

    def close(self) -> None:
        """Free the model and its memory. Nothing can be drawn afterwards."""
        del self.built

    def summarize_timings(self, timings: Timings, start: float) -> dict[str, Any]:
        """Return the seconds so far. `total_s` is loading and everything since `start`."""
        phases = {f"{name}_s": timings.phases.get(name, 0.0) for name in ("encode", "denoise", "decode")}
        total = self.load_s + time.perf_counter() - start
        beside = {**self.summarize_reads(), "warmup_s": timings.warmup, "compile_s": timings.compile}
        return {"load_s": self.load_s, **beside, **phases, "steps_s": timings.steps, "total_s": total}

    def summarize_reads(self) -> dict[str, float | None]:
        """Return the bytes of weights that were read for this run, and their rate."""
        rate = self.read_bytes / self.built.read_s if self.read_bytes else None
        return {"read_bytes": self.read_bytes, "read_bytes_per_s": rate}

    def collect_results(self, timings: Timings, start: float) -> dict[str, Any]:
        """Return the measurements so far, by their keys in run.json."""
        return {
            "timings": self.summarize_timings(timings, start),
            "memory": self.measure_memory(),
            "cache": self.built.parts.cache.summarize(timings.steps),
        }

    def measure_memory(self) -> dict[str, int]:
        """Return this run's peak bytes on the host and on the device (0 for the CPU, which is the host)."""
        return {
            "peak_host_bytes": measure_peak_host_bytes(),
            "peak_device_bytes": read_peak_bytes(self.built.parts.device),
        }

    def collect_facts(self) -> dict[str, Any]:
        """Return what the run really uses, in addition to its configuration."""
        built = self.built
        return {
            "weights": {
                "path": self.config["model"]["path"],
                "revision": built.source.revision,
                "fingerprint": fingerprint_weights(built.source.folder),
            },
            "verified": self.config["verify"],
            "device": str(built.parts.device),
            "dtype": str(built.parts.dtype).removeprefix("torch."),
            "attention": built.attention.name,
            "scheduler": type(built.parts.pipeline.scheduler).__name__,
            "compile": self.config["compile"]["_target_"].rpartition(".")[2],
            "quantization": built.quantization.name,
            "versions": collect_versions(),
            "hardware": describe_hardware(str(built.parts.device)),
            **find_sample_rate(built.parts.pipeline.vae.config),
        }


def find_sample_rate(config: Any) -> dict[str, int]:
    """Return the sample rate in Hz of an audio VAE; empty for other VAEs."""
    return {"sample_rate": config["sampling_rate"]} if "sampling_rate" in config else {}


def make_pictures(state: State) -> list[Picture]:
    """Return the items of a finished batch."""
    negatives: Sequence[str | None] = state.negative_prompts or [None] * len(state.prompts)
    still = state.num_frames is None and state.layers is None and state.frames.ndim == 5
    captions = [None if prompt.strip() else state.caption for prompt in state.prompts]
    pixels = state.frames[:, 0] if still else state.frames
    texts = [{"prompt": one, "negative_prompt": other} for one, other in zip(state.prompts, negatives, strict=True)]
    cuts = [list_records(state.readings, both) for both in texts]
    items = zip(pixels, state.prompts, negatives, state.seeds, captions, cuts, strict=True)
    return [Picture(*item) for item in items]
