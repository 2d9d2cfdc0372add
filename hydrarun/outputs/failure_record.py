"""Writes run.json for a run that failed before it could write one: refused, not built, or a rank killed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hydrarun.core.errors import WriteError
from hydrarun.core.strict_json import CONSTANTS, read_json_object
from hydrarun.outputs.run_folder import LEDGER_FILE

Stamp = tuple[int, int]

MAX_BYTES = 2**31  # of the run.json that the block wrote itself


@contextmanager
def record_failure(config: dict[str, Any], folder: Path) -> Iterator[None]:
    """Write run.json to `folder` if the block fails or is interrupted, based on the block's own or a bare record.

    `config`: plain, may be invalid. An older run.json belongs to another run and is replaced, unless it lists what a
    batch has made, which this run continues. Records the error that the block raises: the one that rank 0 wrote may
    only be its consequence.
    """
    before = get_file_stamp(folder / "run.json")
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        with suppress(OSError, WriteError):  # of a full disk, which `error` says: there is nothing to write to
            _write_failure(config, folder / "run.json", error, get_file_stamp(folder / "run.json") != before)
        raise


def get_file_stamp(file: Path) -> Stamp | None:
    """Return a value that changes whenever the file is written; None if there is no file."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _write_failure(config: dict[str, Any], file: Path, error: BaseException, own: bool) -> None:
    from hydrarun.outputs.writer import describe_end, write_run  # imports numpy, so only on failure

    record = _read_record(file) if own or (file.parent / LEDGER_FILE).exists() else None
    record = record or _build_bare_record(config)
    end = describe_end(error)
    if own and record.get("status") == end["status"] and record["error"]["message"] in end["error"]["message"]:
        return
    rest = {key: value for key, value in record.items() if key not in ("format", "status", "error")}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_run(file.parent, {**end, **rest})


def _read_record(file: Path) -> dict[str, Any] | None:
    try:
        return read_json_object(file, MAX_BYTES, CONSTANTS)
    except (OSError, ValueError):
        return None


def _build_bare_record(config: dict[str, Any]) -> dict[str, Any]:
    """Return the record of a run without outputs."""
    from hydrarun.outputs.provenance import hash_config, redact_config
    from hydrarun.outputs.writer import current_timestamp, to_recorded_config

    try:
        kept = to_recorded_config(config)
    except TypeError:  # the configuration was refused because a path is not a string
        kept = redact_config(config)
    return {"created": current_timestamp(), "config_hash": hash_config(kept), "outputs": [], "config": kept}
