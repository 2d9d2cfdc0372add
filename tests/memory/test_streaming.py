"""Blocks that take turns: the numbers of the plain run, and of the blocks only those that are next are there."""

from __future__ import annotations

import gc
import itertools
import threading
import time
import weakref
from typing import Any

import numpy as np
import parallel_runs
import pytest
import subjects
import tiny
import torch
from caches import node
from deeper import deeper_subject
from subjects import LONG, SHORT, SORTS
from torch import nn
from watched import draw, modules, on_device, runner, size, weights

from hydrarun.acceleration.offload import layerwise as streaming
from hydrarun.acceleration.offload.layerwise import FromHost, Turns, around_blocks
from hydrarun.acceleration.offload.module_mover import put
from hydrarun.acceleration.offload.packed_tensors import ALIGNMENT, Packed, packed_bytes, parts
from hydrarun.acceleration.offload.strategies import DiskOffload
from hydrarun.config.compose import compose
from hydrarun.core.device import HOST
from hydrarun.core.errors import RunError
from hydrarun.engine.runner import Runner
from hydrarun.models.weights import loader as loading

TWO_EXPERTS = "wan22_t2v_a14b"
#: all steps are alike for cache-dit: those that need not be computed are not
ALIKE = {"residual_diff_threshold": 1.0, "max_continuous_cached_steps": -1}


@pytest.fixture(scope="module")
def made_deeper() -> dict[str, Any]:
    """Those that some test has asked for."""
    return {}


@pytest.fixture
def deep(subject, made_deeper, tmp_path_factory) -> Any:
    """The subject with twice the blocks, which take turns."""
    if subject.name not in made_deeper:
        made_deeper[subject.name] = deeper_subject(subject, tmp_path_factory.mktemp("deep"))
    return made_deeper[subject.name]


def expected(runner: Runner, expert: str) -> int:
    """Bytes on the device while this expert denoises."""
    transformer, offload = runner.built.parts.experts[expert], runner.built.parts.offload
    blocks = [*transformer.all_blocks()]
    stay, turn = blocks[: offload.resident_blocks], blocks[offload.resident_blocks :]
    sizes = [*map(size, stay), *(packed_bytes(weights(block)) for block in turn)]
    return size(around_blocks(transformer, [])) + offload.blocks_bytes(sizes)


def steps(runner: Runner, fake: Any, guided: bool) -> tuple[torch.Tensor, list[tuple[str, int, int]]]:
    """Latents; for each step its expert, and the run's bytes at its end and at most."""
    loop = next(stage for stage in runner.built.stages if "transformer" in stage.uses)
    original, found = loop.predict, []
    gc.collect()
    tensors = (tensor for module in modules(runner).values() for tensor in weights(module))
    floor = fake.memory_allocated() - sum(tensor.nbytes for tensor in tensors if tensor.device.type == "fake")

    def predict(*given: Any) -> Any:
        fake.reset_peak_memory_stats()
        prediction = original(*given)
        found.append((given[4].expert, fake.memory_allocated() - floor, fake.max_memory_allocated() - floor))
        return prediction

    loop.predict = predict
    try:
        return draw(runner, guided).latents, found
    finally:
        del loop.predict


# --- from the host ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subject", SORTS, indirect=True)
def test_of_the_blocks_only_those_in_turn_are_on_the_device(deep, fake):
    """In each step the bytes are those of the formula, and of activations those of the plain run, exactly."""
    plain = runner(deep, "fake")
    streamed = runner(deep, "fake", "layerwise", resident_blocks=1)
    everything = sum(on_device(plain).values())
    for one in (plain, streamed):
        draw(one)  # what is made once, such as tables of positions
    for guided in (True, False):
        want, activations = steps(plain, fake, guided)
        got, found = steps(streamed, fake, guided)
        assert torch.equal(got.cpu(), want.cpu())
        assert len(found) == 2
        for (expert, end, most), (_, plain_end, plain_most) in zip(found, activations, strict=True):
            assert end == expected(streamed, expert) + plain_end - everything
            assert most == expected(streamed, expert) + plain_most - everything
    assert set(on_device(streamed)) == {"vae"}  # no block stayed, and no buffer: what is there is nothing else
    assert expected(streamed, "transformer") < size(streamed.built.parts.experts["transformer"])


