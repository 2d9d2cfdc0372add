"""A folder takes one run at a time, and never a second one. Only a batch continues what it holds."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from hydrarun.core.errors import UsageError, WriteError
from hydrarun.core.files import write_atomically
from hydrarun.outputs import run_folder, writer
from hydrarun.outputs.run_folder import claim_run_folder, lock_folder, release_reserve, translate_file_errors


def test_two_processes_do_not_draw_into_one_folder(tmp_path):
    with (
        lock_folder(tmp_path),
        pytest.raises(UsageError, match=r"another process is drawing into it; wait for it, or hydra\.run\.dir=…"),
        lock_folder(tmp_path),
    ):
        pass
    with lock_folder(tmp_path):  # free again
        pass


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"status": "complete", "created": "2026-01-01", "outputs": [{}]}, "the run of 2026-01-01"),
        ({"status": "failed", "created": "2026-01-01", "outputs": [{}]}, "the run of 2026-01-01"),
        ("not JSON", r"a run\.json that cannot be read"),
        ({"status": "failed", "outputs": []}, None),
        ({"status": "interrupted", "outputs": []}, None),
        (None, None),
    ],
)
def test_another_run_is_kept(tmp_path, record, problem):
    """A run that made nothing may be replaced."""
    if record is not None:
        (tmp_path / "run.json").write_text(record if isinstance(record, str) else json.dumps(record))
    if problem is None:
        with claim_run_folder(tmp_path, resumes=False):
            return
    for resumes in (False, True):  # a batch does not continue a run without a ledger
        with (
            pytest.raises(UsageError, match=f"holds {problem}; choose another folder, or delete this one"),
            claim_run_folder(tmp_path, resumes),
        ):
            pass


def test_only_a_batch_continues_a_ledger(tmp_path):
    (tmp_path / "ledger.jsonl").touch()
    (tmp_path / "run.json").write_text(json.dumps({"status": "complete", "outputs": [{}]}))
    with claim_run_folder(tmp_path, resumes=True):
        pass
    with pytest.raises(UsageError, match="holds the pictures of a batch"), claim_run_folder(tmp_path, resumes=False):
        pass


@pytest.fixture
def full_disk(monkeypatch):
    """Writing run.json fails while the reserve takes the disk's last bytes."""

    def write(path: Path, data: bytes) -> None:
        if (path.parent / run_folder.LOCK_FILE).stat().st_size:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_atomically(path, data)

    monkeypatch.setattr(writer, "write_atomically", write)


def test_a_full_disk_still_takes_run_json(tmp_path, full_disk):
    with claim_run_folder(tmp_path, resumes=False):
        assert (tmp_path / ".lock").stat().st_size == run_folder.RESERVE
        writer.write_run(tmp_path, {"status": "failed"})
        assert json.loads((tmp_path / "run.json").read_text())["status"] == "failed"
        assert not release_reserve(tmp_path)  # it is taken
    assert (tmp_path / ".lock").stat().st_size == 0


def test_an_error_names_the_file_and_a_folder_that_is_gone(tmp_path):
    with pytest.raises(WriteError) as raised, translate_file_errors(tmp_path / "a.png"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert str(raised.value) == f"{tmp_path}: cannot write a.png: No space left on device"
    gone = tmp_path / "gone"
    with pytest.raises(WriteError, match="the folder was removed while the run wrote into it"):
        writer.write_run(gone, {})
