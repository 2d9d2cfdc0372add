"""Verifies weight files against recorded sha256 checksums before they are loaded."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from hydrarun.core.errors import RunError, UsageError
from hydrarun.core.files import MAX_TEXT_BYTES, compute_sha256, find_file_problem, read_file
from hydrarun.core.progress import Progress
from hydrarun.core.threads import ThreadPool

#: checksums of a folder, in the format of `sha256sum`
SUMS = "SHA256SUMS"
LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")
DIGEST = re.compile(r"[0-9a-f]{64}")


def verify_checksums(folder: Path, progress: Progress) -> None:
    """Compare every recorded file with its sha256. All weights in subfolders of `folder` must be recorded.

    Checksums come from the folder's SHA256SUMS or, without it, from symlinks: the hub's cache names the target by its
    sha256. Raises `RunError` for the first file that differs, is missing or is not recorded, and `UsageError` if
    nothing is recorded.
    """
    listed = folder / SUMS
    weights = sorted(folder.glob("*/*.safetensors"))
    recorded = read_checksums(listed) if os.path.lexists(listed) else read_link_checksums(weights)
    if not recorded:
        raise UsageError(
            f"verify=true: no checksums of the weights in {folder}. If you trust the files, record them:"
            f" (cd {shlex.quote(str(folder))} && sha256sum */*.safetensors > {SUMS}); or use verify=false"
        )
    for path in weights:
        if path not in recorded:
            where = (
                f"not in {listed}"
                if os.path.lexists(listed)
                else "not a symlink to a file named by its sha256, unlike others here"
            )
            raise RunError(f"{path}: cannot be verified: {where}")
    with progress.reading("verifying weights") as tally, ThreadPool() as pool:
        for path in recorded:
            if problem := find_file_problem(path):
                what = problem if os.path.lexists(path) else "missing"
                raise RunError(f"{path}: {what}, but {listed} lists it")
            tally.expect(path.stat().st_size)
        for path, digest in recorded.items():
            pool.start(compare_checksum, path, digest, tally.add)


def read_checksums(path: Path) -> dict[Path, str]:
    """Read `{file: sha256}` from a SHA256SUMS. Raises `UsageError` for malformed lines and paths outside its folder."""
    try:
        text = os.fsdecode(read_file(path, MAX_TEXT_BYTES))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    found = {}
    for number, line in enumerate(text.splitlines(), start=1):
        match = LINE.fullmatch(line)
        if match is None:
            raise UsageError(f"{path}, line {number}: not a sha256 and a file's name, as `sha256sum` writes them")
        name = PurePosixPath(match[2])
        if name.is_absolute() or ".." in name.parts:
            raise UsageError(f"{path}, line {number}: {match[2]!r} is outside this folder")
        found[path.parent / name] = match[1]
    return found


def read_link_checksums(paths: list[Path]) -> dict[Path, str]:
    """Return `{link: sha256}` of the symlinks to files that are named by their sha256."""
    targets = {path: os.path.basename(os.readlink(path)) for path in paths if path.is_symlink()}
    return {path: name for path, name in targets.items() if DIGEST.fullmatch(name)}


def compare_checksum(path: Path, expected: str, count: Callable[[int], None]) -> None:
    """Raise `RunError` for a file that differs or cannot be read. `count` receives the numbers of bytes read."""
    try:
        found = compute_sha256(path, count)
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror}") from None
    if found != expected:
        raise RunError(
            f"{path}: not the file that was recorded: its sha256 is {found}, expected is {expected}."
            " Download or copy it again"
        )
