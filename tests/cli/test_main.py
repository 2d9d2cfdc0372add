"""The command from its arguments to its exit code, with a mock of the run."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml

from hydrarun import __version__
from hydrarun.cli import main
from hydrarun.config import targets
from hydrarun.core.errors import RunError, UsageError
from tests.helpers.paths import ROOT

NASTY = [
    "a, b [c] = \"d\" # 'e' \\",
    "${x} \\${y}",
    "${ open",
    "一只猫，坐着",
    "two\nlines",
    "null",
    "[a",
    "50% (off)!",
    "-m",
]
HEAVY = {"torch", "diffusers", "transformers", "numpy", "PIL", "safetensors", "huggingface_hub"}


class Runs(list):
    """The runs so far; `fail` maps seeds to the exceptions that their runs raise."""

    def __init__(self) -> None:
        super().__init__()
        self.fail: dict[int, BaseException] = {}


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """The configurations that reached the mock run, with their output directories."""

    seen = Runs()

    class Runner:
        def __init__(self, config, progress, device):
            pass

        def reset_stats(self):
            pass

    def run_single(runner, config, output_dir):
        seen.append((config, output_dir))
        if error := seen.fail.get(config["sampling"]["seed"]):
            raise error
        (output_dir / "run.json").write_text('{"format": 1, "status": "complete", "outputs": []}')

    stand_ins = {
        "engine.runner": {"Runner": Runner},
        "engine.runs.single": {"run_single": run_single, "follow_single": None},
        "core.progress": {"Progress": lambda: None, "SilentProgress": lambda: None},
    }
    for name, attributes in stand_ins.items():
        module = types.ModuleType(f"hydrarun.{name}")
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, f"hydrarun.{name}", module)
    monkeypatch.chdir(tmp_path)
    return seen


def command(*words: str, **options) -> subprocess.CompletedProcess:
    """Run the command in a separate process."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    return subprocess.run(
        [sys.executable, *options.pop("python", []), "-m", "hydrarun", *words],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
        **options,
    )


def test_a_run_gets_plain_data_and_its_own_directory(runs):
    assert main.main(["sampling.seed=3"]) == 0
    [(config, folder)] = runs
    assert config["sampling"]["seed"] == 3
    assert type(config["model"]["stages"]) is list
    assert folder.is_absolute()
    assert folder.is_dir()
    assert folder.parts[-3] == "outputs"
    assert main.main(["run", "hydra.run.dir=here"]) == 0
    assert runs[1][1] == Path.cwd() / "here"


def test_free_text_reaches_the_run_unharmed(runs):
    for text in NASTY:
        assert main.main([f"sampling.prompt={text}", f"sampling.negative_prompt={text}!"]) == 0
        sampling = runs[-1][0]["sampling"]
        assert (sampling["prompt"], sampling["negative_prompt"]) == (text, f"{text}!")


def test_free_text_reaches_a_sweep_unharmed_and_only_choice_sweeps(runs):
    for text in NASTY:
        assert main.main([f"sampling.prompt={text}", "-m"]) == 0
    assert [run[0]["sampling"]["prompt"] for run in runs] == NASTY
    runs.clear()
    quoted = [
        text.replace("\\", "\\\\").replace('"', '\\"') for text in ("a, b", "一只猫", "null", "7", "${x}", 'say "hi"')
    ]
    choice = "choice(" + ",".join(f'"{text}"' for text in quoted) + ")"
    assert main.main(["-m", f"sampling.prompt={choice}"]) == 0
    assert [run[0]["sampling"]["prompt"] for run in runs] == ["a, b", "一只猫", "null", "7", "${x}", 'say "hi"']


def test_flags_and_overrides_go_in_any_order(runs, capsys):
    assert main.main(["sampling.seed=1,2", "-m", "attention=sdpa,flex"]) == 0
    assert len(runs) == 4
    folders = [folder for _, folder in runs]
    assert [folder.name for folder in folders] == ["0", "1", "2", "3"]
    assert "[3] attention=flex sampling.seed=2" in capsys.readouterr().err


def test_a_failed_point_does_not_stop_a_sweep_and_shows_in_the_exit_code(runs, capsys):
    runs.fail = {1: RunError("NaN in the picture"), 2: ZeroDivisionError("a bug"), 3: UsageError("no such size")}
    assert main.main(["-m", "sampling.seed=0,1,4"]) == 1
    assert main.main(["-m", "sampling.seed=2,4"]) == 1
    assert main.main(["-m", "sampling.seed=4,3"]) == 2
    assert main.main(["-m", "sampling.seed=0,4"]) == 0
    assert len(runs) == 9
    error = capsys.readouterr().err
    assert "NaN in the picture" in error
    assert "Traceback" in error
    assert "ZeroDivisionError: a bug" in error


