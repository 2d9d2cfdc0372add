"""Messages between a driver and the ranks that it started: JSON of any size over a pair of connected sockets.

A pair has no address and no port: only processes that inherit its ends can read or write it.
"""

from __future__ import annotations

import json
import socket
import struct
from typing import Any

#: the number of bytes of a message, sent before it
LENGTH = struct.Struct("!Q")

CHUNK = 2**20


def encode_message(content: Any) -> bytes:
    """Return the bytes of a message: its length, then JSON."""
    body = json.dumps(content).encode()
    return LENGTH.pack(len(body)) + body


def send_message(end: socket.socket, content: Any) -> None:
    """Send a message and wait until all of it is sent. Raises OSError if the other end is closed."""
    end.sendall(encode_message(content))


def receive_message(end: socket.socket) -> Any:
    """Wait for a message and return its content. Raises EOFError if the other end is closed, and OSError."""
    return json.loads(_receive_bytes(end, LENGTH.unpack(_receive_bytes(end, LENGTH.size))[0]))


def _receive_bytes(end: socket.socket, count: int) -> bytes:
    received = bytearray()
    while len(received) < count:
        chunk = end.recv(min(CHUNK, count - len(received)))
        if not chunk:
            raise EOFError
        received += chunk
    return bytes(received)


class MessageBuffer:
    """The driver's end of a pair. It never blocks: one slow rank must not keep the driver from hearing the others."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self.end = end
        #: whether the rank has closed its end
        self.closed = False
        self.unsent = memoryview(b"")
        self.received = bytearray()

    def put(self, message: bytes) -> None:
        """Add an encoded message to those that `send` sends."""
        self.unsent = memoryview(bytes(self.unsent) + message if self.unsent else message)

    def send(self) -> None:
        """Send as much as the rank takes now."""
        try:
            while self.unsent:
                self.unsent = self.unsent[self.end.send(self.unsent) :]
        except BlockingIOError:
            pass
        except OSError:  # the rank has ended; `receive` reads what it said before
            self.unsent = memoryview(b"")

    def receive(self) -> list[Any]:
        """Return the contents of the messages that have arrived completely."""
        try:
            while not self.closed:
                chunk = self.end.recv(CHUNK)
                self.received += chunk
                self.closed = not chunk
        except BlockingIOError:
            pass
        except OSError:
            self.closed = True
        return self._take_messages()

    def _take_messages(self) -> list[Any]:
        contents: list[Any] = []
        start = 0
        while len(self.received) >= start + LENGTH.size:
            end = start + LENGTH.size + LENGTH.unpack_from(self.received, start)[0]
            if len(self.received) < end:
                break
            contents.append(json.loads(self.received[start + LENGTH.size : end]))
            start = end
        del self.received[:start]
        return contents
