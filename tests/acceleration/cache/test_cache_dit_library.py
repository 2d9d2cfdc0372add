"""Cache-DiT compared with the library's own API, refused arguments, and quiet loggers."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from hydrarun.config.targets import instantiate
from hydrarun.core.errors import UsageError
from tests.helpers import tiny
from tests.helpers.dbcache import Counter, guided, node, record


@pytest.fixture
def fresh_pipeline(subject):
    """diffusers' pipeline on the subject's weights, which the library may patch."""
    pipeline = type(subject.pipeline).from_pretrained(subject.folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.sample(3)
@pytest.mark.parametrize("subject", ["demo"], indirect=True)
@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize(
    "settings",
    [{}, {"taylorseer_order": 1}, {"prune": True}, {"steps_computation_mask": "fast", "Bn_compute_blocks": 1}],
    ids=["dbcache", "taylorseer", "dbprune", "mask"],
)
def test_equals_the_library_used_its_own_way(subject, fresh_pipeline, scale, settings):
    import cache_dit

    common = {"residual_diff_threshold": 0.13, "max_warmup_steps": 2, "max_continuous_cached_steps": 3}
    request = {"num_inference_steps": 12, "true_cfg_scale": scale, "negative_prompt": "x"}
    ours = subject.draw(cache=node(**common, **settings), **request)
    found = record(subject)["steps"]["transformer"]

    kind = cache_dit.DBPruneConfig if settings.get("prune") else cache_dit.DBCacheConfig
    density, order = settings.get("steps_computation_mask"), settings.get("taylorseer_order")
    config = kind(
        Fn_compute_blocks=1,
        Bn_compute_blocks=settings.get("Bn_compute_blocks", 0),
        enable_separate_cfg=scale > 1,
        num_inference_steps=12,
        steps_computation_mask=density and cache_dit.steps_mask(mask_policy=density, total_steps=12),
        **common,
    )
    calibrator = order and cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order)
    cache_dit.enable_cache(fresh_pipeline, cache_config=config, calibrator_config=calibrator)
    theirs = tiny.reference(fresh_pipeline, ours, "latent")
    (context,) = fresh_pipeline._context_manager._cached_context_manager.values()

    assert (ours.latents - theirs).abs().max() <= 1e-4
    assert found["positive"]["skipped"] == context.get_cached_steps()
    assert 0 < len(context.get_cached_steps()) < 10
    if scale > 1:
        assert found["negative"]["skipped"] == context.get_cfg_cached_steps()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"Fn_compute_blocks": 0}, "cache.Fn_compute_blocks: 0 is below 1"),
        ({"Bn_compute_blocks": -1}, "cache.Bn_compute_blocks: -1 is below 0"),
        ({"max_warmup_steps": 0}, "cache.max_warmup_steps: 0 is below 1"),
        ({"max_cached_steps": -2}, "cache.max_cached_steps: -2 is below -1"),
        ({"max_continuous_cached_steps": -2}, "cache.max_continuous_cached_steps: -2 is below -1"),
        ({"residual_diff_threshold": -0.1}, "cache.residual_diff_threshold: -0.1 is not a finite number >= 0"),
        ({"residual_diff_threshold": float("nan")}, "cache.residual_diff_threshold: nan is not a finite number >= 0"),
        ({"taylorseer_order": 3}, "cache.taylorseer_order: 3 is not one of 1, 2 or null."),
        (
            {"steps_computation_mask": "quick"},
            "cache.steps_computation_mask: 'quick' is not one of slow, medium, fast, ultra or null.",
        ),
        ({"steps_computation_policy": "some"}, "cache.steps_computation_policy: 'some' is not one of dynamic, static."),
        (
            {"steps_computation_policy": "static"},
            "cache.steps_computation_policy: static needs a mask of the steps to compute: set"
            " cache.steps_computation_mask=slow|medium|fast|ultra",
        ),
    ],
)
def test_what_cannot_be_is_refused(arguments, message):
    with pytest.raises(UsageError) as caught:
        instantiate(node(**arguments), "cache")
    assert str(caught.value) == message


@pytest.mark.parametrize("subject", ["demo"], indirect=True)
def test_more_blocks_than_there_are_is_refused_before_the_first_step(subject):
    with Counter(subject) as calls, pytest.raises(UsageError) as caught:
        subject.draw(cache=node(Fn_compute_blocks=4, Bn_compute_blocks=2), **guided(subject))
    assert str(caught.value) == (
        "cache.Fn_compute_blocks + cache.Bn_compute_blocks: 6 blocks always run, and transformer has 6, so none can be"
        " skipped; choose fewer"
    )
    assert calls == {"transformer": [0] * 6}


def test_the_library_is_quiet():
    instantiate(node(), "cache")
    names = [name for name in logging.root.manager.loggerDict if name.startswith("cache_dit.caching")]
    assert "cache_dit.caching.cache_blocks.pattern_base" in names
    assert not any(logging.getLogger(name).isEnabledFor(logging.WARNING) for name in names)


def test_composing_such_an_option_does_not_import_the_library():
    program = "import sys, hydrarun.config.compose as c; c.compose_config(['cache=dbcache']);"
    program += " print('cache_dit' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