def test_a_point_with_a_bad_value_is_reported_and_the_others_run(runs, capsys):
    assert main.main(["-m", "sampling.height=64,-8,96"]) == 2
    assert [run[0]["sampling"]["height"] for run in runs] == [64, 96]
    assert "sampling.height (command line): -8 is below 1." in capsys.readouterr().err


def test_an_impossible_sweep_is_refused_before_its_first_point(runs, capsys):
    assert main.main(["-m", "model=demo,dmeo"]) == 2
    assert "Did you mean 'demo'?" in capsys.readouterr().err
    assert not runs


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("error", "code", "shown", "traceback"),
    [
        (UsageError("do this instead"), 2, "do this instead", False),
        (RunError("weights are corrupt"), 1, "weights are corrupt", False),
        (RuntimeError("unforeseen"), 1, "RuntimeError: unforeseen", True),
        (KeyboardInterrupt(), 130, "interrupted", False),
    ],
)
def test_exit_codes_and_what_is_printed(runs, capsys, error, code, shown, traceback):
    runs.fail = {0: error}
    for argv in ([], ["-m", "sampling.seed=0,0"]):
        assert main.main(argv) == code
        printed = capsys.readouterr().err
        assert shown in printed
        assert ("Traceback" in printed) is traceback


def test_one_process_starts_nothing(runs, monkeypatch):
    monkeypatch.setattr("hydrarun.engine.ranks.local_group.RankGroup", lambda size: pytest.fail("ranks were started"))
    assert main.main(["parallel=none"]) == 0
    assert main.main(["-m", "parallel=none", "sampling.seed=1,2"]) == 0
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main.main([]) == 0  # torchrun --nproc_per_node 1
    assert len(runs) == 4


def test_a_refused_run_leaves_nothing_behind(runs, tmp_path):
    for override in ("sampling.stpes=3", "sampling.height=-1", "model=dmeo", "attention._target_=os.system"):
        assert main.main([override]) == 2
    assert not runs
    assert list(tmp_path.iterdir()) == []


def test_an_output_directory_that_cannot_be_made_is_the_users_to_change(runs, capsys, tmp_path):
    (tmp_path / "file").touch()
    assert main.main(["hydra.run.dir=file/inside"]) == 2
    error = capsys.readouterr().err
    assert error == "file/inside: Not a directory; choose another folder: hydra.run.dir=…\n"
    assert len(error.splitlines()) == 1


def test_the_weights_of_a_recipe_are_announced(runs, capsys, tmp_path):
    (tmp_path / "r.yaml").write_text("model: {path: some/where}")
    assert main.main(["recipe=./r.yaml"]) == 0
    assert "recipe ./r.yaml loads weights from some/where" in capsys.readouterr().err


def test_a_users_own_options_and_classes_join_by_flags(runs, tmp_path):
    (tmp_path / "mine" / "attention").mkdir(parents=True)
    (tmp_path / "mine" / "attention" / "own.yaml").write_text("_target_: my_module.Attention\n")
    argv = ["attention=own", "--config-dir", "mine"]
    assert main.main(argv) == 2
    try:
        assert main.main([*argv, "--allow-target", "my_module.Attention"]) == 0
    finally:
        targets._allowed_by_user.clear()
    assert runs[0][0]["attention"] == {"_target_": "my_module.Attention"}


def test_verbs_are_handed_their_words(monkeypatch, capsys):
    module = types.ModuleType("hydrarun.cli.commands.replay")
    module.replay_file = lambda line: print(line.words) or 7
    monkeypatch.setitem(sys.modules, "hydrarun.cli.commands.replay", module)
    monkeypatch.setattr("hydrarun.cli.commands.replay", module, raising=False)
    assert main.main(["replay", "x.png", "device=cpu"]) == 7
    assert capsys.readouterr().out == "['x.png', 'device=cpu']\n"
    assert main.main(["replya"]) == 2
    assert "Did you mean 'replay'?" in capsys.readouterr().err
    assert main.main(["--version"]) == 0
    assert capsys.readouterr().out == f"hydrarun {__version__}\n"


def test_the_configuration_is_shown_with_its_texts_unharmed(capsys):
    for text in NASTY:
        assert main.main(["--resolve", f"sampling.prompt={text}", "--cfg", "job"]) == 0
        assert yaml.safe_load(capsys.readouterr().out)["sampling"]["prompt"] == text


