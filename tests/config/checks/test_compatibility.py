"""Each rule refuses only its own conflict, and names an override that fixes it."""

from __future__ import annotations

import pytest

from hydrarun.config.checks import compatibility, values
from hydrarun.config.compose import compose_config, compose_unchecked
from hydrarun.core.errors import UsageError


def test_a_model_with_one_transformer_has_no_expert_to_swap():
    with pytest.raises(UsageError, match=r"^offload: model flux_dev has one transformer.* Use offload=none\.$"):
        compose_config(["model=flux_dev", "sampling.prompt=a", "offload=expert"])


def test_on_the_cpu_there_is_nothing_to_offload_to():
    asked = ["model=wan22_t2v_a14b", "sampling.prompt=a", "offload=expert"]
    assert compose_config(asked)["offload"]["_target_"].endswith("ExpertOffload")
    with pytest.raises(UsageError, match=r"^offload: on device=cpu .* Use offload=none\.$"):
        compose_config([*asked, "device=cpu"])


def test_all_violations_come_at_once():
    config, _ = compose_unchecked(["offload=expert", "device=cpu"])
    with pytest.raises(UsageError) as caught:
        compatibility.check_compatibility(config)
    assert len(str(caught.value).splitlines()) == 2


BROKEN = {
    "one transformer": ["offload=expert"],
    "no modulation weights of their own": ["model=wan22_ti2v_5b", "offload=modulation"],
    "on device=cpu": ["model=wan22_t2v_a14b", "offload=expert", "device=cpu"],
    "one branch to predict": ["parallel=cfg2", "sampling.true_cfg_scale=1"],
    "two branches": ["parallel.cfg_degree=4"],
    "fewer pictures than ranks": ["parallel=data2"],
    "encodes one prompt at a time": [
        "model=qwen_image_edit",
        "parallel.data_degree=2",
        "parallel.hsdp_degree=2",
        "sampling.num_images_per_prompt=2",
    ],
    "log-sum": ["parallel=ring2", "attention=flex"],
    "other attention kernels": ["parallel=ring2", "report.metrics=[psnr]", "report.noise_floor=[repeat,flex]"],
    "a sound has none": ["model=stable_audio", "sampling.prompt=a", "parallel=vae2"],
    "a layout of pictures": ["model=stable_audio", "sampling.prompt=a", "vae.channels_last=true"],
    "replaces tiles": ["parallel=vae2", "vae.tiling=true"],
    "communicate between the layers": ["compile=full", "parallel=ulysses2"],
    "block by block": ["compile=full", "cache=dbcache"],
    "a scale of its own": ["quantization=int8_weight_only", "parallel=tp2"],
    "HSDP cannot shard": ["quantization=int8_weight_only", "quantization.components=[text_encoder]", "parallel=hsdp2"],
    "exceed float16's range": ["quantization=int8", "dtype=float16"],
    "have dtype bfloat16": ["quantization=fp8", "dtype=float32"],
    "multiplied by GPUs only": ["quantization=fp8", "device=cpu"],
    "shard of the weights on its device": ["model=wan22_t2v_a14b", "offload=expert", "parallel=hsdp2"],
    "quantized again each time": ["offload=disk", "quantization=int8_weight_only"],
    "wait until its weights": ["offload=disk", "compile=full"],
    "weights move": ["offload=layerwise", "compile=blocks", "compile.mode=reduce-overhead"],
    "TeaCache has no coefficients": ["model=wan22_ti2v_5b", "cache=teacache", "sampling.prompt=a"],
    "fitted on another model": ["model=qwen_image_2512", "cache=teacache", "sampling.prompt=a"],
    "fitted on other numbers of steps": ["cache=teacache", "sampling.num_inference_steps=12"],
    "are always computed": ["cache=every_n", "cache.gate.first=20", "cache.gate.last=4"],
    "a step is listed": ["cache=mask", "cache.gate.density=null", "cache.gate.steps=[0,60]"],
    "is for another": [
        "cache=mask",
        "cache.gate.density=null",
        "cache.gate.steps=[0]",
        "cache.gate.num_inference_steps=9",
    ],
    "made for 8 steps and more": ["cache=mask", "sampling.num_inference_steps=7"],
    "warm-up alone takes all": ["cache=dbcache", "sampling.num_inference_steps=8", "cache.max_warmup_steps=8"],
    "one forward less": [
        "model=sd35_medium",
        "sampling.prompt=a",
        "model.guidance.layers=[7,8,9]",
        "parallel.hsdp_degree=2",
        "parallel.cfg_degree=2",
    ],
    "decides for each branch by itself": ["cache=dbcache", "parallel.hsdp_degree=2", "parallel.cfg_degree=2"],
}


def test_every_rule_is_tried():
    assert len(BROKEN) == len(compatibility.RULES)


