"""Prefetched blocks: the plain run's results, with only the current and next blocks on the device."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hydrarun.acceleration.offload import layerwise
from hydrarun.acceleration.offload.layerwise import BlockPrefetcher, HostPrefetcher, gather_rest
from hydrarun.acceleration.offload.packed_tensors import count_packed_bytes, find_plain_tensors
from hydrarun.config.compose import compose_config
from hydrarun.core.device import HOST
from hydrarun.engine.runner import Runner
from tests.helpers import parallel_runs, subjects, tiny
from tests.helpers.caches import node
from tests.helpers.subjects import LONG, SHORT, SORTS
from tests.helpers.watched import draw, on_device, runner, size, steps, weights

TWO_EXPERTS = "wan22_t2v_a14b"
#: cache-dit treats all steps as similar and skips every step that it may skip
ALIKE = {"residual_diff_threshold": 1.0, "max_continuous_cached_steps": -1}


def expected(runner: Runner, expert: str) -> int:
    """Return the expected bytes on the device while this expert denoises."""
    transformer, offload = runner.built.parts.experts[expert], runner.built.parts.offload
    blocks = [*transformer.all_blocks()]
    stay, turn = blocks[: offload.resident_blocks], blocks[offload.resident_blocks :]
    sizes = [*map(size, stay), *(count_packed_bytes(weights(block)) for block in turn)]
    return size(gather_rest(transformer, [])) + offload.blocks_bytes(sizes)


# --- from the host ---------------------------------------------------------------------------------------------------


@pytest.mark.sample(2)
@pytest.mark.parametrize("subject", SORTS, indirect=True)
def test_of_the_blocks_only_those_in_turn_are_on_the_device(deep, fake):
    """In each step the weights' bytes are exactly those of the formula, and activations' those of the plain run."""
    plain = runner(deep, "fake")
    streamed = runner(deep, "fake", "layerwise", resident_blocks=1)
    everything = sum(on_device(plain).values())
    for one in (plain, streamed):
        draw(one)  # creates what is made once, such as tables of positions
    for guided in (True, False):
        want, activations = steps(plain, fake, guided)
        got, found = steps(streamed, fake, guided)
        assert torch.equal(got.cpu(), want.cpu())
        assert len(found) == 2
        for (expert, end, most), (_, plain_end, plain_most) in zip(found, activations, strict=True):
            assert end == expected(streamed, expert) + plain_end - everything
            assert most == expected(streamed, expert) + plain_most - everything
    assert set(on_device(streamed)) == {"vae"}  # no block and no buffer stayed
    assert expected(streamed, "transformer") < size(streamed.built.parts.experts["transformer"])


@pytest.mark.parametrize("subject", ["flux_dev"], indirect=True)
def test_more_blocks_stay_or_are_copied_ahead(deep, fake):
    """With two kinds of blocks: the buffers are as large as the larger kind."""
    want = draw(runner(deep, "fake")).latents.cpu()
    for resident, ahead in ((2, 1), (0, 2)):
        streamed = runner(deep, "fake", "layerwise", resident_blocks=resident, prefetch_blocks=ahead)
        got, ((_, end, _), *_) = steps(streamed, fake, True)
        assert torch.equal(got.cpu(), want)
        more = end - expected(streamed, "transformer")
        assert 0 < more < 20_000  # latents and the prompt; the test above is exact


class LateCopies:
    """Simulates late GPU copies: they are made when they are waited for, and until then the target holds garbage."""

    moments = itertools.count(1)

    def __init__(self, device: torch.device) -> None:
        self.pending: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.started: list[tuple[int, int]] = []

    def record_compute(self) -> int:
        return next(self.moments)

    def copy(self, source: torch.Tensor, target: torch.Tensor, after: int) -> int:
        target.fill_(255)  # NaN in every float
        moment = self.record_compute()
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
    monkeypatch.setattr(layerwise, "CopyStream", lambda device: copies.append(LateCopies(device)) or copies[-1])
    turns: list[tuple[int, int, int]] = []  # per use: buffer, copies started before its end, end event
    note = HostPrefetcher.used

    def noting(self: HostPrefetcher, held: Any) -> None:
        note(self, held)
        turns.append((held.bytes.data_ptr(), len(self.copies.started), held.used))

    monkeypatch.setattr(HostPrefetcher, "used", noting)
    got = draw(runner(deep, "fake", "layerwise")).latents
    assert torch.equal(got.cpu(), draw(runner(deep, "fake")).latents.cpu())
    for one in copies:
        assert not one.pending  # a late copy would overwrite reused memory
        assert len({buffer for buffer, _ in one.started}) == 2
    if len(copies) == 1:  # buffers of two experts may have the same address
        for buffer, before, end in turns:
            later = [after for target, after in copies[0].started[before:] if target == buffer]
            assert all(after >= end for after in later)
    assert len(copies) == 1 + (deep.name == TWO_EXPERTS)


class Counted(BlockPrefetcher):
    """Records what is fetched and dropped."""

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
        (1, [0, 0, 0], [0, 1]),  # a gate reads the first block alone, or a branch stops there
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


class FromHostLike(BlockPrefetcher):
    """One block, whose weights are ones while it runs."""

    def __init__(self) -> None:
        block = nn.Linear(2, 2, bias=False).requires_grad_(False)
        block.weight.zero_()
        super().__init__([block], 0)

    def fetch(self, index: int) -> list[torch.Tensor]:
        return [torch.ones(2, 2)]

    def weights(self, index: int, held: list[torch.Tensor]) -> list[torch.Tensor]:
        return held


def by_hand(runner: Runner, resident: int = 0) -> Runner:
    """Prefetch the runner's blocks from the host to the host: refused for users, but fast in tests."""
    for transformer in runner.built.parts.experts:
        HostPrefetcher(transformer, HOST, resident, 1).onload()
    return runner


