"""Qwen-Image's transformer against diffusers' with the same weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hydrarun.core.errors import UsageError
from hydrarun.models.layers.tokens import Tokens
from hydrarun.models.qwen_image import QwenImageTransformer
from tests.helpers import tiny

# float32 on one machine, the same operations in another order: rounding only
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """diffusers' transformer, and ours loaded from the files it saved."""
    reference = tiny.transformer(layers=3, heads=5)
    folder = tmp_path_factory.mktemp("transformer")
    reference.save_pretrained(folder)
    return reference, tiny.load_transformer(QwenImageTransformer, folder)


def inputs(batch: int, grid: tuple[int, int], text: int, lengths: list[int] | None = None) -> dict:
    generator = torch.Generator().manual_seed(5)
    mask = None
    if lengths is not None:
        mask = (torch.arange(text) < torch.tensor(lengths)[:, None]).long()
    return {
        "latents": torch.randn(batch, grid[0] * grid[1], 16, generator=generator),
        "text": torch.randn(batch, text, 16, generator=generator),
        "mask": mask,
        "timestep": torch.full((batch,), 713.0),
        "grid": (1, *grid),
    }


def run_reference(model, case: dict) -> torch.Tensor:
    return model(
        hidden_states=case["latents"],
        encoder_hidden_states=case["text"],
        encoder_hidden_states_mask=case["mask"],
        timestep=case["timestep"] / 1000,
        img_shapes=[[case["grid"]]] * len(case["latents"]),
        return_dict=False,
    )[0]


def conditioning(case: dict) -> dict:
    return {
        "encoder_hidden_states": case["text"],
        "encoder_hidden_states_mask": case["mask"],
        "grid": case["grid"],
    }


def first_difference(reference, ours, case: dict) -> str:
    """Name the first block that differs, for the failure message."""
    seen: dict[str, list] = {"reference": [], "ours": []}
    hooks = [
        *(b.register_forward_hook(lambda *a: seen["reference"].append(a[2][1])) for b in reference.transformer_blocks),
        *(b.register_forward_hook(lambda *a: seen["ours"].append(a[2][0])) for b in ours.blocks),
    ]
    run_reference(reference, case)
    tiny.predict(ours, case["latents"], case["timestep"], conditioning(case))
    for hook in hooks:
        hook.remove()
    for index, (want, have) in enumerate(zip(*seen.values(), strict=True)):
        if (
            want - have
        ).abs().max() > TOLERANCE * want.abs().max():  # relative, because a block's tokens grow far beyond 1
            return f"block {index} is the first to differ, by {(want - have).abs().max():.1e}"
    return "all blocks agree: it is the head"


@pytest.mark.parametrize(
    ("batch", "grid", "text", "lengths"),
    [(1, (4, 4), 7, None), (1, (5, 7), 11, None), (2, (3, 8), 9, [9, 4]), (3, (7, 1), 1, None)],
    ids=["even", "odd", "padded text", "one text token"],
)
@torch.no_grad()
def test_equals_diffusers(pair, batch, grid, text, lengths):
    reference, ours = pair
    case = inputs(batch, grid, text, lengths)
    want = run_reference(reference, case)
    have = tiny.predict(ours, case["latents"], case["timestep"], conditioning(case))
    assert want.std() > 0.1  # the case is not trivial
    difference = (want - have).abs().max().item()
    assert difference <= TOLERANCE, first_difference(reference, ours, case)


@torch.no_grad()
def test_first_difference_names_the_block(pair):
    """Tests `first_difference`: it finds a changed weight in block 1."""
    reference, ours = pair
    weight = ours.blocks[1].image.out.weight
    saved = weight.clone()
    try:
        weight.add_(0.1)
        assert first_difference(reference, ours, inputs(1, (4, 4), 7)).startswith("block 1 ")
    finally:
        weight.copy_(saved)
    assert first_difference(reference, ours, inputs(1, (4, 4), 7)).startswith("all blocks agree")


@torch.no_grad()
def test_padding_is_never_attended(pair):
    """The prediction is bit-identical for any values in padded positions."""
    _, ours = pair
    case = inputs(2, (3, 8), 9, [9, 4])
    one = tiny.predict(ours, case["latents"], case["timestep"], conditioning(case))
    case["text"][1, 4:] = 1e3
    other = tiny.predict(ours, case["latents"], case["timestep"], conditioning(case))
    assert torch.equal(one, other)


@torch.no_grad()
def test_gate_signal_is_the_first_blocks_modulated_input(pair):
    """Compares it with the attention input of the reference's first block."""
    reference, ours = pair
    case = inputs(1, (5, 7), 11)
    seen = []
    hook = reference.transformer_blocks[0].attn.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    run_reference(reference, case)
    hook.remove()
    signal = ours.gate_signal(ours.embed(case["latents"], case["timestep"], **conditioning(case)))
    assert (signal - seen[0]).abs().max() <= TOLERANCE


@torch.no_grad()
def test_declared_token_dimensions_are_token_dimensions(pair):
    """Every field with a token dimension has its stream's length there."""
    _, ours = pair
    case = inputs(2, (5, 7), 11, [11, 6])
    given = conditioning(case)
    tokens = ours.embed(case["latents"], case["timestep"], **given)
    tokens = replace(tokens, **ours.positions(case["latents"], **given))
    lengths = {"hidden_states": 35, "encoder_hidden_states": 11}
    dims = Tokens.token_dims()
    optional = {"temb_index"}
    assert set(dims) == {"hidden_states", "encoder_hidden_states", "rope", "encoder_rope"} | optional
    for name, (dim, stream) in dims.items():
        if name not in optional:
            assert getattr(tokens, name).shape[dim] == lengths[stream], name


def test_other_members_of_the_family_are_refused_by_name():
    with pytest.raises(UsageError, match="guidance_embeds"), torch.device("meta"):
        QwenImageTransformer(num_layers=1, guidance_embeds=True)


def test_published_size():
    """The defaults give the published model: 20.4 billion parameters, a third of them in modulation."""
    with torch.device("meta"):
        model = QwenImageTransformer()
    total = sum(p.numel() for p in model.parameters())
    modulation = sum(p.numel() for name, p in model.named_parameters() if ".modulation." in name)
    assert total == pytest.approx(20.43e9, rel=2e-3)
    assert modulation == pytest.approx(6.8e9, rel=1e-2)