#: more configurations, for fixes that depend on values
ALSO = [
    *(["cache=every_n", f"sampling.num_inference_steps={steps}"] for steps in (1, 2)),
    *(["cache=first_block", f"sampling.num_inference_steps={steps}"] for steps in (1, 2)),
    *(["cache=dbcache", f"sampling.num_inference_steps={steps}"] for steps in (1, 2, 4)),
    *(["cache=mask", f"sampling.num_inference_steps={steps}"] for steps in (1, 2, 3)),
    ["cache=every_n", "cache.gate.first=5", "cache.gate.last=9", "sampling.num_inference_steps=14"],
    ["cache=mask", "cache.gate.density=null", "cache.gate.steps=[30]", "sampling.num_inference_steps=3"],
    ["cache=dbcache", "cache.steps_computation_mask=medium", "sampling.num_inference_steps=6"],
    ["cache=dbcache", "compile=full", "sampling.num_inference_steps=5"],
    ["model=wan22_ti2v_5b", "cache=teacache", "sampling.prompt=a", "sampling.num_inference_steps=3"],
    ["offload=disk", "quantization=int8_weight_only", "device=cpu"],
    ["parallel.ring_degree=2", "parallel.ulysses_degree=2", "attention=flex"],
    ["parallel=data2", "batch_size=1", "sampling.seed=[1,2,3]"],
    ["parallel.data_degree=4", "sampling.seed=[1,2]"],
    ["model=flux_dev", "sampling.prompt=a", "parallel=cfg2"],
    ["model=stable_audio", "sampling.prompt=a", "parallel=cfg2", "sampling.guidance_scale=1"],
    ["model=zimage", "sampling.prompt=a", "parallel=cfg2", "sampling.guidance_scale=0"],
]


def read_overrides(fix: str) -> list[str] | None:
    """Return the overrides of a fix without its remark; None for a command, which makes a file."""
    return None if "hydrarun " in fix else fix.partition(",")[0].split(" ")


def replace_overrides(overrides: list[str], by: list[str]) -> list[str]:
    """Return the command line that a user types after reading `by`."""
    keys = {word.partition("=")[0] for word in by}
    return [word for word in overrides if word.partition("=")[0] not in keys and word.split(".")[0] not in keys] + by


@pytest.mark.parametrize("words", BROKEN)
def test_each_rule_refuses(words):
    (rule,) = compatibility.find_violations(compose_unchecked(BROKEN[words])[0])
    assert words in rule.sentence


@pytest.mark.sample(16)
@pytest.mark.parametrize("overrides", [*BROKEN.values(), *ALSO], ids=" ".join)
def test_every_fix_fixes(overrides):
    """Each named fix passes its rule and breaks no other. A rule always names one."""
    config, _ = compose_unchecked(overrides)
    broken = [*compatibility.find_violations(config)]
    assert broken
    for rule in broken:
        fixes = [fix for text in rule.list_fixes(config) if (fix := read_overrides(text.replace("[0,", "[0;")))]
        fixes = [[word.replace("[0;", "[0,") for word in fix] for fix in fixes]
        assert fixes
        for fix in fixes:
            mended, _ = compose_unchecked(replace_overrides(overrides, fix))
            left = [*compatibility.find_violations(mended)]
            assert rule not in left, fix
            assert {*left} <= {*broken}, fix
            assert {*values.find_problems(mended)} <= {*values.find_problems(config)}, fix


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel=cfg2"],
        ["model=flux_dev", "parallel=cfg2", "sampling.true_cfg_scale=2"],
        ["model=wan22_t2v_a14b", "parallel=cfg2"],
        ["parallel=data2", "sampling.num_images_per_prompt=2"],
        ["parallel=data2", "sampling.seed=[1,2]"],
        ["parallel=usp2x2"],
        ["attention=flex", "parallel=ulysses2"],
    ],
)
def test_what_goes_together(overrides):
    assert not any(compatibility.find_violations(compose_unchecked(overrides)[0]))


def test_embedded_guidance_alone_has_no_branches():
    asked = ["model=flux_dev", "sampling.prompt=a", "parallel=cfg2"]
    with pytest.raises(UsageError, match=r"parallel.cfg_degree: .* one branch .* Use parallel\.cfg_degree=1\.$"):
        compose_config(asked)
    with pytest.raises(UsageError, match=r"cfg_degree=1, or sampling\.true_cfg_scale=2\.$"):
        compose_config([*asked, "sampling.negative_prompt=b"])


def test_a_device_that_turns_out_to_be_the_cpu_is_refused_before_weights(monkeypatch, tmp_path):
    """`device=auto` without a GPU: an offload without effect is refused."""
    import torch

    from hydrarun.engine.runner import Runner

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config, _ = compose_unchecked(["model=wan22_t2v_a14b", f"model.path={tmp_path}", "offload=expert"])
    with pytest.raises(UsageError, match=r"nothing to offload to\. Use offload=none"):
        Runner(config)


@pytest.mark.parametrize(
    "words",
    [
        ["cache=every_n", "cache.gate.first=abc"],
        ["cache=every_n", "cache.gate.last=null"],
        ["cache=mask", "cache.gate.density=null", "cache.gate.steps=abc"],
        ["cache=mask", "cache.gate.density=null", "cache.gate.steps=[0,b]"],
        ["cache=dbcache", "cache.max_warmup_steps=abc"],
    ],
)
def test_rules_leave_wrong_types_to_those_who_take_the_values(words):
    assert compatibility.format_violations(compose_unchecked(words)[0]) == []
