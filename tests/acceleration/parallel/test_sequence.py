"""Attention over ranks compared with attention in one process, and its bytes sent compared with the formula."""

from __future__ import annotations

import pytest
import torch

from hydrarun.core.distributed.degrees import split_evenly
from hydrarun.models.layers.attention import Attention
from tests.helpers.ranks_work import attention_over_ranks, gathered

TOLERANCE = 1e-5  # float32, another order of summation
LAYOUTS = {"ulysses2": (2, 1), "ulysses4": (4, 1), "ring2": (1, 2), "ring4": (1, 4), "usp2x2": (2, 2)}
BATCH, CHANNELS, BYTES = 2, 8, 4
IMAGE, TEXT = "hidden_states", "encoder_hidden_states"


def whole(heads: int, image: int, text: int) -> dict[str, tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: tuple(torch.randn(BATCH, length, heads, CHANNELS, generator=generator) for _ in range(3))
        for name, length in ((TEXT, text), (IMAGE, image))
        if length
    }


def mask(text: int) -> torch.Tensor:
    """Mask for one full prompt and one of two tokens: a rank may have no real key at all."""
    return torch.arange(text) < torch.tensor([[text], [2]])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("heads", "image", "text", "masked"),
    [(3, 35, 11, True), (3, 35, 11, False), (5, 7, 1, False), (1, 9, 3, True), (4, 16, 0, False)],
    ids=["padded text", "odd", "one text token", "one head", "image alone"],
)
def test_equals_attention_in_one_place(pool, layout, heads, image, text, masked):
    streams = whole(heads, image, text)
    masks = {TEXT: mask(text)} if masked else {}
    want = dict(zip(streams, Attention()(streams, masks), strict=True))
    ulysses, ring = LAYOUTS[layout]
    results = pool(ulysses * ring, attention_over_ranks, ulysses, ring, streams, masks)
    for name in streams:
        have = torch.cat([outputs[name] for outputs, _ in results], dim=1)
        assert (have - want[name]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("layout", LAYOUTS)
def test_grouped_heads(pool, layout):
    """Six query heads share two key and value heads."""
    ulysses, ring = LAYOUTS[layout]
    streams = {name: (q, k[:, :, :2], v[:, :, :2]) for name, (q, k, v) in whole(6, 13, 5).items()}
    want = dict(zip(streams, Attention()(streams), strict=True))
    results = pool(ulysses * ring, attention_over_ranks, ulysses, ring, streams, {})
    for name in streams:
        have = torch.cat([outputs[name] for outputs, _ in results], dim=1)
        assert (have - want[name]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_are_those_of_the_formula(pool, layout):
    """The formula in `SequenceParallel`'s docstring, also for uneven shares."""
    heads, image, text = 5, 35, 11
    ulysses, ring = LAYOUTS[layout]
    results = pool(ulysses * ring, attention_over_ranks, ulysses, ring, whole(heads, image, text), {})
    parts = [
        a + b for a, b in zip(split_evenly(text, ulysses * ring), split_evenly(image, ulysses * ring), strict=True)
    ]
    for rank, (_, sent) in enumerate(results):
        place, column = divmod(rank, ulysses)
        here, mine = split_evenly(heads, ulysses)[column], parts[rank]
        tokens = [sum(parts[p * ulysses : (p + 1) * ulysses]) for p in range(ring)]
        element = BATCH * CHANNELS * BYTES
        exchanged = (3 * mine * (heads - here) + (tokens[place] - mine) * here) * element
        assert sent.get("all_to_all", 0) == (exchanged if ulysses > 1 else 0)
        # this place sends the keys and values of every place once, except those of the next place, which end here
        passed = sum(tokens) - tokens[(place + 1) % ring]
        assert sent.get("exchange", 0) == (2 * passed * here * element if ring > 1 else 0)


def test_even_shares_send_four_times_the_tokens(pool):
    """The usual figure for Ulysses: 4 (U - 1) / U of a rank's own tokens, in elements of D."""
    results = pool(4, attention_over_ranks, 4, 1, whole(4, 64, 0), {})
    for _, sent in results:
        assert sent["all_to_all"] == pytest.approx(4 * 3 / 4 * BATCH * 16 * 4 * CHANNELS * BYTES, rel=0.01)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gather_brings_every_token_back_in_order(pool, layout):
    ulysses, ring = LAYOUTS[layout]
    hidden = torch.randn(2, 13, 6, generator=torch.Generator().manual_seed(1))
    for result in pool(ulysses * ring, gathered, ulysses, ring, hidden):
        assert torch.equal(result, hidden)
