"""Prefetched blocks: refused settings, and the formulas of the bytes held."""

from __future__ import annotations

import json

import pytest

from hydrarun.acceleration.offload.strategies import DiskOffload, LayerwiseOffload, ModelOffload, NoOffload
from hydrarun.config.checks.checkpoint import check_folder_fit
from hydrarun.config.compose import compose_unchecked
from hydrarun.core.errors import UsageError


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ({"resident_blocks": -1}, "offload.resident_blocks: -1 is below 0"),
        ({"prefetch_blocks": 0}, "offload.prefetch_blocks: 0 is below 1"),
    ],
)
def test_numbers_that_cannot_be(asked, line):
    with pytest.raises(UsageError, match=f"^{line}$"):
        LayerwiseOffload(**asked)


@pytest.mark.parametrize(("resident", "ahead", "depth", "fits"), [(1, 1, 4, True), (2, 1, 4, False), (0, 3, 4, False)])
def test_blocks_that_would_all_be_there_are_refused_from_json_alone(tmp_path, resident, ahead, depth, fits):
    (tmp_path / "transformer").mkdir()
    lists = {"num_layers": depth - 2, "num_single_layers": 2}
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(lists))
    asked = ["offload=layerwise", f"offload.resident_blocks={resident}", f"offload.prefetch_blocks={ahead}"]
    config = compose_unchecked(["model=flux_dev", *asked])[0]
    if fits:
        check_folder_fit(config, tmp_path)
        return
    fix = ["offload.resident_blocks=0", "offload.prefetch_blocks=1"]
    for device, other in (("auto", "model"), ("cpu", "none")):
        with pytest.raises(UsageError) as caught:
            check_folder_fit({**config, "device": device}, tmp_path)
        assert str(caught.value) == (
            f"offload.resident_blocks={resident} offload.prefetch_blocks={ahead}: {resident} resident and"
            f" {ahead + 1} buffered blocks cover all {depth} blocks of this checkpoint: use offload={other}, or"
            f" {' '.join(fix)}"
        )
    check_folder_fit(compose_unchecked(["model=flux_dev", "offload=layerwise", *fix])[0], tmp_path)


def test_what_offloads_hold_on_the_device():
    sizes = [3, 5, 2, 4]
    assert NoOffload().blocks_bytes(sizes) == ModelOffload().blocks_bytes(sizes) == 14
    assert LayerwiseOffload().blocks_bytes(sizes) == 10
    assert LayerwiseOffload(resident_blocks=2).blocks_bytes(sizes) == 3 + 5 + 2 * 4
    assert LayerwiseOffload(prefetch_blocks=2).blocks_bytes(sizes) == 15
    assert DiskOffload().blocks_bytes(sizes) == 9
