"""Models related to FLUX.1: details that the parity tests of whole runs do not cover."""

from __future__ import annotations

import pytest
import torch
from diffusers.pipelines.longcat_image.pipeline_longcat_image_edit import calculate_dimensions
from PIL import Image

from hydrarun.config.compose import compose_unchecked
from hydrarun.core.errors import UsageError
from hydrarun.engine.plan.devices import read_devices
from hydrarun.engine.plan.planner import plan_configuration
from hydrarun.models.longcat_image import LongCatImageTransformer
from hydrarun.models.ovis_image import OvisImageTransformer
from hydrarun.pipeline.stages.images import fit_area
from tests.helpers import checkpoints, tiny

TOLERANCE = 1e-5  # float32, the same operations in another order
TEXT = 7  # tokens
GRID, IMAGE_GRID = (1, 3, 5), (1, 2, 4)


def places(number: int, corner: int, grid: tuple[int, int, int]) -> torch.Tensor:
    """Number, row and column of each token of a picture, `[H * W, 3]`."""
    rows, columns = torch.meshgrid(torch.arange(grid[1]) + corner, torch.arange(grid[2]) + corner, indexing="ij")
    return torch.stack([torch.full_like(rows, number), rows, columns], dim=-1).reshape(-1, 3)


#: class, positions of the picture and of the image to edit
CASES = {
    "ovis_image": (OvisImageTransformer, places(0, 0, GRID), None),
    "longcat_image": (LongCatImageTransformer, places(1, TEXT, GRID), None),
    "longcat_image_edit": (LongCatImageTransformer, places(1, TEXT, GRID), places(2, TEXT, IMAGE_GRID)),
}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_one_call_and_its_gate_signal(name, tmp_path):
    """Compares the prediction and the input of the first block's attention."""
    cls, image_ids, edited_ids = CASES[name]
    reference = checkpoints.BUILDERS[name]().transformer
    reference.save_pretrained(tmp_path)
    ours = tiny.load_transformer(cls, tmp_path)
    generator = torch.Generator().manual_seed(0)
    channels = reference.config.in_channels
    latents, edited = (torch.randn(2, n, channels, generator=generator) for n in (15, 8))
    text = torch.randn(2, TEXT, 16, generator=generator)
    given = {"encoder_hidden_states": text, "grid": GRID}
    joined = latents
    if edited_ids is not None:
        given |= {"image_latents": edited, "image_grids": (IMAGE_GRID,)}
        joined, image_ids = torch.cat([latents, edited], dim=1), torch.cat([image_ids, edited_ids])
    seen = []
    hook = reference.transformer_blocks[0].attn.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    want = reference(
        hidden_states=joined,
        encoder_hidden_states=text,
        timestep=torch.tensor([0.7, 0.7]),
        img_ids=image_ids,
        txt_ids=torch.arange(TEXT)[:, None] * torch.tensor([0, 1, 1]),
        return_dict=False,
    )[0][:, :15]
    hook.remove()
    timestep = torch.tensor([700.0, 700.0])
    assert want.std() > 0.1
    assert (tiny.predict(ours, latents, timestep, given) - want).abs().max() <= TOLERANCE
    assert (ours.gate_signal(ours.embed(latents, timestep, **given)) - seen[0]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("size", [(64, 64), (1023, 767), (500, 333), (3000, 200), (64, 100)])
def test_the_edited_picture_has_the_references_size(size):
    height, width = fit_area(Image.new("RGB", size), 1024 * 1024, 16, up=True)
    assert (width, height) == calculate_dimensions(1024 * 1024, size[0] * 1.0 / size[1])


@pytest.mark.parametrize("subject", ["longcat_image", "longcat_image_edit"], indirect=True)
def test_prompts_are_encoded_where_the_encoder_is(subject, monkeypatch):
    """The device is the text encoder's, not the VAE's, which diffusers uses."""
    pipeline = subject.runner.built.parts.pipeline
    monkeypatch.setattr(pipeline, "vae", torch.nn.Linear(1, 1, device="meta"))
    assert pipeline.device == torch.device("cpu")


@pytest.mark.parametrize("subject", ["longcat_image_edit"], indirect=True)
@pytest.mark.parametrize("prompt", ["a" * 513, f"‘{'é' * 256}’"])
def test_a_prompt_too_long_is_refused(subject, prompt):
    """diffusers raises a TypeError here. In the test tokenizer, a byte is a token."""
    with pytest.raises(UsageError) as error:
        subject.draw(prompt=prompt)
    assert str(error.value) == (
        f"the prompt {prompt[:60]!r} has {len(prompt.encode())} tokens, and this model takes 512;"
        " quoted text takes at least one token per character"
    )


@pytest.mark.parametrize("subject", ["longcat_image_edit"], indirect=True)
def test_a_prompt_that_stands_for_an_image_is_refused(subject):
    with pytest.raises(UsageError, match=r"^the prompt 'a <\|image_pad\|>' holds <\|image_pad\|>, which stands for "):
        subject.draw(prompt="a <|image_pad|>")


@pytest.mark.parametrize(
    ("name", "text", "width_of_text", "blocks"),
    [("longcat_image", 512, 3584, 30 * 12), ("ovis_image", 256, 2048, 6 * 16 + 27 * 16)],
)
def test_a_plan_from_published_shapes(name, text, width_of_text, blocks):
    """FLOPs: linear layers 2 x tokens x weights (gated feed-forwards half as many more), attention 4 x tokens^2."""
    config, _ = compose_unchecked([f"model={name}", "sampling.prompt=a", "sampling.height=1024", "sampling.width=1024"])
    made = plan_configuration(config, read_devices()["h100"], 1)
    assert made.asked is not None
    tokens, dim = 64 * 64 + text, 3072
    depth = {"longcat_image": 30, "ovis_image": 33}[name]
    forward = 2 * tokens * blocks * dim**2 + 4 * depth * tokens**2 * dim + 2 * text * width_of_text * dim
    assert made.asked.phases[1].flops / made.steps / 2 == pytest.approx(forward, rel=0.01)
