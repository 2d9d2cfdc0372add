"""Each rule refuses what it is about, with the override that fixes it, and nothing else."""

from __future__ import annotations

import pytest

from hydrarun import compat
from hydrarun.compose import compose, compose_raw
from hydrarun.errors import UsageError


def test_a_model_with_one_transformer_has_no_expert_to_swap():
    with pytest.raises(UsageError, match=r"^offload: model flux_dev has one transformer.* Use offload=none\.$"):
        compose(["model=flux_dev", "sampling.prompt=a", "offload=expert"])


def test_on_the_cpu_there_is_nothing_to_offload_to():
    asked = ["model=wan22_t2v_a14b", "sampling.prompt=a", "offload=expert"]
    assert compose(asked)["offload"]["_target_"].endswith("ExpertOffload")
    with pytest.raises(UsageError, match=r"^offload: on device=cpu .* Use offload=none\.$"):
        compose([*asked, "device=cpu"])


def test_all_violations_come_at_once():
    config, _ = compose_raw(["offload=expert", "device=cpu"])
    with pytest.raises(UsageError) as caught:
        compat.check(config)
    assert len(str(caught.value).splitlines()) == 2


def test_every_fix_fixes():
    config, _ = compose_raw(["offload=expert", "device=cpu"])
    for rule in compat.violations(config):
        mended, _ = compose_raw(["offload=expert", "device=cpu", rule.fix])
        assert not any(compat.violations(mended))
