"""`hydrarun plan` from its arguments to its output, `plan=auto`, and the message when memory runs out."""

from __future__ import annotations

import gc
import json
import shutil

import pytest
import torch

from hydrarun.cli import main
from hydrarun.config.compose import compose_config
from hydrarun.core.errors import RunError, UsageError
from hydrarun.core.timing import Timings
from hydrarun.engine.plan import out_of_memory, planner
from hydrarun.engine.plan.devices import GIB, DeviceSpec
from hydrarun.engine.plan.memory_model import PHASES
from hydrarun.engine.runner import Runner
from hydrarun.pipeline.request import make_state
from tests.engine.plan.test_memory_model import asked
from tests.helpers import midsize
from tests.helpers.subjects import command


def said(capsys, *words: str) -> tuple[int, str]:
    """Return the exit code and the output of a command line."""
    code = main.main(["plan", *words])
    out, err = capsys.readouterr()
    return code, (out + err).strip()


def test_a_model_that_is_not_there_is_planned_from_its_published_shapes(capsys):
    words = ["model=qwen_image", "plan.device=rtx4090"]
    code, out = said(capsys, *words, "--json")
    found = json.loads(out)
    assert (code, found["fits"], found["source"]) == (1, False, "published shapes: not downloaded")
    assert [phase["phase"] for phase in found["phases"]] == ["encode", "denoise", "decode"]
    assert (
        found["peak_bytes"] == max(phase["peak_bytes"] for phase in found["phases"]) > found["device"]["memory_bytes"]
    )
    assert found["components"]["transformer"] / GIB == pytest.approx(38.05, abs=0.01)  # 20.4 B parameters in bfloat16
    first, second, third = found["suggestions"]
    assert first["seconds"] <= second["seconds"] * 1.02 <= third["seconds"] * 1.02**2
    for one in (first, second, third):
        assert one["peak_bytes"] <= found["device"]["memory_bytes"]
        assert one["lossless"] != any("quantization" in word or "tiling" in word for word in one["overrides"])
    code, out = said(capsys, *words, *first["overrides"], "--json")
    again = json.loads(out)
    assert (code, again["fits"], again["peak_bytes"]) == (0, True, first["peak_bytes"])
    assert again["suggestions"][0]["overrides"] == []


def test_people_get_a_table_and_overrides_to_paste(capsys):
    code, out = said(capsys, "plan.device=h100", "parallel=cfg2")
    lines = out.splitlines()
    assert code == 0
    assert lines[0].startswith("demo on h100 (78.20 GiB for a run)")
    assert [line.split()[0] for line in lines[3:7]] == ["phase", "encode", "denoise", "decode"]
    assert lines[7].startswith("fits: ")
    assert lines[9].strip().startswith("(as it is)")


def test_all_conflicts_come_at_once_with_their_fixes(capsys):
    code, out = said(capsys, "offload=expert", "parallel=cfg2", "sampling.true_cfg_scale=1", "plan.device=h100")
    assert code == 2
    assert [line.rpartition(" Use ")[2] for line in out.splitlines()] == [
        "parallel.cfg_degree=1, or sampling.true_cfg_scale=2.",
        "offload=none.",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plan.device=h10"], "plan.device=h10: not known here. Did you mean 'h100'? Known: h200, h100, "),
        (["plan.device=h100", "device=cpu"], "plan.device=h100 conflicts with device=cpu: leave out one of them"),
        (["plan=auto"], "plan=auto is for a run, which then takes the first suggestion; `hydrarun plan` shows all"),
        (
            ["plan.device=h100", "offload=layerwise", "offload.resident_blocks=5"],
            "offload.resident_blocks=5 offload.prefetch_blocks=1: 5 resident and 2 buffered blocks cover all",
        ),
        (["device=cuda"], "device=cuda: torch sees 0 CUDA devices here; use device=cpu or device=auto"),
        (["--jsn"], "plan: --jsn: no such flag; it takes --json"),
        (["a cat"], "plan: a cat: neither key=value nor a flag"),
        (["sampling.hieght=64"], "sampling.hieght (command line): unknown key. Did you mean 'height'?"),
        (["sampling.num_inference_steps=0"], "sampling.num_inference_steps"),
    ],
)
def test_mistakes_are_one_line(capsys, words, message):
    code, out = said(capsys, *words)
    assert code == 2
    assert out.startswith(message)
    assert len(out.splitlines()) == 1


