"""A rank's position in each dimension of the mesh, and its process groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from hydrarun.core.distributed.collectives import Group
from hydrarun.core.distributed.degrees import DIMENSIONS, Degrees, count_worker_ranks, world_size


@dataclass(frozen=True)
class Axis:
    """One dimension of the mesh for this rank: its group, its rank in the group and the group's size."""

    group: Group
    rank: int
    size: int


_device_meshes: dict[Any, DeviceMesh] = {}


def get_device_mesh(ranks: torch.Tensor, names: tuple[str, ...], device: torch.device) -> DeviceMesh:
    """Return the device mesh of all ranks in this arrangement.

    Meshes are cached: their groups hold threads, or communicators with buffers on the device, which would pile up in a
    sweep over many layouts.
    """
    key = dist.group.WORLD, device.type, names, ranks.shape, *ranks.flatten().tolist()
    if key not in _device_meshes:
        for old in [old for old in _device_meshes if old[0] is not dist.group.WORLD]:
            del _device_meshes[old]  # made for an earlier process group
        _device_meshes[key] = DeviceMesh(device.type, ranks, mesh_dim_names=names)
    return _device_meshes[key]


class Mesh:
    """The mesh of a run: `mesh["ulysses"]` is this rank's axis of that dimension, or None if its degree is 1.

    Neighbours in the innermost dimension (tensor) have neighbouring ranks, so that the ranks that communicate most
    share a machine. If HSDP or the VAE need more ranks than split the work, the dimension `replica` repeats the work.
    """

    def __init__(self, degrees: Degrees, device: torch.device) -> None:
        """The process group must be initialised with `world_size(degrees)` ranks."""
        self.degrees = degrees
        self.device = device
        self.world = world_size(degrees)
        sizes = {name: degrees[f"{name}_degree"] for name in DIMENSIONS}
        names = (*DIMENSIONS[:2], "replica", *DIMENSIONS[2:])
        shape = {name: sizes.get(name, self.world // count_worker_ranks(degrees)) for name in names}
        ranks = torch.arange(self.world)
        #: the dimensions of a degree above 1; a group of one rank would only hold threads
        self.axes: dict[str, Axis] = {}
        if used := {name: size for name, size in shape.items() if size > 1}:
            grid = get_device_mesh(ranks.view(*used.values()), tuple(used), device)
            self.axes = {
                name: Axis(grid.get_group(name), grid.get_local_rank(name), size) for name, size in used.items()
            }
        self.rank = dist.get_rank()
        self.vae = self._vae_axis(ranks)

    def __getitem__(self, name: str) -> Axis | None:
        return self.axes.get(name)

    def hsdp(self) -> DeviceMesh:
        """Return the mesh of the ranks that hold the same tensor-parallel shard: replicas, and shards of weights."""
        tensor, shards = self.degrees["tensor_degree"], self.degrees["hsdp_degree"]
        holders = torch.arange(self.world).view(-1, tensor).t().reshape(tensor, -1, shards)
        return get_device_mesh(holders, ("tensor", "replicate", "shard"), self.device)["replicate", "shard"]

    def _vae_axis(self, ranks: torch.Tensor) -> Axis | None:
        """Return the axis of the `vae_degree` neighbouring ranks that decode together; None for a degree of 1."""
        degree = self.degrees["vae_degree"]
        if degree == 1:
            return None
        grid = get_device_mesh(ranks.view(-1, degree), ("others", "vae"), self.device)
        return Axis(grid.get_group("vae"), grid.get_local_rank("vae"), degree)