@pytest.mark.parametrize("subject", ["flux_dev"], indirect=True)
def test_more_blocks_stay_or_are_copied_ahead(deep, fake):
    """Of two kinds: the buffers are as large as the larger."""
    want = draw(runner(deep, "fake")).latents.cpu()
    for resident, ahead in ((2, 1), (0, 2)):
        streamed = runner(deep, "fake", "layerwise", resident_blocks=resident, prefetch_blocks=ahead)
        got, ((_, end, _), *_) = steps(streamed, fake, True)
        assert torch.equal(got.cpu(), want)
        more = end - expected(streamed, "transformer")
        assert 0 < more < 20_000  # latents and the prompt; to the byte: above


class LateCopies:
    """As copies of a GPU may go: they are made when somebody waits for them, and until then there is rubbish."""

    moments = itertools.count(1)

    def __init__(self, device: torch.device) -> None:
        self.pending: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.started: list[tuple[int, int]] = []

    def computed(self) -> int:
        return next(self.moments)

    def start(self, source: torch.Tensor, target: torch.Tensor, after: int) -> int:
        target.fill_(255)  # NaN in every float
        moment = self.computed()
        self.pending[moment] = (source, target)
        self.started.append((target.data_ptr(), after))
        return moment

    def wait(self, moment: int | None) -> None:
        if moment in self.pending:
            source, target = self.pending.pop(moment)
            target.copy_(source)


@pytest.mark.parametrize("subject", ["qwen_image", TWO_EXPERTS], indirect=True)
def test_what_computes_waits_for_its_copy_and_a_copy_for_what_computes(deep, fake, monkeypatch):
    copies: list[LateCopies] = []
    monkeypatch.setattr(streaming, "Copies", lambda device: copies.append(LateCopies(device)) or copies[-1])
    turns: list[tuple[int, int, int]] = []  # of each: the buffer, copies that were started before its end, that end
    note = FromHost.used

    def noting(self: FromHost, held: Any) -> None:
        note(self, held)
        turns.append((held.bytes.data_ptr(), len(self.copies.started), held.used))

    monkeypatch.setattr(FromHost, "used", noting)
    got = draw(runner(deep, "fake", "layerwise")).latents
    assert torch.equal(got.cpu(), draw(runner(deep, "fake")).latents.cpu())
    for one in copies:
        assert not one.pending  # else one would come into memory that is another's
        assert len({buffer for buffer, _ in one.started}) == 2
    if len(copies) == 1:  # buffers of two experts may have the same address
        for buffer, before, end in turns:
            later = [after for target, after in copies[0].started[before:] if target == buffer]
            assert all(after >= end for after in later)
    assert len(copies) == 1 + (deep.name == TWO_EXPERTS)


class Counted(Turns):
    """Notes what is fetched and dropped."""

    def __init__(self, count: int, ahead: int) -> None:
        super().__init__([nn.Identity() for _ in range(count)], ahead)
        self.seen: list[Any] = []

    def fetch(self, index: int) -> int:
        self.seen.append(index)
        assert len(self.held) <= self.ahead  # there is a buffer for it
        return index

    def weights(self, index: int, held: int) -> list[torch.Tensor]:
        assert index == held
        return []

    def drop(self, held: int) -> None:
        self.seen.append(f"-{held}")


@pytest.mark.parametrize(
    ("ahead", "asked", "seen"),
    [
        (1, [0, 1, 2, 3, 0], [0, 1, "-0", 2, "-1", 3, "-2", 0, "-3", 1]),
        (1, [0, 0, 0], [0, 1]),  # a gate's look, a branch that goes no further
        (1, [0, 3, 0], [0, 1, "-1", 3, "-3", 1]),  # the first and the last alone
        (1, [1, 3], [1, 2, "-1", "-2", 3, 0]),
        (2, [0, 1, 2], [0, 1, 2, "-0", 3, "-1", 0]),
    ],
)
def test_the_next_ones_are_fetched_once_each(ahead, asked, seen):
    turns = Counted(4, ahead)
    for index in asked:
        with turns.turn(index):
            pass
    assert sorted(turns.held) == sorted((asked[-1] + step) % 4 for step in range(ahead + 1))
    assert turns.seen == seen
    turns.let_go()
    assert not turns.held


