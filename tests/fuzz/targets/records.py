"""What processes of this daemon, and who uses it, tell one another: any bytes in its place.

Requests at the monitor socket, answers from there, a worker's health, and configuration files.
"""

from __future__ import annotations

import os
import selectors
from collections.abc import Iterable

import msgspec
from source import Source
from vhost_device_console import config, health, monitor, reception
from vhost_device_console.errors import ConfigError, ConsoleError


def _answer(request: monitor.Request, _fds: list[int]) -> monitor.Status | monitor.Done:
    if isinstance(request, monitor.StatusRequest):
        return monitor.Status(version="0", guests=[])
    raise ConsoleError(f"no {request}")


_nobody = os.eventfd(0, os.EFD_CLOEXEC)
_server = reception.Server(selectors.DefaultSelector(), _nobody, _answer)
_replies: msgspec.json.Decoder[monitor.Reply] = msgspec.json.Decoder(monitor.Reply)


def _request(data: bytes) -> None:
    line = data.replace(b"\n", b" ")
    reply = _server._reply(bytearray(line), [])  # noqa: SLF001
    assert reply.endswith(b"\n")
    assert reply.count(b"\n") == 1
    decoded = _replies.decode(reply)
    if isinstance(decoded, monitor.Failure):
        assert decoded.message.isprintable()


def _health(data: bytes) -> None:
    """The first byte says in what pieces the rest comes, and whether it is in a frame already."""
    how, frame = data[0] if data else 0, data[1:]
    if how & 1:
        frame = len(frame).to_bytes(4, "little") + frame
    decoder = health.Decoder()
    piece = (how >> 1) + 1
    found = []
    try:
        for at in range(0, len(frame), piece):
            found += decoder.feed(frame[at : at + piece])
    except UnicodeError:
        raise AssertionError("an error in Python's words") from None
    except ValueError:
        pass  # the records before it count
    for record in found:
        assert [*health.Decoder().feed(health.encode(record))] == [record]


def _config(data: bytes) -> None:
    said = ""
    try:
        assert config.from_toml(data, "fuzz.toml").guests
    except ConfigError as error:
        said = str(error)
    assert "\n" not in said


_KINDS = [_request, _health, _config]


def run(data: bytes) -> None:
    """The first byte chooses what the others are."""
    source = Source(data)
    source.pick(_KINDS)(source.rest())


_TOML = b"""
user = "x"
[[guest]]
socket = "/run/a"
name = "a"
resize-order = "linux-legacy"
max-queue-size = 256
[[guest.port]]
name = "p"
backend = "network"
tcp-port = 1234
stall-ms = 9
[[guest.port]]
name = "q"
backend = "unix"
path = "/run/q"
overflow = "block"
log = "/var/log/q"
"""


def seeds() -> Iterable[bytes]:
    for request in (
        b'{"type":"status"}',
        b'{"type":"port-remove","guest":"a","port":"1"}',
        b'{"type":"resize","guest":"a","port":"0","columns":80,"rows":24}',
        b'{"type":"port-add","guest":"a","port":{"name":"b","backend":"network","tcp-port":7}}',
        b'{"type":"status","more":' + b"[" * 2000,
        b'{"type":"\x80"}',
    ):
        yield b"\0" + request
    port = health.PortHealth(id=1, name="a")
    frame = health.encode(health.Health(frontend=5, ports=[port]))
    yield b"\1\xfe" + frame * 2
    yield b"\1\4" + frame
    yield b"\1\xff" + frame[4:]
    yield b"\1\xff" + b"\xdc\xff\xff\xc0" + bytes(7) + b"\x90\xc0" + b"\x91" * 2000
    yield b"\2" + _TOML
    yield b"\2a = " + b"[" * 3000