@pytest.mark.sample(1)
@pytest.mark.parametrize("option", ["int8_weight_only", "fp8_weight_only", "int8"])
@pytest.mark.parametrize("subject", ["flux_dev"], indirect=True)
def test_quantized_blocks_are_copied_quantized(deep, option):
    asked = [*deep.overrides(), f"quantization={option}"]
    plain = Runner(compose_config(asked))
    want = tiny.draw(plain).latents
    before = [count_packed_bytes(weights(block)) for block in next(iter(plain.built.parts.experts)).all_blocks()]
    turned = by_hand(plain)
    assert torch.equal(tiny.draw(turned).latents, want)
    (transformer,) = turned.built.parts.experts
    first = next(transformer.all_blocks()).block
    assert (
        len({part.untyped_storage().data_ptr() for weight in weights(first) for part in find_plain_tensors(weight)})
        == 1
    )
    assert count_packed_bytes(weights(first)) == before[0] < sum(w.numel() * 4 for w in weights(first))


@pytest.mark.parametrize("subject", ["qwen_image"], indirect=True)
def test_a_compiled_block_stays_one_graph_whatever_its_buffer(deep):
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    turned = Runner(compose_config(deep.overrides()))
    want = tiny.draw(turned, true_cfg_scale=1.0).latents
    for block in next(iter(turned.built.parts.experts)).all_blocks():
        block.compile(fullgraph=True, backend=backend, dynamic=False)
    assert torch.equal(tiny.draw(by_hand(turned, resident=1), true_cfg_scale=1.0).latents, want)
    assert len(graphs) == 1


# --- with other options ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subject", ["flux_dev"], indirect=True)
def test_caches_decide_as_without(deep):
    """Caches run only some of the blocks, not in order, and read the first block's modulation alone."""
    caches = (
        node("teacache", threshold=1e9),
        node("first_block", threshold=1e9),
        {"_target_": "hydrarun.acceleration.cache.cache_dit.CacheDiT", "Bn_compute_blocks": 1, "max_warmup_steps": 2}
        | ALIKE,
    )
    fields = {"true_cfg_scale": 3.0, "negative_prompt": LONG, "num_inference_steps": 6}
    plain, disk = Runner(compose_config(deep.overrides())), Runner(compose_config([*deep.overrides(), "offload=disk"]))
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
    """Return this rank's latents with blocks from the files, and with blocks from the host."""
    composed = compose_config([*subjects.command(name, folder), "offload=disk"])
    disk = Runner({**composed, "parallel": parallel_runs.degrees(**chosen)})
    host = by_hand(Runner(parallel_runs.config(name, folder, chosen)))
    return [tiny.draw(one, **fields).latents.numpy() for one in (disk, host)]


@pytest.mark.sample(1)
@pytest.mark.parametrize("layout", ["tensor", "ulysses", "ring", "cfg"])
@pytest.mark.parametrize("subject", ["wan21_t2v_14b"], indirect=True)
def test_ranks_have_their_own_shares_in_turn(pool, subject, layout):
    fields = {"guidance_scale": 3.0, "negative_prompt": "x", "prompt": SHORT}
    want = subject.draw(**fields).latents.numpy()
    for both in pool(2, draw_in_turn, subject.name, subject.folder, {f"{layout}_degree": 2}, fields):
        for latents in both:
            np.testing.assert_allclose(latents, want, atol=1e-4)  # the tolerance of ranks without offload


@pytest.mark.skipif(not torch.cuda.is_available(), reason="copies in a stream of their own need a GPU")
@pytest.mark.parametrize("option", ["layerwise", "disk"])
@pytest.mark.parametrize("subject", ["qwen_image", "flux_dev", TWO_EXPERTS], indirect=True)
def test_a_gpu_draws_what_it_draws_without(deep, option):
    assert torch.equal(draw(runner(deep, "cuda", option)).latents, draw(runner(deep, "cuda")).latents)