def test_a_block_that_fails_has_its_weights_no_longer():
    turns, seen = FromHostLike(), []

    def fail() -> None:
        with turns.turn(0):
            seen.append(turns.blocks[0].weight.eq(1).all().item())
            raise RuntimeError("the block's")

    with pytest.raises(RuntimeError, match="the block's"):
        fail()
    assert seen == [True]
    assert turns.blocks[0].weight.eq(0).all()


class FromHostLike(Turns):
    """One block, whose weights are ones for its turn."""

    def __init__(self) -> None:
        block = nn.Linear(2, 2, bias=False).requires_grad_(False)
        block.weight.zero_()
        super().__init__([block], 0)

    def fetch(self, index: int) -> list[torch.Tensor]:
        return [torch.ones(2, 2)]

    def weights(self, index: int, held: list[torch.Tensor]) -> list[torch.Tensor]:
        return held


def test_weights_are_packed_as_they_are():
    """Whatever their types and strides; a tied one once."""
    module = nn.Module()
    numbers = torch.arange(48.0)
    module.first = nn.Parameter(numbers.view(6, 8).t(), requires_grad=False)
    module.second = nn.Parameter(numbers[:5].bfloat16(), requires_grad=False)
    module.tied = module.first
    module.register_buffer("third", torch.tensor(7))
    module.slice = nn.Parameter(numbers.view(6, 8)[:, 1:3], requires_grad=False)
    want = {name: (tensor.clone(), tensor.stride()) for name, tensor in module.state_dict().items()}
    packed = streaming.pack(module, HOST)
    assert packed.bytes.nbytes == 4 * ALIGNMENT == packed_bytes(packed.tensors)
    there = packed.bytes.clone()
    for weights_ in (packed.tensors, packed.into(there)):
        put(module, weights_)
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, want[name][0])
            assert tensor.stride() == want[name][1] or name == "slice"
        run = (packed.bytes if weights_ is packed.tensors else there).untyped_storage().data_ptr()
        assert {tensor.untyped_storage().data_ptr() for tensor in module.state_dict().values()} == {run}
        assert module.tied is module.first
        assert isinstance(module.first, nn.Parameter)


def test_memory_is_pinned_once_for_each_block(monkeypatch):
    pinned, empty = [], torch.empty

    def noting(*size: Any, pin_memory: bool = False, **more: Any) -> torch.Tensor:
        if pin_memory:
            pinned.append(size)
        return empty(*size, **more)

    monkeypatch.setattr(torch, "empty", noting)
    for device, count in (("cuda", 1), ("cpu", 0)):
        pinned.clear()
        packed = Packed([torch.ones(3), torch.ones(200)], torch.device(device))
        packed.into(empty(2048, dtype=torch.uint8))
        assert pinned == [(2 * ALIGNMENT + ALIGNMENT,)] * count


def by_hand(runner: Runner, resident: int = 0) -> Runner:
    """Its blocks in turn, from the host to the host: what is refused for a user, and quick here."""
    for transformer in runner.built.parts.experts:
        FromHost(transformer, HOST, resident, 1).come()
    return runner


@pytest.mark.parametrize("option", ["int8_weight_only", "fp8_weight_only", "int8"])
@pytest.mark.parametrize("subject", ["flux_dev"], indirect=True)
def test_quantized_blocks_are_copied_quantized(deep, option):
    asked = [*deep.overrides(), f"quantization={option}"]
    plain = Runner(compose(asked))
    want = tiny.draw(plain).latents
    before = [packed_bytes(weights(block)) for block in next(iter(plain.built.parts.experts)).all_blocks()]
    turned = by_hand(plain)
    assert torch.equal(tiny.draw(turned).latents, want)
    (transformer,) = turned.built.parts.experts
    first = next(transformer.all_blocks()).block
    assert len({part.untyped_storage().data_ptr() for weight in weights(first) for part in parts(weight)}) == 1
    assert packed_bytes(weights(first)) == before[0] < sum(w.numel() * 4 for w in weights(first))


