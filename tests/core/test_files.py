"""Only regular files of bounded size are read, and what is none is told at once instead of waited for."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import socket
import stat

import pytest

from hydrarun.core import files
from hydrarun.core.files import compute_sha256, find_file_problem, open_file, open_lock, read_file
from hydrarun.core.resources import PACKAGE


def make_socket(path):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(os.path.relpath(path))  # the address is limited to about 100 characters
    listener.close()


#: what stands in a file's place, and the reason that is given
NO_FILES = {
    "a folder": (os.mkdir, "a folder, not a file"),
    "a pipe": (os.mkfifo, "a pipe, not a regular file"),
    "a socket": (make_socket, "not a regular file"),
    "an endless device": (lambda path: os.symlink("/dev/zero", path), "a device, not a regular file"),
    "an empty device": (lambda path: os.symlink("/dev/null", path), "a device, not a regular file"),
    "a link loop": (lambda path: os.symlink(path, path), "Too many levels of symbolic links"),
    "a link to a pipe": (lambda path: (os.mkfifo(f"{path}.pipe"), os.symlink(f"{path}.pipe", path)), "a pipe, "),
    "nothing": (lambda path: None, "No such file or directory"),
    "a link to nothing": (lambda path: os.symlink(f"{path}.gone", path), "No such file or directory"),
}


@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize("read", [open_file, lambda path: read_file(path, 10), compute_sha256, find_file_problem])
def test_what_is_no_file_is_told(kind, read, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, reason = NO_FILES[kind]
    make(tmp_path / "x")
    if read is find_file_problem:
        assert read(tmp_path / "x").startswith(reason)
        return
    with pytest.raises(OSError, match=r"Errno") as caught:
        read(tmp_path / "x")
    assert caught.value.strerror.startswith(reason)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("x" * 300, "File name too long"), ("a\0b", "embedded null byte"), ("file/below", "Not a directory")],
    ids=["long", "null", "below a file"],
)
def test_names_that_no_file_has(name, reason, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    assert find_file_problem(f"{tmp_path}/{name}") == reason


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_missing_permission(tmp_path):
    (tmp_path / "x").touch(0)
    assert find_file_problem(tmp_path / "x") == "Permission denied"


def test_a_file_of_at_most_so_many_bytes(tmp_path):
    file = tmp_path / "x"
    file.write_bytes(b"12345")
    assert read_file(file, 5) == b"12345"
    assert find_file_problem(file) is None
    with pytest.raises(OSError, match="larger than 4 bytes"):
        read_file(file, 4)
    with file.open("wb") as opened:
        opened.truncate(8 * 2**30)
    with pytest.raises(OSError, match="larger than 1000 bytes"):
        read_file(file, 1000)


def test_a_file_without_a_size_is_bounded_too():
    """Files of the kernel are regular and say 0 bytes."""
    assert os.path.getsize("/proc/self/status") == 0
    with pytest.raises(OSError, match="larger than 10 bytes"):
        read_file("/proc/self/status", 10)


def test_an_opened_file_is_not_inherited(tmp_path):
    (tmp_path / "x").touch()
    with open_file(tmp_path / "x") as opened:
        assert fcntl.fcntl(opened, fcntl.F_GETFD) & fcntl.FD_CLOEXEC


def test_a_link_to_a_file_is_a_file(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("x")
    counted: list[int] = []
    assert compute_sha256(tmp_path / "link", counted.append) == hashlib.sha256(b"abc").hexdigest()
    assert counted == [3]


def test_a_file_that_is_exchanged_while_it_is_opened(tmp_path, monkeypatch):
    """The opened file is checked, not its name."""
    (tmp_path / "x").touch()
    os.mkfifo(tmp_path / "pipe")
    own = os.open
    monkeypatch.setattr(files.os, "open", lambda path, *rest: own(tmp_path / "pipe", *rest))
    assert find_file_problem(tmp_path / "x") == "a pipe, not a regular file"


def test_a_lock_keeps_the_content(tmp_path):
    (tmp_path / "lock").write_bytes(b"mine")
    open_lock(tmp_path / "lock").close()
    assert (tmp_path / "lock").read_bytes() == b"mine"
    open_lock(tmp_path / "new").close()
    assert stat.S_ISREG((tmp_path / "new").stat().st_mode)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="a pipe, not a regular file"):
        open_lock(tmp_path / "pipe")


#: calls that read a file by themselves, and the modules that may: they read what the package ships, or what is no file
READS = re.compile(r"\bopen\(|\.read_text\(|\.read_bytes\(|json\.loads?\(|yaml\.(safe_)?load\(")
OWN = {
    "core/files.py": "is the one place",
    "core/interruption.py": "the null device",
    "core/strict_json.py": "is the one parser",
    "core/strict_yaml.py": "is the one parser",
    "core/resources.py": "conf/",
    "core/moved_names.py": "the package's table",
    "config/options.py": "conf/",
    "config/targets.py": "conf/",
    "cli/commands/list.py": "conf/",
    "cli/recipe/json_schema.py": "conf/",
    "config/model_choice.py": "published shapes",
    "engine/plan/devices.py": "the package's table",
    "engine/plan/out_of_memory.py": "a process of its own",
    "engine/plan/__main__.py": "a process of its own",
    "engine/ranks/messages.py": "messages of the driver and its ranks",
    "engine/ranks/torchrun.py": "messages of the ranks",
    "pipeline/truncation.py": "messages of the ranks",
    "outputs/report/page.py": "the page's template",
    "outputs/provenance.py": "/proc",
    "outputs/journal.py": "appends, and copies a value",
    "outputs/media/mp4.py": "a file that it wrote, and libav on an opened file",
    "outputs/media/wav.py": "libav on an opened file",
    "outputs/media/png.py": "Pillow on an opened file",
    "outputs/media/images.py": "Pillow on an opened file",
    "outputs/report/thumbnails.py": "libav on memory",
}


def test_files_are_opened_at_one_place():
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if READS.search(path.read_text(encoding="utf-8"))
    }
    assert found - OWN.keys() == set()
