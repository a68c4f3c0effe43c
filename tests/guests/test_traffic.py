"""What is typed and what is printed arrives once, in order, unchanged."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest
from console import BACKENDS, PROMPT, Console, Place
from uml import StartGuest

from launch import Daemon

pytestmark = pytest.mark.guest


def digest(data: bytes) -> bytes:
    return hashlib.sha256(data).hexdigest().encode()


@pytest.mark.parametrize("gap", [0, 0.003], ids=["0 ms", "3 ms"])
def test_a_typed_line_arrives_as_typed(
    a_kernel: Path, gap: float, place: Place, boot: StartGuest
) -> None:
    daemon, console = place("network")
    boot(a_kernel, daemon.sockets[0])
    console.until(PROMPT)
    line = b"".join(b"%d-" % number for number in range(200))
    console.send(b"echo 'be''gin'; cat\n")
    console.until(rb"begin\r\n")
    console.type(line + b"\n", gap)
    assert console.until(rb"\r\n") == line, "the echo"
    assert console.until(rb"\r\n") == line, "what cat read"


def test_64_kib_of_text_can_be_pasted(kernel: Path, place: Place, boot: StartGuest) -> None:
    daemon, console = place("network")
    boot(kernel, daemon.sockets[0])
    console.until(PROMPT)
    text = b"".join(b"%063d\n" % number for number in range(1024))
    console.send(b"echo 'be''gin'; cat > f; sha256sum f\n")
    console.until(rb"begin\r\n")
    console.send(text + b"\x04")
    assert console.until(rb"  f\r\n") == text.replace(b"\n", b"\r\n") + digest(text)


def test_64_kib_of_binary_can_be_pasted(a_kernel: Path, place: Place, boot: StartGuest) -> None:
    daemon, console = place("network")
    boot(a_kernel, daemon.sockets[0])
    console.until(PROMPT)
    # Ctrl-O steers the kernel itself where the console is also printk's (hvc_poll).
    data = random.Random(64).randbytes(1 << 16).replace(b"\x0f", b"\x0e")
    console.send(b"stty raw -echo; echo 'be''gin'; head -c 65536 > f; sha256sum f\n")
    console.until(rb"begin\n")
    console.send(data)
    assert console.until(rb"  f\n") == digest(data)


def print_5_mib(kernel: Path, daemon: Daemon, console: Console, boot: StartGuest) -> None:
    boot(kernel, daemon.sockets[0])
    console.until(PROMPT)
    console.run(b"dd if=/dev/urandom of=f bs=65536 count=80 2> /dev/null; stty raw")
    expected = console.run(b"sha256sum < f").split()[0]
    console.send(b"echo 'be''gin'; cat f\n")
    console.until(rb"begin\n")
    assert digest(console.take(5 << 20)) == expected
    console.until(PROMPT)


def test_5_mib_of_output_arrive_unchanged(kernel: Path, place: Place, boot: StartGuest) -> None:
    print_5_mib(kernel, *place("network"), boot)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_5_mib_of_output_arrive_unchanged_through(
    backend: str, a_kernel: Path, place: Place, boot: StartGuest
) -> None:
    print_5_mib(a_kernel, *place(backend), boot)