@pytest.mark.parametrize("subject", ["qwen_image"], indirect=True)
def test_a_compiled_block_stays_one_graph_whatever_its_buffer(deep):
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    turned = Runner(compose(deep.overrides()))
    want = tiny.draw(turned, true_cfg_scale=1.0).latents
    for block in next(iter(turned.built.parts.experts)).all_blocks():
        block.compile(fullgraph=True, backend=backend, dynamic=False)
    assert torch.equal(tiny.draw(by_hand(turned, resident=1), true_cfg_scale=1.0).latents, want)
    assert len(graphs) == 1


# --- from files ------------------------------------------------------------------------------------------------------


class Reading:
    """Notes what `fill` reads, and how many bytes of that are alive at most."""

    def __init__(self) -> None:
        self.fill = loading.fill
        self.names: list[str] = []
        self.alive: dict[int, int] = {}
        self.most = 0

    def __call__(self, source: Any, *more: Any) -> torch.Tensor:
        tensor = self.fill(source, *more)
        self.names.append(source.name)
        self.alive[id(tensor)] = tensor.nbytes
        weakref.finalize(tensor, self.alive.pop, id(tensor))
        self.most = max(self.most, sum(list(self.alive.values())))
        return tensor


@pytest.mark.parametrize("subject", SORTS, indirect=True)
def test_blocks_come_from_their_files(subject, monkeypatch):
    """On the CPU: the plain run's numbers; of the blocks' weights never more alive than two blocks'."""
    plain = runner(subject, "cpu")
    loaded, read = Reading(), Reading()
    monkeypatch.setattr(loading, "fill", loaded)
    monkeypatch.setattr(streaming, "fill", read)
    turned = runner(subject, "cpu", "disk")
    names = {name for name, _ in next(iter(plain.built.parts.experts)).named_parameters()}
    blocks = {name for name in names if name.startswith(next(iter(plain.built.parts.experts)).block_lists)}
    assert set(loaded.names) == names - blocks
    got = draw(turned, guided=True), draw(turned, guided=False)
    assert set(read.names) == blocks
    for have, guided in zip(got, (True, False), strict=True):
        assert torch.equal(have.latents, draw(plain, guided).latents)
    two = max(DiskOffload().blocks_bytes([*map(size, one.all_blocks())]) for one in plain.built.parts.experts)
    assert 0 < read.most <= two
    assert not read.alive  # decoding has the memory
    for transformer in turned.built.parts.experts:
        assert {w.device.type for block in transformer.all_blocks() for w in weights(block)} == {"meta"}


@pytest.mark.parametrize("subject", ["flux_dev"], indirect=True)
def test_from_files_to_the_device_no_more_than_two_blocks_come(deep, fake):
    plain, turned = runner(deep, "fake"), runner(deep, "fake", "disk")
    want = draw(plain)
    for _ in range(2):  # the text encoders are read again
        got = draw(turned)
        assert torch.equal(got.latents.cpu(), want.latents.cpu())
        assert np.array_equal(got.frames, want.frames)
    everything = sum(on_device(plain).values())
    sizes = [size(block) for block in next(iter(plain.built.parts.experts)).all_blocks()]
    around = sum(size(around_blocks(transformer, [])) for transformer in turned.built.parts.experts)
    held = around + size(turned.built.parts.pipeline.vae) + DiskOffload().blocks_bytes(sizes)
    both = zip(steps(turned, fake, True)[1], steps(plain, fake, True)[1], strict=True)
    for (_, _, most), (_, _, plain_most) in both:
        assert most <= held + plain_most - everything
    assert held < everything


