"""What waits on the host while it is not needed: the options of the `offload` group."""

from __future__ import annotations


class NoOffload:
    """Everything stays on the device."""

    swap_experts = False


class ExpertOffload:
    """Of two experts only the one in use is on the device; the other waits on the host.

    They change places once in each run (Wan 2.2: from high to low noise) and once before the next.
    """

    swap_experts = True
