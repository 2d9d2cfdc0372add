"""Verifies a checkpoint's files against recorded checksums before they are loaded: weights, configs and tokenizers."""

from __future__ import annotations

import errno
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from hydrarun.core.errors import RunError, UsageError
from hydrarun.core.files import MAX_TEXT_BYTES, compute_git_sha1, compute_sha256, find_file_problem, read_file
from hydrarun.core.progress import Progress
from hydrarun.core.threads import ThreadPool

#: checksums of a folder, in the format of `sha256sum`
SUMS = "SHA256SUMS"
LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")
#: how the hub's cache names a file: a large one by its sha256, a small one by the hash that git gives it
SHA256, GIT_SHA1 = 64, 40
DIGEST = re.compile(rf"[0-9a-f]{{{SHA256}}}|[0-9a-f]{{{GIT_SHA1}}}")

#: the settings that loaders read next to the weights: configs, indices, tokenizers, chat templates
SETTINGS = ("*.json", "*.txt", "*.model", "*.jinja")
#: depths of the files that loaders read: the checkpoint's own, its components', and templates of a tokenizer
DEPTHS = ("", "*/", "*/*/")

#: records every file of the current folder
RECORD = f"find -L . -type f -not -path '*/.*' -not -name {SUMS} -exec sha256sum {{}} + > {SUMS}"


def verify_checksums(folder: Path, progress: Progress) -> None:
    """Compare every recorded file with its checksum. All files of `folder` that a loader reads must be recorded.

    Checksums come from the folder's SHA256SUMS or, without it, from symlinks: the hub's cache names the targets by
    their hashes. Raises `RunError` for the first file that differs, is missing or is not recorded, and `UsageError` if
    nothing is recorded.
    """
    listed = folder / SUMS
    files = list_read_files(folder)
    recorded = read_checksums(listed) if os.path.lexists(listed) else read_link_checksums(files)
    how = f"record the files: (cd {shlex.quote(str(folder))} && {RECORD})"
    if not recorded:
        raise UsageError(
            f"verify=true: no checksums of the files in {folder}. If you trust them, {how}; or use verify=false"
        )
    for path in files:
        if path not in recorded:
            where = (
                f"not in {listed}. If you trust it, {how}"
                if os.path.lexists(listed)
                else "not a symlink to a file named by its hash, unlike others here"
            )
            raise RunError(f"{path}: cannot be verified: {where}")
    with progress.reading("verifying files") as tally, ThreadPool() as pool:
        for path in recorded:
            if problem := find_file_problem(path):
                what = "missing" if problem == os.strerror(errno.ENOENT) else problem
                raise RunError(f"{path}: {what}, but {listed if os.path.lexists(listed) else 'a link'} names it")
            tally.expect(path.stat().st_size)
        for path, digest in recorded.items():
            pool.start(compare_checksum, path, digest, tally.add)


def list_read_files(folder: Path) -> list[Path]:
    """Return the files of a checkpoint that loaders read, in folders that are links too, but not in hidden ones."""
    patterns = [depth + name for depth in DEPTHS for name in ("*.safetensors", *SETTINGS)]
    found = {path for pattern in patterns for path in folder.glob(pattern)}
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))


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
    """Return `{link: hash}` of the symlinks to files that are named by their hash."""
    targets = {path: os.path.basename(os.readlink(path)) for path in paths if path.is_symlink()}
    return {path: name for path, name in targets.items() if DIGEST.fullmatch(name)}


def compare_checksum(path: Path, expected: str, count: Callable[[int], None]) -> None:
    """Raise `RunError` for a file that differs or cannot be read. `count` receives the numbers of bytes read."""
    name, compute = ("sha256", compute_sha256) if len(expected) == SHA256 else ("git hash", compute_git_sha1)
    try:
        found = compute(path, count)
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror}") from None
    if found != expected:
        raise RunError(
            f"{path}: not the file that was recorded: its {name} is {found}, expected is {expected}."
            " Download or copy it again"
        )
