"""What another user of this machine reaches. Needs the rights of root."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

NOBODY = 65534


def try_to_open(paths: Sequence[str], user: int = 0) -> list[int]:
    """Open the files and list the folders, in a child process of this user; return the error numbers, 0 for none."""
    reader, writer = os.pipe()
    if not (child := os.fork()):
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
        os.write(writer, bytes(open_path(path) for path in paths))
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader, "rb") as found:
        return list(found.read())


def open_path(path: str) -> int:
    """Open a file, or list a folder; return the error number, 0 for none."""
    try:
        return os.listdir(path) is None if os.path.isdir(path) else os.close(os.open(path, os.O_RDWR)) or 0
    except OSError as error:
        return error.errno or 0


def list_listening_ports(pid: int) -> list[str]:
    """Return the TCP addresses at which a process listens, as in /proc/net/tcp."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            inodes |= set(re.findall(r"socket:\[(\d+)\]", os.readlink(link)))
    table = Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
    lines = [line.split() for line in table.splitlines()]
    return [line[1] for line in lines if line[3] == "0A" and line[9] in inodes]
