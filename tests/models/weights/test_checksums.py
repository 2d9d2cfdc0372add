"""`verify=true`: a checkpoint's files against their recorded checksums."""

from __future__ import annotations

import hashlib
import io
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from rich.console import Console
from rich.filesize import decimal

from hydrarun.config import hub
from hydrarun.config.compose import compose_config
from hydrarun.core.distributed.rank import RankInfo
from hydrarun.core.errors import RunError, UsageError
from hydrarun.core.progress import Progress
from hydrarun.engine.ranks import worker
from hydrarun.engine.runner import Runner
from hydrarun.engine.runs.single import run_single
from hydrarun.models.weights.checksums import RECORD, list_read_files, verify_checksums
from tests.helpers import tiny

WEIGHTS = [f"{name}/{name}.safetensors" for name in ("text_encoder", "transformer", "vae")]
SETTINGS = [
    "model_index.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors.index.json",
    "tokenizer/additional_chat_templates/one.jinja",
    "tokenizer/merges.txt",
    "tokenizer/spiece.model",
    "tokenizer/tokenizer.json",
]
FILES = [*SETTINGS, *WEIGHTS]
QUIET = Progress(quiet=True)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_hash(path: Path) -> str:
    """Return the hash that git itself gives the file."""
    done = subprocess.run(["git", "hash-object", "--no-filters", path], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def folder(tmp_path) -> Path:
    """Weight files and their SHA256SUMS, with lines in both the text and the binary format of `sha256sum`."""
    folder = tmp_path / "weights of mine"
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode() * 1000)
    kinds = " *" * len(FILES)
    lines = [f"{sha256((folder / name).read_bytes())} {kind}{name}" for name, kind in zip(FILES, kinds, strict=False)]
    (folder / "SHA256SUMS").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def snapshot(folder, tmp_path) -> Path:
    """The same in the layout of the hub's cache: symlinks to files that are named by a hash, small ones by git's."""
    snapshot, blobs = tmp_path / "snapshots" / "0123", tmp_path / "blobs"
    blobs.mkdir()
    for name in FILES:
        data = (folder / name).read_bytes()
        digest = sha256(data) if name in WEIGHTS else git_hash(folder / name)
        (blobs / digest).write_bytes(data)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blobs / digest)
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
        assert text.getvalue().splitlines()[-1].startswith(f"verifying files: {decimal(size)} in ")


@pytest.mark.parametrize("name", FILES)
def test_another_file_is_named_with_both_hashes(folder, snapshot, name):
    """Its last byte differs: every file is read to its end."""
    for place in (folder, snapshot):
        file = place / name
        git = place == snapshot and name in SETTINGS
        kind, compute = ("git hash", git_hash) if git else ("sha256", lambda path: sha256(path.read_bytes()))
        old = compute(file)
        file.write_bytes(file.read_bytes()[:-1] + b"!")
        assert refused(place) == (
            f"{file}: not the file that was recorded: its {kind} is {compute(file)}, expected is {old}."
            " Download or copy it again"
        )


def test_a_file_that_is_listed_and_not_there(folder):
    (folder / FILES[1]).unlink()
    assert refused(folder) == f"{folder / FILES[1]}: missing, but {folder / 'SHA256SUMS'} names it"


@pytest.mark.parametrize("name", ["vae/more.safetensors", "generation_config.json", "tokenizer/added_tokens.json"])
def test_a_file_that_nothing_records(folder, snapshot, name):
    """It could be read in the place of, or next to, a recorded one."""
    (folder / name).write_bytes(b"{}")
    assert refused(folder).startswith(f"{folder / name}: cannot be verified: not in {folder / 'SHA256SUMS'}. If you")
    (snapshot / name).write_bytes(b"{}")
    said = "cannot be verified: not a symlink to a file named by its hash, unlike others here"
    assert refused(snapshot) == f"{snapshot / name}: {said}"
    (snapshot / name).unlink()
    (snapshot / name).symlink_to(snapshot / "0123456789")  # no hash
    assert refused(snapshot) == f"{snapshot / name}: {said}"
    (snapshot / name).unlink()
    (snapshot / name).symlink_to("../" * 9 + "a" * 40)
    assert refused(snapshot) == f"{snapshot / name}: missing, but a link names it"


def test_what_no_loader_reads_need_not_be_recorded(folder):
    for name in ("README.md", ".cache/huggingface/x.json", "vae/.x.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"{}")
    verify_checksums(folder, QUIET)


def test_a_component_behind_a_link_is_read_too(folder, tmp_path):
    (folder / "vae").rename(tmp_path / "vae")
    (folder / "vae").symlink_to(tmp_path / "vae")
    verify_checksums(folder, QUIET)
    (folder / "vae" / "config.json").write_bytes(b"{}")
    assert refused(folder).startswith(f"{folder / 'vae' / 'config.json'}: cannot be verified")


def test_what_is_downloaded_is_what_is_verified(tmp_path):
    """But for weights that some repositories store as a single file too."""
    names = ["a.json", "b/c.json", "b/c.txt", "b/c.model", "b/c.jinja", "b/c/d.jinja", "b/c.safetensors"]
    for name in (*names, "b/c.bin", "b/c.py", "d.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert list_read_files(tmp_path) == sorted(tmp_path / name for name in names)
    assert {Path(pattern).suffix for pattern in hub.FILES} == {Path(name).suffix for name in names}


def test_no_record_at_all(folder):
    """The command in the message creates a record of every file."""
    (folder / "SHA256SUMS").unlink()
    (folder / "vae").rename(folder.parent / "vae")
    (folder / "vae").symlink_to(folder.parent / "vae")
    said = refused(folder, UsageError)
    command = re.search(r"record the files: (\(.*\)); or use verify=false$", said)[1]
    assert said.startswith(f"verify=true: no checksums of the files in {folder}. If you trust them, record")
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
    subprocess.run(RECORD, shell=True, check=True, cwd=folder)
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    return folder


def test_nothing_is_read_from_another_config(damaged, monkeypatch):
    """The weights are those that were recorded, and what is made of them is not."""
    file = damaged / "text_encoder" / "config.json"
    subprocess.run(RECORD, shell=True, check=True, cwd=damaged)
    file.write_text(file.read_text() + " ")
    monkeypatch.setattr("hydrarun.engine.build.load_pipeline", None)
    with pytest.raises(RunError, match=r"text_encoder/config.json: not the file that was recorded"):
        tiny.runner(damaged, "verify=true")


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
