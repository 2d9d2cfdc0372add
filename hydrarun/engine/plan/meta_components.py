"""Meta components: replace a pipeline's components in a plan, with the same classes but no values.

Text encoders take real token ids and return zeros, so that a pipeline's own prompt encoding runs unchanged. Inside they
run on the meta device, where the meter counts.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from hydrarun.core.device import HOST
from hydrarun.engine.plan.configs import ComponentConfigs
from hydrarun.engine.plan.meter import META, Meter
from hydrarun.models.weights.config_size import build_on_meta, check_counts
from hydrarun.pipeline.components import OURS, load_component, make_module, quiet_libraries, read_model_index

#: assumed bytes of text per token without a tokenizer; a special token counts as one
BYTES_PER_TOKEN = 4
SPECIAL_TOKEN = re.compile(r"<\|\w+\|>")


def make_meta_modules(configs: ComponentConfigs, dtype: torch.dtype, vae_dtype: torch.dtype) -> dict[str, nn.Module]:
    """Build the text encoders and the VAE on the meta device, by their names in the checkpoint."""
    found = {}
    for name in configs.entries:
        if name not in OURS and issubclass(cls := configs.cls(name), nn.Module):
            where, config = f"{configs.said}: {name}/config.json", configs.config(name)
            check_counts(where, config)
            with quiet_libraries():
                module = build_on_meta(where, partial(make_module, cls, config))
            kind = vae_dtype if name == "vae" else dtype
            found[name] = cast_module(module, kind, find_float32_modules(module, kind))
    return found


def find_float32_modules(module: nn.Module, dtype: torch.dtype) -> set[str]:
    """Return names of modules that their library keeps in float32: some always, others only for float16."""
    names = ["_keep_in_fp32_modules_strict"] + ["_keep_in_fp32_modules"] * (dtype == torch.float16)
    return {one for name in names for one in getattr(module, name, None) or ()}


def cast_module(module: nn.Module, dtype: torch.dtype, kept: Collection[str]) -> nn.Module:
    """Cast the module's parameters to `dtype`, except those under the names in `kept`, which are float32."""
    for name, parameter in module.named_parameters():
        kind = torch.float32 if set(name.split(".")) & set(kept) else dtype
        parameter.data = torch.empty(parameter.shape, dtype=kind, device=META)
    return module.eval().requires_grad_(False)


def make_meta_pipeline(
    cls: Any, configs: ComponentConfigs, made: dict[str, nn.Module], scheduler: Any | None, meter: Meter
) -> Any:
    """Build the diffusers pipeline from meta components. The scheduler is real; tokenizers are if their files exist."""
    if configs.folder is not None:
        read_model_index(configs.folder, cls)  # raises if the index does not fit
    components: dict[str, Any] = {}
    for name, value in configs.index.items():
        if name.startswith("_"):
            continue
        if not isinstance(value, list):
            components[name] = value
        elif name == "scheduler" and scheduler is not None:
            components[name] = scheduler
        elif name in OURS or name not in configs.entries:
            components[name] = None
        elif name in made:
            components[name] = make_meta_component(name, made[name], meter, configs)
        else:
            components[name] = load_tool(configs, name, made)
    accepted = inspect.signature(cls).parameters
    with quiet_libraries():
        return cls(**{name: value for name, value in components.items() if name in accepted})


def make_meta_component(name: str, module: nn.Module, meter: Meter, configs: ComponentConfigs) -> Any:
    """Return the object that the pipeline calls instead of a module."""
    if name == "vae":
        return module
    return MetaTextEncoder(module, meter) if configs.entries[name][0] == "transformers" else MetaProjection(module)


def load_tool(configs: ComponentConfigs, name: str, made: dict[str, nn.Module]) -> Any:
    """Load a component without weights from its files, or return its meta component."""
    cls = configs.cls(name)
    if configs.folder is not None:
        return load_component(configs.folder, name, configs.entries[name], device=HOST, dtype=torch.float32)
    if name in configs.components:
        return cls.from_config(configs.components[name])
    return MetaProcessor(made["text_encoder"].config) if "rocessor" in cls.__name__ else MetaTokenizer()


