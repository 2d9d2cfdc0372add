"""Loading weights: parameters equal the saved values, and errors name file and tensor."""

from __future__ import annotations

import json
import os
import shutil
import threading
from concurrent.futures import wait
from pathlib import Path

import accelerate
import pytest
import torch
from safetensors.torch import load_file, save_file

from hydrarun.core.distributed.mesh import Axis
from hydrarun.core.errors import RunError
from hydrarun.core.progress import Progress
from hydrarun.core.threads import ThreadPool
from hydrarun.models.qwen_image import QwenImageTransformer
from hydrarun.models.weights import loader, tensor_reader
from hydrarun.models.weights.loader import find_source_names
from hydrarun.models.weights.safetensors import Header, fingerprint_weights
from tests.helpers import tiny
from tests.helpers.subjects import FAMILIES

FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """diffusers' transformer and the folder it was saved to; copy the folder before changing it."""
    reference = tiny.transformer(layers=2)
    folder = tmp_path_factory.mktemp("saved") / "transformer"
    reference.save_pretrained(folder)
    return reference, folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved[1], tmp_path / "transformer"))


def load(folder: Path, dtype: torch.dtype = torch.float32, notes: list[str] | None = None, axis: Axis | None = None):
    note = (notes if notes is not None else []).append
    return tiny.load_transformer(QwenImageTransformer, folder, dtype, note=note, axis=axis)


def edit(folder: Path, change) -> None:
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE)


def test_every_value_is_in_its_place(saved):
    """Fused projections hold q, k, v concatenated; everything else is copied."""
    reference, folder = saved
    ours = load(folder)
    theirs = reference.state_dict()
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in reference.parameters())
    for name, parameter in ours.named_parameters():
        sources = find_source_names(name, ours.weight_map)
        assert torch.equal(parameter, torch.cat([theirs[source] for source in sources])), name
    assert find_source_names("blocks.1.text.qkv.bias", ours.weight_map) == (
        "transformer_blocks.1.attn.add_q_proj.bias",
        "transformer_blocks.1.attn.add_k_proj.bias",
        "transformer_blocks.1.attn.add_v_proj.bias",
    )


def test_dtype_is_converted_once(saved):
    """bfloat16 from float32 files equals torch's rounding of each value."""
    ours, exact = load(saved[1], torch.bfloat16), load(saved[1])
    for (name, half), full in zip(ours.named_parameters(), exact.parameters(), strict=True):
        assert half.dtype == torch.bfloat16
        assert torch.equal(half, full.to(torch.bfloat16)), name


