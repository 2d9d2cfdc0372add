"""Degrees of the parallel methods and the ranks they need. No torch here: checked before heavy imports."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

#: dimensions that split the work, from the outermost (ranks far apart) to the innermost
DIMENSIONS = ("data", "cfg", "ring", "ulysses", "tensor")

#: the keys of the degrees in the section `parallel`
KEYS = (*(f"{name}_degree" for name in DIMENSIONS), "hsdp_degree", "vae_degree")

#: no machine has that many; keeps the numbers in messages readable
MAX_DEGREE = 2**16

Degrees = Mapping[str, int]


def count_worker_ranks(degrees: Degrees) -> int:
    """Return the number of ranks that do different work."""
    return math.prod(degrees[f"{name}_degree"] for name in DIMENSIONS)


def world_size(degrees: Degrees) -> int:
    """Return the total number of ranks. HSDP and the VAE reuse these ranks; larger degrees add ranks."""
    return max(count_worker_ranks(degrees), degrees["hsdp_degree"] * degrees["tensor_degree"], degrees["vae_degree"])


def find_degree_problems(degrees: Degrees) -> Iterator[tuple[str, str]]:
    """Yield a key and a message for each invalid degree."""
    for key in KEYS:
        if not 1 <= degrees[key] <= MAX_DEGREE:
            yield key, f"{degrees[key]} is below 1." if degrees[key] < 1 else f"above {MAX_DEGREE}."
            return
    ranks, work = world_size(degrees), count_worker_ranks(degrees)
    layout = " x ".join(f"{name} {degrees[f'{name}_degree']}" for name in DIMENSIONS)
    if ranks % work:
        yield "hsdp_degree", f"{ranks} ranks in total, which is not a multiple of the {work} ranks of {layout}."
    holders = ranks // degrees["tensor_degree"]
    if holders % degrees["hsdp_degree"]:
        yield "hsdp_degree", f"{holders} ranks hold equal weights, which is no multiple of {degrees['hsdp_degree']}."
    together = ranks // degrees["data_degree"]
    if together % degrees["vae_degree"]:
        yield "vae_degree", f"{together} ranks draw the same pictures, which is no multiple of {degrees['vae_degree']}."


def split_evenly(length: int, ranks: int) -> list[int]:
    """Split `length` items over `ranks` ranks as evenly as possible; the first ranks get one more."""
    return [length // ranks + (rank < length % ranks) for rank in range(ranks)]
