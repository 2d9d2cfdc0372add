"""How many ranks this machine may start."""

from __future__ import annotations

import pytest

from hydrarun.core.distributed import limits


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Sets the number of cores and of NVIDIA devices, and CUDA_VISIBLE_DEVICES."""

    def build(cores: int, devices: int, visible: str | None) -> None:
        for number in range(devices):
            (tmp_path / f"0000:{number:02}:00.0").mkdir()
        monkeypatch.setattr(limits, "count_cores", lambda: cores)
        monkeypatch.setattr(limits, "NVIDIA_DEVICES", tmp_path if devices else tmp_path / "none")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return build


@pytest.mark.parametrize(
    ("device", "cores", "devices", "visible", "most"),
    [
        ("cpu", 2, 0, None, 8),
        ("cpu", 64, 4, None, 64),
        ("auto", 2, 0, None, 8),
        ("auto", 64, 4, None, 4),
        ("cuda", 64, 4, None, 4),
        ("cuda", 64, 4, "0,3", 2),
        ("cuda", 64, 4, "GPU-8932f937-d72c, MIG-1", 2),
        ("cuda", 64, 4, "1,-1,2", 1),
        ("cuda", 64, 4, "0,1,2,3,4,5", 4),
        ("auto", 64, 4, "", 64),  # hidden: torch uses the CPU
        ("cuda", 2, 0, None, 8),  # the driver tells no number here; the ranks count again
    ],
)
def test_the_most_ranks(machine, device, cores, devices, visible, most):
    machine(cores, devices, visible)
    assert limits.max_ranks(device) == most