def test_sharded_checkpoint_equals_a_single_file(saved, tmp_path):
    reference, folder = saved
    sharded = tmp_path / "sharded"
    reference.save_pretrained(sharded, max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    for have, want in zip(load(sharded).parameters(), load(folder).parameters(), strict=True):
        assert torch.equal(have, want)


@pytest.mark.parametrize(("rank", "heads", "inner"), [(0, (0, 32), (0, 96)), (1, (32, 48), (96, 192))])
def test_a_rank_of_two_has_its_heads_and_its_inner_width(saved, rank, heads, inner):
    """3 heads of 16 channels are split into 2 and 1: rows of input projections, columns of output projections."""
    theirs = {name.removeprefix("transformer_blocks.1."): value for name, value in saved[0].state_dict().items()}
    ours = load(saved[1], axis=Axis(None, rank, 2)).blocks[1].image
    for leaf in ("weight", "bias"):
        rows = [theirs[f"attn.to_{x}.{leaf}"][slice(*heads)] for x in "qkv"]
        assert torch.equal(getattr(ours.qkv, leaf), torch.cat(rows))
        assert torch.equal(getattr(ours.feed_forward.up, leaf), theirs[f"img_mlp.net.0.proj.{leaf}"][slice(*inner)])
        assert torch.equal(getattr(ours.modulation.linear, leaf), theirs[f"img_mod.1.{leaf}"])
    for layer, name, columns in ((ours.out, "attn.to_out.0", heads), (ours.feed_forward.down, "img_mlp.net.2", inner)):
        assert torch.equal(layer.weight, theirs[f"{name}.weight"][:, slice(*columns)])
        assert torch.equal(layer.bias, theirs[f"{name}.bias"])


def test_a_rank_reads_its_part_only(saved, monkeypatch):
    """Row shards are read alone. For column shards whole rows are read, from the machine's shared file cache."""
    read, read_into = [], tensor_reader.read_into_tensor

    def counting(file, offset, tensor):
        read.append(tensor.nbytes)
        read_into(file, offset, tensor)

    monkeypatch.setattr(tensor_reader, "read_into_tensor", counting)
    counts = {}
    for rank in (None, 0, 1):
        load(saved[1], axis=None if rank is None else Axis(None, rank, 2))
        counts[rank] = sum(read)
        read.clear()
    assert counts[None] == sum(parameter.nbytes for parameter in saved[0].parameters())
    twice = [parameter for name, parameter in saved[0].named_parameters() if not is_shared(name, ROWS)]
    assert counts[0] + counts[1] - counts[None] == sum(parameter.nbytes for parameter in twice)
    assert counts[1] < counts[0] < counts[None]


ROWS = (".to_q.", ".to_k.", ".to_v.", ".add_q_proj.", ".add_k_proj.", ".add_v_proj.", ".net.0.proj.")


def is_shared(name: str, parts: tuple[str, ...]) -> bool:
    """Return whether diffusers' parameter `name` is sharded."""
    return name.startswith("transformer_blocks.") and any(part in name for part in parts)


@pytest.mark.parametrize(("layer", "columns"), [("attn.to_q", 48), ("img_mlp.net.2", 192)])
def test_a_rank_names_the_shape_of_the_whole_tensor(folder, layer, columns):
    name = f"transformer_blocks.0.{layer}.weight"
    edit(folder, lambda tensors: tensors.update({name: tensors[name][:-1].contiguous()}))
    message = rf"'{name}' has shape \[47, {columns}\], config.json asks for \[48, {columns}\]"
    with pytest.raises(RunError, match=message):
        load(folder, axis=Axis(None, 1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("axis", [None, Axis(None, 1, 2)])
def test_pieces_of_a_file_that_come_one_after_the_other_are_the_whole(saved, monkeypatch, dtype, axis):
    """Tensors that cannot be read directly into place (other dtypes, column shards) are read a few rows at a time."""
    whole = dict(load(saved[1], dtype, axis=axis).named_parameters())
    monkeypatch.setattr(tensor_reader, "CHUNK", 1000)
    for name, parameter in load(saved[1], dtype, axis=axis).named_parameters():
        assert torch.equal(parameter, whole[name]), name


def test_large_weights_in_memory_of_their_own(saved, monkeypatch):
    """They have the same values and are contiguous, like other tensors."""
    plain = dict(load(saved[1]).named_parameters())
    monkeypatch.setattr(tensor_reader, "LARGE", 1)
    for name, parameter in load(saved[1]).named_parameters():
        assert torch.equal(parameter, plain[name]), name
        assert parameter.is_contiguous()


def test_onto_a_device(saved, fake):
    """Values equal those on the host, also in another dtype."""
    for dtype in (torch.float32, torch.bfloat16):
        plain = dict(load(saved[1], dtype).named_parameters())
        there = tiny.load_transformer(QwenImageTransformer, saved[1], dtype, device=torch.device("fake"))
        for name, parameter in there.named_parameters():
            assert (str(parameter.device), parameter.dtype) == ("fake:0", dtype)
            assert torch.equal(parameter.cpu(), plain[name]), name


def test_what_libraries_change_meanwhile_changes_nothing(saved):
    """Libraries build modules with another default dtype, and with parameters on the meta device."""
    plain = dict(load(saved[1], torch.bfloat16).named_parameters())
    go_on = threading.Event()
    with Progress(quiet=True).reading("loading") as tally, ThreadPool() as pool:
        for _ in range(pool.threads):
            pool.start(go_on.wait)
        options = {"device": torch.device("cpu"), "dtype": torch.bfloat16, "note": print}
        ours = loader.load_transformer(QwenImageTransformer, saved[1], pool=pool, tally=tally, **options)
        assert all(parameter.is_meta for parameter in ours.parameters())
        torch.set_default_dtype(torch.float16)
        try:
            with accelerate.init_empty_weights():
                go_on.set()
                wait(pool.jobs)
        finally:
            torch.set_default_dtype(torch.float32)
    for name, parameter in ours.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, plain[name]), name


def test_bytes_are_told(saved):
    """The bytes of all tensors, counted in threads, add up."""
    with Progress(quiet=True).reading("loading") as tally, ThreadPool() as pool:
        options = {"device": torch.device("cpu"), "dtype": torch.bfloat16, "note": print}
        loader.load_transformer(QwenImageTransformer, saved[1], pool=pool, tally=tally, **options)
    assert tally.done == tally.expected == sum(parameter.nbytes for parameter in saved[0].parameters())


@pytest.mark.parametrize("subject", FAMILIES, indirect=True)
def test_a_run_reads_every_byte_once(subject):
    files = list(subject.folder.glob("*/*.safetensors"))
    assert len(files) >= 3
    assert subject.runner.read_bytes == sum(path.stat().st_size - Header.read(path).start for path in files)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.int64])
def test_integers_in_the_place_of_weights_are_refused(folder, dtype):
    edit(folder, lambda tensors: tensors.update({"proj_out.bias": tensors["proj_out.bias"].to(dtype)}))
    with pytest.raises(RunError, match=rf"{FILE}: 'proj_out.bias' has the dtype .*not quantized"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 10**9}, "num_layers: 1000000000, and the weights hold"),
        ({"num_layers": "2"}, "no model can be built with these values"),
        ({"num_layers": 900}, "asks for more than .* parameters"),
        ({"num_attention_heads": -1}, "no model can be built with these values"),
        ({"joint_attention_dim": 10**18}, "no model can be built with these values"),
        ({"axes_dims_rope": 5}, "no model can be built with these values"),
    ],
    ids=str,
)
def test_sizes_that_the_weights_do_not_have(folder, change, message):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(RunError, match=rf"config.json: {message}") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_that_becomes_shorter_while_it_is_read(folder, monkeypatch, dtype):
    plan = loader.plan_placements

    def cut(*arguments):
        placements = plan(*arguments)
        os.truncate(folder / FILE, 100_000)
        return placements

    monkeypatch.setattr(loader, "plan_placements", cut)
    with pytest.raises(RunError, match=rf"{FILE}: '[\w.]+' cannot be read: the file has become shorter"):
        load(folder, dtype)


