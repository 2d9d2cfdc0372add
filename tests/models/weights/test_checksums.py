"""`verify=true`: weight files against their recorded checksums."""

from __future__ import annotations

import hashlib
import io
import shutil
import subprocess
from pathlib import Path

import pytest
from rich.console import Console
from rich.filesize import decimal

from hydrarun.config.compose import compose_config
from hydrarun.core.distributed.rank import RankInfo
from hydrarun.core.errors import RunError, UsageError
from hydrarun.core.progress import Progress
from hydrarun.engine.ranks import worker
from hydrarun.engine.runner import Runner
from hydrarun.engine.runs.single import run_single
from hydrarun.models.weights.checksums import verify_checksums
from tests.helpers import tiny

FILES = [f"{name}/{name}.safetensors" for name in ("text_encoder", "transformer", "vae")]
QUIET = Progress(quiet=True)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def folder(tmp_path) -> Path:
    """Weight files and their SHA256SUMS, with lines in both the text and the binary format of `sha256sum`."""
    folder = tmp_path / "weights of mine"
    for name in FILES:
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(name.encode() * 1000)
    lines = [f"{sha256((folder / name).read_bytes())} {kind}{name}" for name, kind in zip(FILES, " * ", strict=True)]
    (folder / "SHA256SUMS").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def snapshot(folder, tmp_path) -> Path:
    """The same in the layout of the hub's cache: symlinks to files that are named by their sha256."""
    snapshot, blobs = tmp_path / "snapshots" / "0123", tmp_path / "blobs"
    blobs.mkdir()
    for name in FILES:
        data = (folder / name).read_bytes()
        (blobs / sha256(data)).write_bytes(data)
        (snapshot / name).parent.mkdir(parents=True)
        (snapshot / name).symlink_to(f"../../../blobs/{sha256(data)}")
    return snapshot


def refused(folder: Path, kind: type[Exception] = RunError) -> str:
    with pytest.raises(kind) as caught:
        verify_checksums(folder, QUIET)
    return str(caught.value)


def test_what_is_recorded_passes(folder, snapshot):
    """Every byte is read and reported."""
    size = sum((folder / name).stat().st_size for name in FILES)
    for place in (folder, snapshot):
        text = io.StringIO()
        verify_checksums(place, Progress(Console(file=text)))
        assert text.getvalue().splitlines()[-1].startswith(f"verifying weights: {decimal(size)} in ")


def test_another_file_is_named_with_both_hashes(folder, snapshot):
    """The last byte of the last file differs: every file is read to its end."""
    for place in (folder, snapshot):
        file = place / FILES[2]
        old = file.read_bytes()
        new = old[:-1] + b"!"
        file.write_bytes(new)
        assert refused(place) == (
            f"{file}: not the file that was recorded: its sha256 is {sha256(new)}, expected is {sha256(old)}."
            " Download or copy it again"
        )


def test_a_file_that_is_listed_and_not_there(folder):
    (folder / FILES[1]).unlink()
    assert refused(folder) == f"{folder / FILES[1]}: missing, but {folder / 'SHA256SUMS'} lists it"


def test_a_file_that_nothing_records(folder, snapshot):
    shutil.copy(folder / FILES[0], folder / "vae" / "more.safetensors")
    name = folder / "vae" / "more.safetensors"
    assert refused(folder) == f"{name}: cannot be verified: not in {folder / 'SHA256SUMS'}"
    name = snapshot / "vae" / "more.safetensors"
    name.symlink_to("../../../blobs/" + "a" * 40)  # a git hash, not a sha256
    said = "cannot be verified: not a symlink to a file named by its sha256, unlike others here"
    assert refused(snapshot) == f"{name}: {said}"


def test_no_record_at_all(folder):
    """The command in the message creates a record."""
    (folder / "SHA256SUMS").unlink()
    said = refused(folder, UsageError)
    command = f"(cd '{folder}' && sha256sum */*.safetensors > SHA256SUMS)"
    assert said == (
        f"verify=true: no checksums of the weights in {folder}. If you trust the files, record them: {command}; or use"
        " verify=false"
    )
    subprocess.run(command, shell=True, check=True)
    verify_checksums(folder, QUIET)
    assert len((folder / "SHA256SUMS").read_text().splitlines()) == len(FILES)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("vae.safetensors", "not a sha256 and a file's name, as `sha256sum` writes them"),
        (f"{'0' * 63}  a", "not a sha256 and a file's name, as `sha256sum` writes them"),
        (f"{'0' * 64}  ../a", "'../a' is outside this folder"),
        (f"{'0' * 64}  /etc/passwd", "'/etc/passwd' is outside this folder"),
    ],
)
def test_a_line_that_cannot_be(folder, line, message):
    with (folder / "SHA256SUMS").open("a") as file:
        file.write(line + "\n")
    assert refused(folder, UsageError) == f"{folder / 'SHA256SUMS'}, line {len(FILES) + 1}: {message}"


# --- in a run --------------------------------------------------------------------------------------------------------


def test_the_shipped_weights_are_recorded(demo_folder, tmp_path):
    verify_checksums(demo_folder, QUIET)
    config = compose_config(["device=cpu", "sampling.num_inference_steps=2", "verify=true"])
    record = run_single(Runner(config), config, tmp_path)
    assert record["verified"] is True
    assert record["config"]["verify"] is True


@pytest.fixture
def damaged(tiny_folder, tmp_path) -> Path:
    """A checkpoint that loads but differs from its recorded checksums."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "tiny"))
    subprocess.run("sha256sum */*.safetensors > SHA256SUMS", shell=True, check=True, cwd=folder)
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    return folder


def test_nothing_is_loaded_from_other_files(damaged, tmp_path, monkeypatch):
    """Without `verify`, the record states that the weights were not verified."""
    runner = tiny.runner(damaged, "sampling.num_inference_steps=2")
    record = run_single(runner, runner.config, tmp_path / "run")
    assert record["verified"] is False
    monkeypatch.setattr("hydrarun.engine.build.load_transformer", None)
    monkeypatch.setattr("hydrarun.engine.build.load_pipeline", None)
    with pytest.raises(RunError, match=r"vae/diffusion_pytorch_model.safetensors: not the file that was recorded"):
        tiny.runner(damaged, "verify=true")


def test_one_rank_of_a_machine_verifies(damaged, monkeypatch):
    """The others would read the same files; if the verifying rank fails, all end."""
    monkeypatch.setattr("hydrarun.engine.build.rank_info", lambda: RankInfo(3, 4, 1, 2))
    tiny.runner(damaged, "verify=true")


def test_weights_that_were_not_verified_serve_no_run_that_asks_for_it(tiny_folder):
    config = tiny.config(tiny_folder)
    assert worker.build_key({**config, "verify": True}) != worker.build_key(config)
