"""Messages of any size, whoever reads slowly, and ends that close."""

from __future__ import annotations

import socket
import threading

import pytest

from hydrarun.engine.ranks.messages import LENGTH, MessageBuffer, encode_message, receive_message, send_message

LARGE = "x" * 9 * 2**20


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield MessageBuffer(ours), theirs


def test_large_messages_pass_in_both_directions_at_once(pair):
    buffer, theirs = pair
    received = []

    def rank() -> None:
        send_message(theirs, LARGE)  # before it reads
        received.extend(receive_message(theirs) for _ in range(2))

    thread = threading.Thread(target=rank)
    thread.start()
    buffer.put(encode_message({"job": LARGE}))
    buffer.send()
    assert len(buffer.unsent) > 2**20  # more than the pair holds, and `send` has not waited
    buffer.put(encode_message(None))
    heard: list = []
    while thread.is_alive():
        buffer.send()
        heard += buffer.receive()
    assert heard == [LARGE]
    assert received == [{"job": LARGE}, None]


def test_messages_come_whole_however_they_are_cut(pair):
    buffer, theirs = pair
    sent = [{"a": [1, None, "一只猫"]}, None, [], "", LARGE[:1000]]
    whole = b"".join(map(encode_message, sent))
    heard = []
    for start in range(0, len(whole), 7):
        theirs.sendall(whole[start : start + 7])
        heard += buffer.receive()
    assert heard == sent
    assert not buffer.closed


@pytest.mark.parametrize("rest", [b"", b"\0\0", LENGTH.pack(5), LENGTH.pack(5) + b"nul"])
def test_half_a_message_is_none(pair, rest):
    """A rank was killed while it wrote."""
    buffer, theirs = pair
    theirs.sendall(encode_message(1) + rest)
    theirs.close()
    assert buffer.receive() == [1]
    assert buffer.closed
    buffer.put(encode_message(LARGE))
    buffer.send()
    assert not buffer.unsent  # there is nobody to send it to


@pytest.mark.parametrize("rest", [b"", b"\0\0", LENGTH.pack(5), LENGTH.pack(5) + b"nul"])
def test_a_rank_notices_that_its_driver_has_ended(pair, rest):
    buffer, theirs = pair
    buffer.end.sendall(encode_message(1) + rest)
    buffer.end.close()
    assert receive_message(theirs) == 1
    with pytest.raises(EOFError):
        receive_message(theirs)