def test_a_checkpoint_that_cannot_be_planned_is_named(capsys, demo_folder, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(demo_folder, bare, ignore=shutil.ignore_patterns("*.safetensors"))  # no weights are needed
    assert said(capsys, f"model.path={bare}")[0] == 0
    other = said(capsys, "model=qwen_image_edit", f"model.path={bare}")[1]
    assert other.endswith("QwenImageEditPipeline does not run a checkpoint of QwenImagePipeline: use model=demo")
    (bare / "vae" / "config.json").unlink()
    code, out = said(capsys, "model=demo", f"model.path={bare}")
    assert (code, out) == (2, f"{bare}: there is no vae/config.json, which a plan reads, or it is damaged")
    code, out = said(capsys, "model.path=somebody/something")
    assert code == 2
    assert out.startswith("model.path=somebody/something: not in the local cache")
    assert out.endswith("Or name its model, model=…")
    code, out = said(capsys, "model=demo", "model.path=somebody/something")
    assert code == 2
    assert out.startswith("model.path=somebody/something: not downloaded, and model demo has no published shapes here")
    code, out = said(capsys, "model=wan21_t2v_14b", f"model.path={bare}")
    assert code == 2


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("transformer", {"num_layers": 9000}, "transformer/config.json: num_layers: 9000, and at most 1000"),
        ("text_encoder", {"text_config": {"num_hidden_layers": 9000}}, "num_hidden_layers: 9000, and at most"),
        ("vae", {"num_res_blocks": 9000}, "num_res_blocks: 9000, and at most 1000 are built"),
        ("vae", {"base_dim": 0}, "vae/config.json: asks for no numbers in"),
        ("text_encoder", {"text_config": {}}, "the configs of its components do not fit each other"),
    ],
    ids=str,
)
def test_sizes_of_a_strangers_checkpoint(capsys, demo_folder, tmp_path, name, change, message):
    folder = shutil.copytree(demo_folder, tmp_path / "checkpoint")
    file = folder / name / "config.json"
    file.chmod(0o644)
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    code, out = said(capsys, "model=demo", f"model.path={folder}", "device=cpu")
    assert code == 1
    assert message in out
    assert len(out.splitlines()) == 1


def test_a_run_takes_the_device_that_is_there():
    with pytest.raises(UsageError, match=r"^plan\.device \(command line\): a run uses the device of this machine"):
        compose_config(["plan.device=h100"])
    assert compose_config(["plan=auto", "plan.device=h100"])["plan"] == {"auto": True, "device": "h100"}


@pytest.fixture
def cramped(fake, tmp_path, request):
    """The configuration of a run that needs a third more memory than the fake device has."""
    subject = request.getfixturevalue("subject")
    folder = midsize.saved(subject.name, subject.folder, tmp_path / "midsize")
    config = asked(compose_config([*command(subject.name, folder), "dtype=float32", "device=auto"]), guided=True)
    needed = planner.plan_configuration({**config, "device": "cuda"}, DeviceSpec("fake", 2**40, "cuda"), 1).asked.peak
    gc.collect()
    fake.set_limit(fake.memory_allocated() + needed * 3 // 4)
    yield {**config, "device": "fake"}
    fake.set_limit(2**40)


@pytest.mark.parametrize("subject", ["qwen_image"], indirect=True)
def test_auto_runs_what_fits_and_says_so(subject, cramped, fake, monkeypatch):
    monkeypatch.setattr(planner, "check_sections", lambda *_: None)  # it knows no device "fake"
    notes: list[str] = []
    config = planner.fit_configuration({**cramped, "plan": {"auto": True, "device": None}}, notes.append)
    assert notes == ["plan=auto: it would not fit fake; run with offload=modulation"]
    assert config == {**cramped, "offload": config["offload"], "plan": {"auto": False, "device": None}}
    assert config["offload"]["_target_"].endswith("ModulationOffload")
    drawn = Runner(config)
    drawn.draw(make_state(config["sampling"]), Timings(drawn.built.parts.device))
    assert planner.fit_configuration(config, notes.append) is config
    again = planner.fit_configuration({**config, "plan": {"auto": True, "device": None}}, notes.append)
    assert (again, notes[1:]) == (config, ["plan=auto: it fits fake as it is"])


@pytest.mark.parametrize("subject", ["qwen_image"], indirect=True)
def test_out_of_memory_says_where_what_was_expected_and_what_would_fit(subject, cramped, fake, monkeypatch):
    """Once while loading, with the plan of another process, and once while encoding, with a patched plan."""
    with pytest.raises(RunError) as caught:
        Runner(cramped)
    first, *expected, fix = str(caught.value).splitlines()
    assert first.startswith("out of memory in loading: fake has ")
    assert [line.partition(":")[0] for line in expected] == [f"the plan expects in {phase}" for phase in PHASES]
    assert fix.startswith("it fits with offload=modulation | ")
    fake.set_limit(2**40)
    drawn = Runner(cramped)
    fake.set_limit(fake.memory_allocated() + 2**16)
    monkeypatch.setattr(
        out_of_memory, "run_plan_process", lambda config, device: {"phases": [PHASE], "suggestions": []}
    )
    with pytest.raises(RunError, match=r"^out of memory in encode: fake has .*\nthe plan expects in encode: weights 1"):
        drawn.draw(make_state(cramped["sampling"]), Timings(drawn.built.parts.device))


PHASE = {"phase": "encode", "weights_bytes": GIB, "activations_bytes": GIB, "peak_bytes": 2 * GIB}


def test_without_a_plan_the_message_still_comes(monkeypatch):
    def fails(*_):
        raise OSError

    monkeypatch.setattr(out_of_memory, "run_plan_process", fails)
    said = str(out_of_memory.make_memory_error({}, "decode", torch.device("cpu")))
    assert said.startswith("out of memory in decode: cpu has ")
    assert said.endswith("no plan could be made. Try offload=model, or a smaller size")
