"""The noise floor: how far runs without a cache differ. Drawn with the run's model, which is unchanged afterwards."""

from __future__ import annotations

from contextlib import suppress

import pytest

from hydrarun.core.errors import UsageError
from hydrarun.engine.runner import Runner
from hydrarun.engine.runs import quality
from hydrarun.models.layers.attention_backends import SDPA, FlexAttention
from tests.helpers import tiny
from tests.helpers.measured import BOTH, CACHED, config


class Halved(SDPA):
    """An attention kernel with wrong results that counts its calls."""

    calls = 0

    def __call__(self, query, key, value, mask):
        self.calls += 1
        return super().__call__(query, key, value, mask) / 2


def test_the_noise_floor_is_measured_against_the_twin(run, runner, monkeypatch):
    other = Halved()
    with monkeypatch.context() as patch:
        patch.setattr(quality, "make_backends", lambda config: {"repeat": None, "flex": other})
        record = run(*CACHED, BOTH, "report.noise_floor=[repeat,flex]")
    assert runner.drawn == ["StepCache", "NoCache", "NoCache", "NoCache"]
    floor = record["quality"]["noise_floor"]
    assert list(floor) == ["repeat", "flex"]
    assert floor["repeat"]["psnr"]["worst"] == 100.0
    assert floor["flex"]["psnr"]["mean"] < 60
    assert set(floor["flex"]) == {"psnr", "ssim"}
    calls = other.calls
    assert calls > 0
    run(*CACHED, BOTH)
    assert other.calls == calls  # the run's own attention is restored


def test_the_noise_floor_is_of_runs_without_a_cache(run):
    assert run(*CACHED, BOTH, "report.noise_floor=[repeat]")["quality"]["noise_floor"]["repeat"] == {
        "psnr": dict.fromkeys(("mean", "p95", "worst"), 100.0),
        "ssim": dict.fromkeys(("mean", "p95", "worst"), 1.0),
    }


def test_the_attention_is_put_back_after_an_error(tiny_runner):
    other = Halved()
    with suppress(ZeroDivisionError), quality.use_attention(tiny_runner, other):
        tiny.draw(tiny_runner, num_inference_steps=2)
        raise ZeroDivisionError
    calls = other.calls
    assert calls > 0
    tiny.draw(tiny_runner, num_inference_steps=2)
    assert other.calls == calls


def test_the_noise_floors_attention_is_that_of_its_name():
    found = quality.make_backends({"report": {"noise_floor": ["repeat", "flex"]}})
    assert found["repeat"] is None
    assert isinstance(found["flex"], FlexAttention)


def test_a_noise_floor_that_this_machine_lacks_is_refused_before_weights_are_read(tmp_path, tiny_folder):
    asked = config(tiny_folder, tmp_path, BOTH, "report.noise_floor=[flash]")
    asked["model"]["path"] = str(tmp_path / "nothing")
    with pytest.raises(UsageError, match=r"^attention=flash: no flash-attention is installed"):
        Runner(asked)
