"""Processes that confine themselves: forked, asked, and always gone afterwards."""

from __future__ import annotations

import os
import pickle
import socket
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple


class Died(NamedTuple):
    """How a child ended that returned nothing."""

    signal: int


def in_child(work: Callable[[], Any]) -> Any:
    """Return what `work` returns in a forked child, or the signal that it died of.

    What it raises fails the test, but OSError, which is returned.
    """
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        try:
            try:
                result = work()
            except OSError as error:
                result = error
            with open(write, "wb") as pipe:
                pickle.dump(result, pipe)
            os._exit(0)
        except BaseException:
            os.write(2, traceback.format_exc().encode())
            os._exit(1)
    os.close(write)
    with open(read, "rb") as pipe:
        data = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code < 0:
        return Died(-code)
    assert code == 0, "see what the child wrote to stderr"
    return pickle.loads(data)


def status() -> dict[str, str]:
    """Return /proc/self/status."""
    with open("/proc/self/status") as file:
        return {key: value.strip() for key, _, value in (line.partition(":") for line in file)}


def loopback() -> bytes:
    """Return what went over a TCP connection to itself."""
    with socket.socket() as listener, socket.socket() as ours:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        ours.connect(listener.getsockname())
        theirs, _ = listener.accept()
        with theirs:
            ours.sendall(b"over TCP")
            return theirs.recv(100)
