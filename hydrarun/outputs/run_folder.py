"""The folder of a run: one process draws into it, once. Only a batch continues what it holds."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydrarun.core.errors import UsageError, WriteError
from hydrarun.core.files import open_lock
from hydrarun.core.strict_json import CONSTANTS, read_json_object

LOCK_FILE = ".lock"
RECORD_FILE = "run.json"
LEDGER_FILE = "ledger.jsonl"

#: bytes that the lock file takes during a run. A full disk takes them for run.json (`release_reserve`)
RESERVE = 2**17

MAX_BYTES = 2**31  # of a run.json


@contextmanager
def claim_run_folder(folder: Path, resumes: bool, key: str = "hydra.run.dir") -> Iterator[None]:
    """Keep other processes from drawing into `folder` while the block runs. Creates the folder.

    `resumes`: whether the run continues what a ledger in the folder records; `key`: the setting that names the folder.
    Raises UsageError if another process draws into the folder, and if it holds another run's outputs.
    """
    with lock_folder(folder, key):
        check_run_folder(folder, resumes, key)
        reserve_space(folder)
        try:
            yield
        finally:
            release_reserve(folder)


@contextmanager
def lock_folder(folder: Path, key: str = "hydra.run.dir") -> Iterator[None]:
    """Keep other processes from drawing into `folder` while the block runs. Creates the folder. Raises UsageError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open_lock(folder / LOCK_FILE)
    except OSError as error:
        raise UsageError(f"{error.filename}: {error.strerror}; choose another folder: {key}=…") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{folder}: another process is drawing into it; wait for it, or {key}=…") from None
        except OSError:  # a file system without locks
            pass
        yield


def check_run_folder(folder: Path, resumes: bool, key: str = "hydra.run.dir") -> None:
    """Raise UsageError if the folder holds outputs of another run. `resumes`: as for `claim_run_folder`."""
    ledger = os.path.lexists(folder / LEDGER_FILE)
    if resumes and ledger:
        return
    if problem := "the pictures of a batch" if ledger else _find_run(folder / RECORD_FILE):
        raise UsageError(f"{key}={folder}: holds {problem}; choose another folder, or delete this one")


def _find_run(record_file: Path) -> str | None:
    """Return what a run.json stands for; None if there is none, or that of a run without outputs."""
    if not os.path.lexists(record_file):
        return None
    try:
        record = read_json_object(record_file, MAX_BYTES, CONSTANTS)
    except (OSError, ValueError):
        return f"a {RECORD_FILE} that cannot be read"
    if record.get("outputs") or record.get("status") == "complete":
        return f"the run of {record.get('created', 'another time')}"
    return None


def reserve_space(folder: Path) -> None:
    """Let the lock file take `RESERVE` bytes of the disk if there are as many."""
    try:
        with open_lock(folder / LOCK_FILE) as file:
            file.write(bytes(RESERVE))
    except OSError:
        release_reserve(folder)


def release_reserve(folder: Path) -> bool:
    """Free the reserved bytes. Return whether there were any."""
    try:
        held = os.path.getsize(folder / LOCK_FILE) > 0
        os.truncate(folder / LOCK_FILE, 0)
    except OSError:
        return False
    return held


@contextmanager
def translate_file_errors(file: Path) -> Iterator[None]:
    """Turn an OSError of the block, which writes `file` of a run, into a one-line WriteError."""
    try:
        yield
    except OSError as error:
        lost = "" if file.parent.exists() else ", the folder was removed while the run wrote into it"
        raise WriteError(f"{file.parent}: cannot write {file.name}: {error.strerror or error}{lost}") from error