def test_what_is_being_read_is_gone_once_it_is_let_go(tiny_folder, monkeypatch):
    turned = tiny.runner(tiny_folder, "offload=disk")
    reading, began = Reading(), threading.Event()

    def slow(*given: Any) -> torch.Tensor:
        began.set()
        time.sleep(0.002)
        return reading(*given)

    monkeypatch.setattr(streaming, "fill", slow)
    turns = turned.built.parts.offload.waiting["transformer"]
    turns.hold(0)
    began.wait(10)
    turns.let_go()
    assert reading.names
    assert not reading.alive


def test_a_file_that_breaks_meanwhile_is_named(tiny_folder, monkeypatch):
    turned = tiny.runner(tiny_folder, "offload=disk")

    def broken(header: Any, piece: Any, target: Any) -> None:
        raise RunError(f"{piece.source!r} cannot be read")

    with monkeypatch.context() as patched:
        patched.setattr(loading, "read", broken)
        with pytest.raises(RunError, match="^'transformer_blocks.0.* cannot be read"):
            tiny.draw(turned)
    assert torch.equal(tiny.draw(turned).latents, tiny.draw(tiny.runner(tiny_folder)).latents)


# --- with the rest ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subject", ["flux_dev"], indirect=True)
def test_caches_decide_as_without(deep):
    """Some of the blocks are asked for, out of order, and the first one's modulation alone."""
    caches = (
        node("teacache", threshold=1e9),
        node("first_block", threshold=1e9),
        {"_target_": "hydrarun.acceleration.cache.cache_dit.CacheDiT", "Bn_compute_blocks": 1, "max_warmup_steps": 2}
        | ALIKE,
    )
    fields = {"true_cfg_scale": 3.0, "negative_prompt": LONG, "num_inference_steps": 6}
    plain, disk = Runner(compose(deep.overrides())), Runner(compose([*deep.overrides(), "offload=disk"]))
    wanted = []
    for cache in caches:
        latents = tiny.draw(plain, cache=cache, **fields).latents
        wanted.append((latents, plain.built.parts.cache.record()))
        assert 0 < wanted[-1][1]["blocks"]["run"] < wanted[-1][1]["blocks"]["all"]
    for turned in (disk, by_hand(plain)):
        for cache, (latents, record) in zip(caches, wanted, strict=True):
            assert torch.equal(tiny.draw(turned, cache=cache, **fields).latents, latents)
            assert turned.built.parts.cache.record() == record


def draw_in_turn(name: str, folder: Any, chosen: dict[str, int], fields: dict[str, Any]) -> list[np.ndarray]:
    """Latents of this rank's with blocks from the files, and from the host."""
    composed = compose([*subjects.command(name, folder), "offload=disk"])
    disk = Runner({**composed, "parallel": parallel_runs.degrees(**chosen)})
    host = by_hand(Runner(parallel_runs.config(name, folder, chosen)))
    return [tiny.draw(one, **fields).latents.numpy() for one in (disk, host)]


@pytest.mark.parametrize("layout", ["tensor", "ulysses", "ring", "cfg"])
@pytest.mark.parametrize("subject", ["wan21_t2v_14b"], indirect=True)
def test_ranks_have_their_own_shares_in_turn(pool, subject, layout):
    fields = {"guidance_scale": 3.0, "negative_prompt": "x", "prompt": SHORT}
    want = subject.draw(**fields).latents.numpy()
    for both in pool(2, draw_in_turn, subject.name, subject.folder, {f"{layout}_degree": 2}, fields):
        for latents in both:
            np.testing.assert_allclose(latents, want, atol=1e-4)  # as ranks draw without


@pytest.mark.skipif(not torch.cuda.is_available(), reason="copies in a stream of their own need a GPU")
@pytest.mark.parametrize("option", ["layerwise", "disk"])
@pytest.mark.parametrize("subject", ["qwen_image", "flux_dev", TWO_EXPERTS], indirect=True)
def test_a_gpu_draws_what_it_draws_without(deep, option):
    assert torch.equal(draw(runner(deep, "cuda", option)).latents, draw(runner(deep, "cuda")).latents)
