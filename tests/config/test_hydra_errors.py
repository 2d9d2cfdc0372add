"""Every mistake on the command line is one line: problem, origin, nearest name and allowed values."""

import pytest

from hydrarun.config.compose import compose_config
from hydrarun.config.hydra_errors import translate_errors
from hydrarun.core.errors import UsageError


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sampling.stpes=3", "sampling.stpes (command line): unknown key. Did you mean 'num_inference_"),
        ("+sampling.stpes=3", "sampling.stpes (command line): unknown key. Did you mean 'num_inference_"),
        (f"sampling.height={'9' * 5000}", f"sampling.height (command line): '{'9' * 199}… is not a whole number"),
        (f"sampling.true_cfg_scale={'9' * 400}", "sampling.true_cfg_scale: a number is too large"),
        (f"scheduler.shift={'9' * 400}", "a whole number of 1329 bits; 64 at most"),
        ("modle=demo", "modle (command line): unknown key. Did you mean 'model'? Known: model, scheduler, sampling,"),
        ("prompt=a cat", "prompt (command line): unknown key. Did you mean 'sampling.prompt'?"),
        ("steps=3", "Did you mean 'sampling.num_inference_steps'?"),
        ("reciep=demo/quick", "Did you mean 'recipe'?"),
        ("model.pth=x", "model.pth (command line): unknown key. Did you mean 'path'?"),
        ("sampling.tiling=true", "Did you mean 'vae.tiling'?"),
        ("compile.mode=x", "compile.mode (command line): unknown key. Known: none."),
        ("model.stages.0.foo=3", "model.stages[0].foo (command line): unknown key"),
        ("hydra.run.dri=x", "hydra.run.dri (command line): unknown key. Did you mean 'dir'?"),
        ("model=dmeo", "model=dmeo (command line): no such option. Did you mean 'demo'? Options: demo, flux_dev, "),
        ("attention=spda", "Did you mean 'sdpa'? Options: cudnn, flash, flex, sage, sdpa."),
        ("recipe=demo/quik", "recipe=demo/quik: no such recipe. Did you mean 'demo/quick'? Known: demo/grid,"),
        ("hydra/launcher=rya", "hydra/launcher=rya (command line): no such option"),
        ("model=null", "model=null: not the name of an option"),
        ("model=3", "model=3: not the name of an option"),
        ("attention=[sdpa,flash]", "choose one option; to compare several: -m attention=sdpa,flash"),
        ("cache=[teacache,dbcache]", "choose one option; to compare several: -m cache=teacache,dbcache"),
        ("cache=[mask,every_n]", "choose one option; to compare several: -m cache=mask,every_n"),
        ("cache=teacache,dbcache", "cache=teacache,dbcache: several options: choose one, or add -m to run them all."),
        ("cache/predictor=taylor", "the option of cache that is chosen has no predictor; `hydrarun list cache`"),
        ("cache=dbcach", "Did you mean 'dbcache'?"),
        ("cache.gate.treshold=1", "cache.gate (command line): unknown key"),
        ("sampling.num_inference_steps=fast", "num_inference_steps (command line): 'fast' is not a whole number."),
        ("sampling.num_inference_steps=true", "true is not a whole number."),
        ("sampling.num_inference_steps=2.5", "2.5 is not a whole number."),
        ("sampling.true_cfg_scale=true", "sampling.true_cfg_scale (command line): true is not a number or null."),
        ("sampling.height=null", "height (command line): null, and model demo has no input image to take it from."),
        ("sampling.guidance_scale=much", "sampling.guidance_scale (command line): 'much' is not a number or null."),
        ("vae.slicing=maybe", "vae.slicing (command line): 'maybe' is not true or false."),
        ("vae=3", "vae (command line): 3 is not a section with dtype, slicing, tiling, channels_last."),
        ("sampling.height=[1,2]", "[1, 2] is not a whole number or null."),
        ("sampling.height=${nope}", "sampling.height (command line): Interpolation key 'nope' not found"),
        ("sampling.height=${no:1}", "sampling.height (command line): Unsupported interpolation type no"),
        ("sampling.seed=1,2", "several values: add -m to run them all, or write a list, sampling.seed=[1,2]."),
        ("sampling.seed=range(1,3)", "several values: add -m"),
        ("sampling.seed=some", "sampling.seed (command line): 'some' is not a whole number from 0 to 2**63-1"),
        ("word", "word: not of the form key=value"),
        ("sampling..height=3", "sampling..height=3: not of the form key=value"),
        ("attention._target_=os.system", "attention._target_ (command line): 'os.system' is not on the list"),
        ("+attention._partial_=true", "attention._partial_ (command line): keys with a leading underscore"),
        ("+model.pipeline.trust_remote_code=true", "model.pipeline.trust_remote_code (command line): not allowed"),
        ("model=qwen_image", 'sampling.prompt (model qwen_image): is missing: set it, sampling.prompt="…"'),
        ("sampling.height=100", "sampling.height=100: this checkpoint needs a multiple of 16"),
        ("model.path=/no/such/folder", "model.path=/no/such/folder: no such folder"),
        ("sampling.negative_prompt=null", 'set sampling.negative_prompt=" ", or sampling.true_cfg_scale=1'),
        ("~sampling.height", "sampling.height (command line)"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(override, words):
    with pytest.raises(UsageError) as caught:
        compose_config([override])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_override_that_is_wrong_is_blamed_not_the_first():
    with pytest.raises(UsageError, match="^recipe=null: not the name of an option"):
        compose_config(["model=demo", "recipe=null"])


def test_an_exception_that_is_no_mistake_of_the_user_passes():
    with pytest.raises(ValueError, match="a bug"), translate_errors([]):
        raise ValueError("a bug")