def test_missing_tensor(folder):
    edit(folder, lambda tensors: tensors.pop("proj_out.bias"))
    with pytest.raises(RunError, match=rf"{FILE}: 1 tensors are missing, the first is 'proj_out.bias'"):
        load(folder)


def test_unexpected_tensor(folder):
    edit(folder, lambda tensors: tensors.update({"extra.weight": torch.zeros(2)}))
    with pytest.raises(RunError, match=rf"{FILE}: 1 tensors have no place in this model, the first is 'extra.weight'"):
        load(folder)


def test_misspelt_tensor_suggests_the_name(folder):
    edit(folder, lambda tensors: tensors.update({"proj_out.bais": tensors.pop("proj_out.bias")}))
    with pytest.raises(RunError, match=r"'proj_out.bias'.*Did you mean 'proj_out.bais'"):
        load(folder)


@pytest.mark.parametrize("name", ["img_in.weight", "transformer_blocks.0.attn.to_k.weight"])
def test_wrong_shape(folder, name):
    edit(folder, lambda tensors: tensors.update({name: tensors[name][:-1].contiguous()}))
    with pytest.raises(RunError, match=rf"{FILE}: '{name}' has shape .*config.json asks for"):
        load(folder)


def test_wrong_order_of_sizes_within_a_fused_projection(folder):
    """q is longer and k shorter by the same number of rows: the sum fits, but the checkpoint is wrong."""

    def change(tensors):
        q, k = (f"transformer_blocks.0.attn.to_{x}.weight" for x in "qk")
        tensors[q] = torch.cat([tensors[q], tensors[k][:1]])
        tensors[k] = tensors[k][1:].contiguous()

    edit(folder, change)
    with pytest.raises(RunError, match="to_q.weight"):
        load(folder)


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_truncated_file(folder, keep):
    data = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(data[:keep])
    with pytest.raises(RunError, match=rf"{FILE}: "):
        load(folder)


def test_damaged_header(folder):
    data = bytearray((folder / FILE).read_bytes())
    data[20:60] = b"x" * 40
    (folder / FILE).write_bytes(bytes(data))
    with pytest.raises(RunError, match=rf"{FILE}: its header is damaged"):
        load(folder)


def test_pickle_is_never_loaded(folder):
    (folder / FILE).unlink()
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(RunError, match="pickle weights, which are never loaded"):
        load(folder)


def test_index_that_names_a_missing_shard_or_tensor(saved, tmp_path):
    sharded = tmp_path / "sharded"
    saved[0].save_pretrained(sharded, max_shard_size="100KB")
    index_path = next(sharded.glob("*.index.json"))
    index = json.loads(index_path.read_text())
    shard = index["weight_map"]["proj_out.bias"]
    index["weight_map"]["ghost.weight"] = shard
    index_path.write_text(json.dumps(index))
    with pytest.raises(RunError, match=rf"{shard}: lacks 'ghost.weight'"):
        load(sharded)
    (sharded / shard).unlink()
    with pytest.raises(RunError, match=rf"{shard}: no such file"):
        load(sharded)
    index["weight_map"]["proj_out.bias"] = "../elsewhere.safetensors"
    index_path.write_text(json.dumps(index))
    with pytest.raises(RunError, match=r"must lie in the same folder, not at '\.\./elsewhere.safetensors'"):
        load(sharded)


def test_config_keys_that_are_not_used_are_said(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pooled_projection_dim": 768}))
    notes: list[str] = []
    load(folder, notes=notes)
    assert notes == ["transformer/config.json: pooled_projection_dim not used by QwenImageTransformer"]


def test_config_that_is_missing_or_no_json(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(RunError, match=r"config.json: not a JSON object"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(RunError, match=r"config.json: no such file"):
        load(folder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("attention_head_dim", 10**12, "Storage size calculation overflowed"),
        ("num_attention_heads", -1, "Trying to create tensor with negative dimension"),
        ("axes_dims_rope", 3, "object is not iterable"),
    ],
)
def test_a_config_that_no_transformer_has(folder, key, value, message):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(RunError, match=rf"config.json: no model can be built with these values: .*{message}") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_fingerprint_sees_names_shapes_values_and_settings(folder):
    first = fingerprint_weights(folder)
    assert first == fingerprint_weights(folder)
    assert len(first) == 16
    edit(folder, lambda tensors: tensors.update({"extra.weight": torch.zeros(2)}))
    second = fingerprint_weights(folder)
    (folder / "config.json").write_text("{}")
    third = fingerprint_weights(folder)
    edit(folder, lambda tensors: tensors.update({"extra.weight": torch.ones(2)}))  # other values, same header
    assert len({first, second, third, fingerprint_weights(folder)}) == 4