def test_help_names_verbs_groups_and_examples(capsys):
    assert main.main(["--help"]) == 0
    text = capsys.readouterr().out
    for words in (
        "replay FILE",
        "list [models",
        "model: demo, flux_dev, flux_schnell, glm_image",
        "recipe: demo/grid",
        "docs/configuration.md",
    ):
        assert words in text
    examples = [line for line in text.splitlines() if line.startswith("  hydrarun") and "[" not in line]
    assert len(examples) == 5
    assert len(text.splitlines()) <= 50
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--cfg", "job"], 0),
        (["--help"], 0),
        (["-sc", "query=bash"], 0),
        (["sampling.stpes=3"], 2),
        (["sampling.height=100"], 2),
        (["device=cpu", "parallel.hsdp_degree=1000"], 2),
    ],
)
def test_the_driver_imports_nothing_heavy(words, code, tmp_path):
    done = command(*words, python=["-X", "importtime"], cwd=tmp_path, env={"COMP_LINE": "hydrarun mod"})
    assert done.returncode == code, done.stderr[-2000:]
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "hydra" in imported
    assert not imported & HEAVY


def test_an_error_of_the_run_is_one_line_too(runs, capsys):
    """Hydra's own line for a failed run, which has no information, is not printed."""
    runs.fail[3] = RunError("weights are corrupt")
    assert main.main(["sampling.seed=3"]) == 1
    assert capsys.readouterr().err.splitlines() == ["weights are corrupt"]


def test_hydra_records_what_it_did_before(runs, tmp_path):
    assert main.main(["sampling.seed=3", "hydra.run.dir=here"]) == 0
    recorded = yaml.safe_load((tmp_path / "here" / ".hydra" / "hydra.yaml").read_text())["hydra"]
    assert (recorded["mode"], recorded["overrides"]["hydra"]) == ("RUN", ["hydra.run.dir=here", "hydra.mode=RUN"])
    assert yaml.safe_load((tmp_path / "here" / ".hydra" / "overrides.yaml").read_text()) == ["sampling.seed=3"]


def test_a_sweep_may_be_asked_for_by_a_setting(runs):
    assert main.main(["sampling.seed=1,2", "-m", "hydra.sweep.dir=a"]) == 0
    assert main.main(["sampling.seed=4", "hydra.mode=MULTIRUN", "hydra.sweep.dir=b"]) == 0
    assert [folder.relative_to(folder.parents[1]).as_posix() for _, folder in runs] == ["a/0", "a/1", "b/0"]


def test_a_mistake_is_one_line_on_stderr(tmp_path):
    done = command("sampling.stpes=3", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("hydrarun mod", "model. model="),
        ("hydrarun model=flux", "model=flux_dev model=flux_schnell"),
        ("hydrarun model=qwen_image_e", "model=qwen_image_edit model=qwen_image_edit_plus"),
        (
            "hydrarun recipe=demo/",
            "recipe=demo/grid recipe=demo/mask_taylor recipe=demo/quick recipe=demo/teacache",
        ),
        (
            "hydrarun recipe=q",
            "recipe=qwen_image/h200_teacache recipe=qwen_image/rtx4090 recipe=qwen_image/square"
            " recipe=qwen_image_layered/rtx4090",
        ),
        ("hydrarun model=demo attention=f", "attention=flash attention=flex"),
        ("hydrarun sampling.num_i", "sampling.num_images_per_prompt= sampling.num_inference_steps="),
        ("hydrarun -m model=d", "model=demo"),
        ("hydrarun run model=d", "model=demo"),
        ("hydrarun recipe=nope sampling.h", ""),
    ],
)
def test_completion(line, expected, capsys, monkeypatch):
    monkeypatch.setenv("COMP_LINE", line)
    main.main(["-sc", "query=bash"])
    assert capsys.readouterr().out.strip() == expected


def test_bash_completes(tmp_path):
    """Call the script that `eval "$(hydrarun -sc install=bash)"` installs, as bash does on TAB."""
    launcher = tmp_path / "hydrarun"
    launcher.write_text(f'#!/bin/sh\nexec env PYTHONPATH={ROOT} {sys.executable} -c "{LAUNCH}" "$@"\n')
    launcher.chmod(0o755)
    script = """
        eval "$(hydrarun -sc install=bash)"
        COMP_LINE='hydrarun recipe=demo/q'; COMP_WORDS=(hydrarun recipe=demo/q); COMP_CWORD=1; COMP_POINT=${#COMP_LINE}
        hydra_bash_completion; echo "${COMPREPLY[@]}"
    """
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.stdout.split() == ["recipe=demo/quick"], done.stderr


LAUNCH = "import sys; sys.argv[0] = 'hydrarun'; from hydrarun.__main__ import main; sys.exit(main())"
