"""Compiled transformers: same results, one graph per input size, kept graphs, and measured compile time."""

from __future__ import annotations

import os
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.runtime.cache_dir_utils import cache_dir

from hydrarun.acceleration.compilation import CACHE_DIR, CompileFull, NoCompile, set_graph_cache
from hydrarun.config.compose import compose_config
from hydrarun.core import timing
from hydrarun.core.errors import UsageError
from hydrarun.core.resources import read_options
from hydrarun.core.timing import Timings
from hydrarun.engine.runner import Runner
from hydrarun.models.transformer import Inputs, Transformer
from hydrarun.pipeline.request import make_state
from tests.helpers import caches, subjects

#: tracing alone leaves the operations unchanged, except rotations, which then use no complex numbers
TOLERANCE = 1e-5


@pytest.fixture
def traced(subject, monkeypatch):
    """The subject with its transformers compiled whole, without the time that a code generator takes."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    counters.clear()
    for name in CompileFull.pieces:  # graphs of other models would serve this one too
        torch._dynamo.reset_code(getattr(Transformer, name).__code__)
    experts = list(subject.runner.built.parts.experts)
    for transformer in experts:
        CompileFull().apply(transformer)
    yield subject
    for transformer in experts:
        for name in CompileFull.pieces:
            delattr(transformer, name)


def plain(subject, **request):
    """Return the latents of the uncompiled transformers."""
    experts = list(subject.runner.built.parts.experts)
    compiled = [{name: vars(transformer).pop(name) for name in CompileFull.pieces} for transformer in experts]
    try:
        return subject.draw(**request).latents
    finally:
        for transformer, pieces in zip(experts, compiled, strict=True):
            vars(transformer).update(pieces)


@pytest.mark.sample(2)
@pytest.mark.parametrize("subject", subjects.SORTS, indirect=True)
def test_the_whole_transformer_is_one_graph(traced):
    """One graph for both branches, whose prompts are equally long here, both experts and all steps."""
    request = {"num_inference_steps": 2, "prompt": "a cat"}
    if "negative_prompt" in subjects.CONFIGS[traced.name]["model"]["takes"]:
        request["negative_prompt"] = "a dog"
    assert (traced.draw(**request).latents - plain(traced, **request)).abs().max() <= TOLERANCE
    traced.draw(**{**request, "num_inference_steps": 3, "seed": 5})
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.sample(1)
@pytest.mark.parametrize("subject", ["flux_dev", "qwen_image_edit_plus", "wan22_ti2v_5b"], indirect=True)
def test_a_cache_that_looks_between_the_blocks_has_graphs_between_its_looks(traced):
    """The first block, the other blocks, and the parts before and after: no more graphs, whatever is skipped."""
    request = {"num_inference_steps": 4, "cache": caches.node("first_block", threshold=1e9)}
    assert (traced.draw(**request).latents - plain(traced, **request)).abs().max() <= TOLERANCE
    record = traced.runner.built.parts.cache.record()
    assert record["blocks"]["run"] < record["blocks"]["all"]
    graphs = counters["stats"]["unique_graphs"]
    traced.draw(num_inference_steps=4, cache=caches.node("first_block", threshold=0.0))
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


@pytest.mark.parametrize("subject", ["wan22_t2v_a14b"], indirect=True)
def test_weights_that_come_and_go_need_no_other_graph(traced, fake):
    """One graph on the host, one on the device, for two experts, two ways to offload and two runs each."""
    want = traced.draw().latents
    for option in ("expert", "model"):
        config = compose_config([*traced.overrides(), "compile=full"])
        runner = Runner({**config, "offload": read_options("offload")[option], "device": "fake"})
        for _ in range(2):
            have = runner.draw(runner.prepare_state(config, []), Timings(torch.device("fake"))).latents
            assert (have.cpu() - want).abs().max() <= TOLERANCE
    assert counters["stats"]["unique_graphs"] == 2


def test_a_later_process_finds_the_graphs():
    """With the real code generator; a reset drops the process' graphs. Tolerance: another order of summation."""
    want = predict(NoCompile())
    for _ in range(2):
        torch._dynamo.reset_code(Transformer.forward_branch.__code__)
        counters.clear()
        assert (predict(CompileFull()) - want).abs().max() <= 1e-12
        assert counters["stats"]["unique_graphs"] == 1
    assert counters["aot_autograd"]["autograd_cache_hit"] == 1


def predict(compiler):
    """Return the prediction of a transformer of two small blocks, in float64."""
    toy = caches.Toy([0.5, 0.25])
    compiler.apply(toy)
    latents, times = torch.linspace(-1, 1, 30, dtype=torch.float64).view(2, 5, 3), torch.ones(2, dtype=torch.float64)
    with torch.inference_mode():
        return toy.predict_branch(Inputs(latents, times, {"positive": {"factor": 2.0}}), "positive")


def test_compiling_is_counted_once_and_apart(monkeypatch):
    """With a clock that advances by 10 for each of two graphs, and by 1 for running them."""
    clock = [0.0]
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    timings = Timings(torch.device("cpu"))

    def slow(graph, inputs):
        clock[0] += 10
        return graph.forward

    def inner(x):
        x = x + 1
        torch._dynamo.graph_break()
        return x + 2

    x = torch.zeros(2)
    with timings.watch_compiler(), timings.phase("denoise"):
        torch.compile(inner, backend=slow)(x)
        clock[0] += 1
    assert (timings.compile, timings.phases["denoise"]) == (20, 1)
    torch.compile(lambda x: x * 3, backend=slow)(x)
    assert (timings.compile, clock[0]) == (20, 31)  # no longer watched


def test_where_graphs_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "users"))
    monkeypatch.delenv(CACHE_DIR)
    set_graph_cache(None)
    assert os.environ[CACHE_DIR] == str(tmp_path / "users" / "hydrarun" / "compile")
    monkeypatch.setenv(CACHE_DIR, "/chosen/before")
    set_graph_cache(None)
    assert os.environ[CACHE_DIR] == "/chosen/before"
    set_graph_cache(str(tmp_path / "mine"))
    assert os.environ[CACHE_DIR] == str(tmp_path / "mine")
    assert cache_dir() == str(tmp_path / "mine")  # torch's own answer


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"compile\.cache_dir: .*/file/x: Not a directory; choose another folder"):
        set_graph_cache(str(tmp_path / "file" / "x"))


def test_nothing_is_compiled_by_default(tiny_runner):
    timings = Timings(torch.device("cpu"))
    tiny_runner.draw(make_state(tiny_runner.config["sampling"]), timings)
    assert timings.compile == 0.0