class MetaTextEncoder:
    """A text encoder on the meta device, called from the host: takes ids, returns zeros of the right shape."""

    device = HOST

    def __init__(self, module: nn.Module, meter: Meter) -> None:
        self.module = module
        self.meter = meter

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None, **settings: Any) -> Any:
        """Encode ids. Images are placeholder ids; the encoder's work on their pixels is not counted."""
        taken = ("output_hidden_states", "logits_to_keep")
        wants = {name: value for name, value in settings.items() if name in taken}
        if attention_mask is not None:
            self.meter.answer = bool(attention_mask.all())  # encoders skip the mask if nothing is padded
            wants["attention_mask"] = attention_mask.to(META)
        shapes = tree_map(TensorShape.of, self.module(input_ids=input_ids.to(META), **wants))
        self.meter.answer = True
        return tree_map(TensorShape.zeros, shapes)  # after the outputs are freed, so that they count once

    def generate(self, input_ids: Tensor, max_new_tokens: int, **_: Any) -> Tensor:
        """Return the ids and zeros. One pass reads all tokens: the same work as token by token, in less time."""
        whole = F.pad(input_ids, (0, max_new_tokens))
        self(whole, logits_to_keep=1)
        return whole

    def get_image_features(self, pixels: Tensor, grids: Tensor) -> Any:
        """Return the pictures' patch grids in place of their features."""
        return SimpleNamespace(pooler_output=grids)

    def get_image_tokens(self, grids: Tensor) -> Tensor:
        """Return an id for each patch."""
        return torch.zeros(int(grids.prod(-1).sum()), dtype=torch.long)


class MetaProjection:
    """A module after the text encoders, such as a projection, on the meta device and called from the host."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def __call__(self, **inputs: Tensor) -> Any:
        given = {name: value.to(META) for name, value in inputs.items()}
        return tree_map(TensorShape.zeros, tree_map(TensorShape.of, self.module(**given)))


@dataclass(frozen=True)
class TensorShape:
    """Shape and dtype of a tensor."""

    shape: torch.Size
    dtype: torch.dtype

    @classmethod
    def of(cls, value: Any) -> Any:
        """Return the shape of a tensor, or any other value unchanged."""
        return cls(value.shape, value.dtype) if isinstance(value, Tensor) else value

    @staticmethod
    def zeros(value: Any) -> Any:
        """Return a tensor of that shape, or any other value unchanged."""
        return torch.zeros(value.shape, dtype=value.dtype) if isinstance(value, TensorShape) else value


class MetaTokenizer:
    """Returns as many ids as a text probably has tokens."""

    model_max_length = 77  # CLIP's; for others the caller passes max_length

    def __call__(
        self,
        text: str | list[str],
        padding: bool | str = False,
        max_length: int | None = None,
        truncation: bool = False,
        return_tensors: str | None = None,
        **_: Any,
    ) -> Any:
        texts = [text] if isinstance(text, str) else text
        plain = [SPECIAL_TOKEN.sub(BYTES_PER_TOKEN * "_", one) for one in texts]
        count = max(math.ceil(len(one.encode()) / BYTES_PER_TOKEN) for one in plain)
        if max_length is not None and (padding == "max_length" or count > max_length):
            count = max_length
        if isinstance(text, str) and return_tensors is None:  # as tokenizers do
            return {"input_ids": count * [1]}
        return make_encoding(len(texts), count)

    def pad(self, texts: Mapping[str, list[list[int]]], max_length: int, **_: Any) -> Any:
        return make_encoding(len(texts["input_ids"]), max_length)

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        return "".join(message["content"] for message in messages)

    def convert_tokens_to_ids(self, token: str) -> int:
        return 1

    def tokenize(self, text: str) -> list[str]:
        """Return no tokens: none was added by textual inversion."""
        return []

    def batch_decode(self, ids: Tensor) -> list[str]:
        return [""] * len(ids)


class MetaProcessor:
    """Counts tokens of a text and its pictures, for encoders that read a picture as a grid of merged patches."""

    image_token = "<|image_pad|>"

    def __init__(self, config: Any) -> None:
        self.side = config.vision_config.patch_size * config.vision_config.spatial_merge_size
        self.tokenizer = MetaTokenizer()
        self.image_processor = MetaImageProcessor(config.vision_config)

    def __call__(self, text: str | list[str], images: Any = None, **_: Any) -> Any:
        given = images if isinstance(images, list) else [] if images is None else [images]
        text = [text] if isinstance(text, str) else text
        tokens = sum(round(image.height / self.side) * round(image.width / self.side) for image in given)
        made = make_encoding(len(text), tokens + self.tokenizer(text).input_ids.shape[1])
        return made | {"pixel_values": torch.zeros(0), "image_grid_thw": torch.zeros(0)}

    def batch_decode(self, ids: list[Tensor], **_: Any) -> list[str]:
        return [len(one) * BYTES_PER_TOKEN * "_" for one in ids]


class MetaImageProcessor:
    """Computes the patch grid of one picture."""

    def __init__(self, config: Any) -> None:
        self.patch_size, self.merge_size = config.patch_size, config.spatial_merge_size

    def __call__(self, images: Any, **_: Any) -> Any:
        merged = self.patch_size * self.merge_size
        sides = [round(side / merged) * self.merge_size for side in (images.height, images.width)]
        return {"pixel_values": torch.zeros(0), "image_grid_thw": torch.tensor([[1, *sides]])}


def make_encoding(rows: int, columns: int) -> Any:
    """Return ids and masks as tokenizers do."""
    from transformers import BatchFeature

    ids = torch.ones(rows, columns, dtype=torch.long)
    return BatchFeature({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
