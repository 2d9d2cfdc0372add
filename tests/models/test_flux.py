"""FLUX.1: details that the parity tests of whole runs do not cover."""

from __future__ import annotations

import pytest
import torch

from hydrarun.models.flux import FluxTransformer
from tests.helpers import checkpoints, tiny

TOLERANCE = 1e-5  # float32, the same operations in another order


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """diffusers' transformer, and ours loaded from the files it saved."""
    reference = checkpoints.BUILDERS["flux_dev"]().transformer
    folder = tmp_path_factory.mktemp("transformer")
    reference.save_pretrained(folder)
    return reference, tiny.load_transformer(FluxTransformer, folder)


@torch.no_grad()
def test_one_call_and_its_gate_signal(pair):
    """Compares the prediction and the input of the first block's attention."""
    reference, ours = pair
    generator = torch.Generator().manual_seed(0)
    latents, text = (torch.randn(2, n, 16, generator=generator) for n in (15, 7))
    pooled, guidance = torch.randn(2, 16, generator=generator), torch.tensor([3.5, 1.0])
    seen = []
    hook = reference.transformer_blocks[0].attn.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    rows, columns = torch.meshgrid(torch.arange(3), torch.arange(5), indexing="ij")
    want = reference(
        hidden_states=latents,
        encoder_hidden_states=text,
        pooled_projections=pooled,
        timestep=torch.tensor([0.7, 0.7]),
        guidance=guidance,
        img_ids=torch.stack([torch.zeros(3, 5), rows, columns], dim=-1).reshape(15, 3),
        txt_ids=torch.zeros(7, 3),
        return_dict=False,
    )[0]
    hook.remove()
    given = {"encoder_hidden_states": text, "pooled_projections": pooled, "guidance": guidance, "grid": (1, 3, 5)}
    timestep = torch.tensor([700.0, 700.0])
    assert want.std() > 0.1
    assert (tiny.predict(ours, latents, timestep, given) - want).abs().max() <= TOLERANCE
    assert (ours.gate_signal(ours.embed(latents, timestep, **given)) - seen[0]).abs().max() <= TOLERANCE


def test_published_size():
    """The defaults give the published model: 11.9 billion parameters, and a few more with embedded guidance."""
    with torch.device("meta"):
        plain, distilled = FluxTransformer(), FluxTransformer(guidance_embeds=True)
    counts = [sum(p.numel() for p in model.parameters()) for model in (plain, distilled)]
    assert counts[0] == pytest.approx(11.89e9, rel=1e-3)
    assert counts[1] - counts[0] == 257 * 3072 + 3073 * 3072  # the two layers that embed the scale
