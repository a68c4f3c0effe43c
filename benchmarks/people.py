"""Measure what people notice: `make bench-people`.

How long `attach` takes to its first byte, a key to its echo by each way in, and what a page that
watches costs the guest. Everything is interleaved, and the medians of all rounds are written into
README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import pty
import select
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tty
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from websockets.sync.client import ClientConnection, connect

import report
from daemons import (
    PATIENCE,
    BenchmarkError,
    Daemon,
    Side,
    find_ours,
    find_peer,
    on,
    running,
    version,
)
from run import BUILD, Bench, Layout, Others, compile_frontend, describe_machine, pin, where

README = Path(__file__).resolve().parent / "README.md"
MARKS = ("<!-- people: written by benchmarks/people.py, not by hand -->", "<!-- end of people -->")

#: Bytes of history that a new reader is shown first.
HISTORY = 1 << 16

#: Keys in a round, and seconds between two of them, as people type them at best.
KEYS, PAUSE = 40, 0.02

#: What a guest writes that is watched: 20 MiB/s, in 4 KiB blocks.
RATE, BLOCK = 20 << 20, 4096

Numbers = dict[str, list[float]]


# Attaching


def first_byte(daemon: Daemon, command: list[str]) -> float:
    """Return the milliseconds from the start of `command` to the first byte that it prints."""
    began = time.monotonic()
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=daemon.environment,
    ) as process:
        assert process.stdout is not None
        try:
            if not select.select([process.stdout], [], [], PATIENCE)[0]:
                raise BenchmarkError(f"{command[0]} prints nothing")
            took = time.monotonic() - began
            if not os.read(process.stdout.fileno(), 1):
                raise BenchmarkError(f"{command[0]} ends without a byte")
        finally:
            process.kill()
    return 1000 * took


def measure_attach(daemon: Daemon, found: Numbers) -> None:
    """Attach with a new process, and without one; start one that does nothing else."""
    attach = [daemon.side.program, "attach", "--quiet", "--read-only"]
    found["attach"].append(first_byte(daemon, attach))
    python = [sys.executable, "-c", "print(end='x', flush=True); input()"]
    found["python alone"].append(first_byte(daemon, python))
    from vhost_device_console import monitor
    from vhost_device_console.people.link import Link

    began = time.monotonic()
    (path,) = monitor.find({"XDG_RUNTIME_DIR": daemon.environment["XDG_RUNTIME_DIR"]})
    (guest,) = monitor.ask(path).guests
    link = Link(monitor.Attach(guest=guest.name, name="benchmark", write=False))
    link.connect(path)
    try:
        while not any(isinstance(event, memoryview) for event in link.receive()):
            select.select([link.fileno()], [], [], PATIENCE)
        found["attach, once it runs"].append(1000 * (time.monotonic() - began))
    finally:
        link.close()


# Keys


@contextmanager
def page(daemon: Daemon, cpus: set[int]) -> Iterator[ClientConnection]:
    """Give a WebSocket as the page has it, open to the only guest's console."""
    with on(cpus):
        process = subprocess.Popen(
            [daemon.side.program, "web", "--listen", "127.0.0.1:0", "--json"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            env=daemon.environment,
        )
    with process:
        try:
            assert process.stdout is not None
            said = json.loads(process.stdout.readline())
            parts = urlsplit(said["url"])
            origin = f"http://{parts.netloc}"
            request = urllib.request.Request(
                f"{origin}/login", json.dumps({"token": said["token"]}).encode(), {"Origin": origin}
            )
            with urllib.request.urlopen(request) as answer:
                cookie = answer.headers["Set-Cookie"].split(";")[0]
            with connect(
                f"ws://{parts.netloc}/guests",
                origin=origin,  # type: ignore[arg-type]
                additional_headers={"Cookie": cookie},
            ) as guests:
                guest = json.loads(guests.recv(PATIENCE))["changed"][0]["id"]
            with connect(
                f"ws://{parts.netloc}/console",
                origin=origin,  # type: ignore[arg-type]
                additional_headers={"Cookie": cookie},
                compression=None,
                max_size=None,
            ) as console:
                console.send(
                    json.dumps(
                        {"type": "open", "guest": guest, "port": "0", "columns": 80, "rows": 24}
                    )
                )
                yield console
        finally:
            process.terminate()


class Web:
    """Keys through a page's WebSocket."""

    def __init__(self, console: ClientConnection) -> None:
        self._console = console
        self._shown = 0

    def type(self, data: bytes) -> None:
        """Send keys."""
        self._console.send(data)

    def read(self, within: float) -> bytes:
        """Return output, b"" when none comes."""
        deadline = time.monotonic() + within
        while True:
            try:
                message = self._console.recv(max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                return b""
            if isinstance(message, bytes):
                self._shown += len(message) - 8
                self._console.send(json.dumps({"type": "shown", "count": self._shown}))
                return message[8:]


class Descriptor:
    """Keys through anything that has a descriptor."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def type(self, data: bytes) -> None:
        """Send keys."""
        os.write(self._fd, data)

    def read(self, within: float) -> bytes:
        """Return output, b"" when none comes."""
        if not select.select([self._fd], [], [], within)[0]:
            return b""
        return os.read(self._fd, 1 << 16)


def echoes(way: Web | Descriptor, patience: float = PATIENCE) -> list[float]:
    """Return the milliseconds that each key takes until its echo is here."""
    while way.read(0.3):  # history, prompts
        pass
    took = []
    for _ in range(KEYS):
        time.sleep(PAUSE)
        began = time.monotonic()
        way.type(b"x")
        while not (seen := way.read(patience)).endswith(b"x"):
            if not seen:
                raise BenchmarkError("a key has no echo")
        took.append(1000 * (time.monotonic() - began))
    way.type(b"\x15")  # the shell forgets the line
    return took


@contextmanager
def terminal(daemon: Daemon) -> Iterator[Descriptor]:
    """Give `attach` in a terminal."""
    outer, inner = pty.openpty()
    tty.setraw(outer)
    process = subprocess.Popen(
        [daemon.side.program, "attach", "--quiet", "--force"],
        stdin=inner,
        stdout=inner,
        stderr=inner,
        env=daemon.environment,
    )
    os.close(inner)
    try:
        yield Descriptor(outer)
    finally:
        process.kill()
        process.wait()
        os.close(outer)


@contextmanager
def plain(daemon: Daemon) -> Iterator[Descriptor]:
    """Give a connection to the guest's TCP port."""
    with socket.create_connection(("127.0.0.1", daemon.port), PATIENCE) as sock:
        yield Descriptor(sock.fileno())


@contextmanager
def shell(daemon: Daemon) -> Iterator[Descriptor]:
    """Have the package's mock guest, a shell, at the daemon's socket; give a client at its prompt.

    The peer serves no second client after it.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "vhost_device_console.testing.guest", f"{daemon.socket}0"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        with plain(daemon) as client:
            seen = b""
            while b"mock-guest# " not in seen:
                if not (data := client.read(PATIENCE)):
                    raise BenchmarkError("the mock guest does not come up")
                seen += data
            yield client
    finally:
        process.terminate()
        process.wait(PATIENCE)


def measure_keys(bench: Bench, found: Numbers) -> None:
    """Type keys at each way in, one after the other, to ours and to the peer."""
    for name, side in bench.sides.items():
        with running(side, bench.folder, 1, bench.layout.every) as daemon, shell(daemon) as way:
            try:
                found[f"tcp, {name}"] += echoes(way, PATIENCE if name == "ours" else 2.0)
            except BenchmarkError:
                if name == "ours":
                    raise
                print(f"{name} echoes no more", flush=True)  # that is known of it
            if name == "ours":
                with terminal(daemon) as way:
                    found["attach in a terminal"] += echoes(way)
                with page(daemon, bench.layout.every) as console:
                    found["page"] += echoes(Web(console))


def measure_first_bytes(bench: Bench, found: Numbers) -> None:
    """Attach to a guest whose history is HISTORY bytes long."""
    side = bench.sides["ours"]
    with running(side, bench.folder, 1, bench.layout.every) as daemon, shell(daemon) as client:
        client.type(f"head -c {HISTORY} /dev/zero | tr '\\0' x\r".encode())
        count = 0
        while count < HISTORY:
            count += len(client.read(PATIENCE))
        for _ in range(5):
            measure_attach(daemon, found)


# Watching


def watch(console: ClientConnection, seen: list[int], over: threading.Event) -> None:
    """Show all that comes, as a page does; `seen` is how many bytes, and how many were missed."""
    offset = None
    told = 0
    while not over.is_set():
        try:
            message = console.recv(0.2)
        except TimeoutError:
            continue
        if isinstance(message, bytes):
            (at,) = struct.unpack_from("<Q", message)
            if offset is not None:
                seen[1] += at - offset
            offset = at + len(message) - 8
            seen[0] += len(message) - 8
            if seen[0] - told >= 1 << 14:
                told = seen[0]
                console.send(json.dumps({"type": "shown", "count": told}))


def measure_watching(bench: Bench, seconds: float, found: Numbers) -> None:
    """Let a guest write 20 MiB/s, with a page that watches and without."""
    side = bench.sides["ours"]
    for name in ("alone", "watched"):
        with ExitStack() as stack:
            daemon = stack.enter_context(running(side, bench.folder, 1, bench.layout.daemon))
            seen, over = [0, 0], threading.Event()
            if name == "watched":
                console = stack.enter_context(page(daemon, bench.layout.daemon))
                with on(bench.layout.daemon):
                    watcher = threading.Thread(target=watch, args=(console, seen, over))
                    watcher.start()
                stack.callback(watcher.join)
                stack.callback(over.set)
            load = ["load", "--guests=1", f"--rate={RATE}", f"--size={BLOCK}", *where(daemon)]
            record = bench.run(load, seconds)
            if "error" in record or record["lost"] or record["wrong"]:
                raise BenchmarkError(f"a guest that writes: {record}")
            count = float(record["bytes"])
            found[f"{name} MiB/s"].append(count / float(record["seconds"]) / (1 << 20))
            found[f"{name} held, %"].append(100 * float(record["held"]) * BLOCK / RATE / seconds)
            found[f"{name} late_ms"].append(float(record["late_ms"]))
            if name == "watched":
                found["watched of it, %"].append(100 * seen[0] / count)


# The report

#: What is shown, what it is called in the numbers, its unit, and what it is to be below.
ROWS = (
    ("`attach`, from the command to its first byte", "attach", "ms", 50.0),
    ("… of which Python's own start", "python alone", "ms", None),
    ("… from its first question to its first byte", "attach, once it runs", "ms", None),
    ("a key to its echo: on the page", "page", "ms", 10.0),
    ("… in a terminal with `attach`", "attach in a terminal", "ms", None),
    ("… over plain TCP", "tcp, ours", "ms", None),
    ("… over plain TCP, the Rust peer", "tcp, peer", "ms", None),
    ("what a guest that means to write 20 MiB/s can write", "alone MiB/s", "MiB/s", None),
    ("… while a page watches", "watched MiB/s", "MiB/s", None),
    ("… of which the page shows", "watched of it, %", "%", None),
    ("its writes that had to wait", "alone held, %", "%", None),
    ("… while a page watches", "watched held, %", "%", None),
    ("the longest from a write to its arrival at the TCP client", "alone late_ms", "ms", None),
    ("… while a page watches", "watched late_ms", "ms", None),
)


def table(found: Numbers, missing: str) -> str:
    """Return the medians as Markdown; `missing` stands where there are none."""
    lines = ["|  | median | lowest to highest | wanted |", "| --- | --- | --- | --- |"]
    for name, key, unit, limit in ROWS:
        values = found.get(key)
        if not values:
            lines.append(f"| {name} | {missing} |  |  |")
            continue
        middle = statistics.median(values)
        wanted = "" if limit is None else f"< {limit:g}: {'' if middle < limit else 'NOT '}reached"
        spread = f"{min(values):.3g} to {max(values):.3g}"
        lines.append(f"| {name} | {middle:.3g} {unit} | {spread} | {wanted} |")
    pairs = zip(found["watched MiB/s"], found["alone MiB/s"], strict=True)
    ratio = statistics.median(watched / alone for watched, alone in pairs)
    lines.append(f"| the guest's speed while a page watches, of that without | {ratio:.3f} | | |")
    return "\n".join(lines) + "\n"


def measure(bench: Bench, rounds: int, seconds: float) -> Numbers:
    """Return all that was measured, in so many rounds."""
    names = [key for _, key, _, _ in ROWS]
    found: Numbers = {name: [] for name in names}
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", flush=True)
        measure_first_bytes(bench, found)
        measure_keys(bench, found)
        measure_watching(bench, seconds, found)
    return found


def main() -> None:
    """Measure, print the table, and write it where it belongs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", help="the Rust vhost-device-console")
    parser.add_argument("--quick", action="store_true", help="one round; writes nothing")
    options = parser.parse_args()
    rounds, seconds = (1, 2.0) if options.quick else (7, 4.0)
    BUILD.mkdir(parents=True, exist_ok=True)
    begin, others = time.monotonic(), Others()
    layout: Layout = pin()
    os.sched_setaffinity(0, layout.every)
    try:
        sides = {"ours": Side(find_ours(), {})}
        if (peer := find_peer(options.peer, BUILD)) is not None:
            sides["peer"] = Side(peer, {})
        with tempfile.TemporaryDirectory(prefix="vdc", dir="/tmp") as folder:
            bench = Bench(compile_frontend(), sides, layout, Path(folder))
            found = measure(bench, rounds, seconds)
    except BenchmarkError as error:
        sys.exit(f"people.py: {error}")
    results: report.Results = {
        "versions": {name: version(side) for name, side in sides.items()},
        "machine": describe_machine(layout) | {"others_percent": round(others.percent(), 1)},
        "rounds": rounds,
        "quick": options.quick,
        "took_s": time.monotonic() - begin,
        "cells": {},
    }
    pinned = "What a page costs: the guest ran on one CPU, its daemon and the page on another."
    rows = table(found, "no echo" if "peer" in sides else "not measured")
    text = f"{report.circumstances(results, pinned)}\n\n{rows}"
    print(text)
    if not options.quick:
        report.rewrite(README, MARKS, text)


if __name__ == "__main__":
    main()
