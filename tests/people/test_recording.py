"""Recordings of logs: their formats, files and times."""

from __future__ import annotations

import gzip
import io
import json
import socket
import struct
from pathlib import Path
from typing import Any

import pytest
from vhost_device_console import monitor
from vhost_device_console.errors import ConsoleError
from vhost_device_console.people import recording
from vhost_device_console.people.cast import Writer
from vhost_device_console.people.recording import (
    Piece,
    Recorder,
    export_log,
    log_pieces,
    parse_time,
    target,
)

S = 1_000_000_000
NOW = parse_time("2026-11-23T12:00:00Z")


def export(path: Path, **span: int) -> tuple[list[Any], int, bool]:
    file = io.BytesIO()
    count, known = export_log(str(path), Writer(file, (0, 0), "x"), **span)
    return [json.loads(line) for line in file.getvalue().splitlines()], count, known


def index(*entries: tuple[int, int, int, int]) -> bytes:
    return b"".join(struct.pack("<4Q", *entry) for entry in entries)


# Logs


def test_a_raw_log_has_the_times_of_its_index(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes("one€two".encode())
    entries = index((0, 5, 100, NOW), (4, 5, 104, NOW + 2 * S))
    (tmp_path / "log.times").write_bytes(entries)
    lines, count, known = export(tmp_path / "log")
    assert lines[1:] == [[0.0, "o", "one"], [2.0, "o", "€two"], [0.0, "x", "0"]]
    assert (count, known) == (9, True)
    assert lines[0]["timestamp"] == NOW // S


def test_a_raw_log_without_times_comes_at_once(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"a" * 100_000)
    lines, count, known = export(tmp_path / "log")
    assert sum(len(line[2]) for line in lines[1:-1]) == count == 100_000
    assert {line[0] for line in lines[1:]} == {0.0}
    assert not known


def test_lines_have_the_times_before_them(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(
        b"2026-11-23T12:00:00.000000Z one\r\n2026-11-23T12:00:01.500000Z two\n"
    )
    lines, _, known = export(tmp_path / "log")
    assert lines[1:-1] == [[0.0, "o", "one\r\n"], [1.5, "o", "two\n"]]
    assert known


def test_objects_have_their_times_bytes_and_gaps(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(
        b'{"time":"2026-11-23T12:00:00.000000Z","offset":0,"text":"a\\n"}\n'
        b'{"time":"2026-11-23T12:00:01.000000Z","offset":7,"missed":5}\n'
        b'{"time":"2026-11-23T12:00:02.000000Z","offset":7,"text":"\xef\xbf\xbd","base64":"4g=="}\n'
        b'{"time":"2026-11-23T12:00:03.000000Z","offset":8,"text":"\xef\xbf\xbd","base64":"gqw="}\n'
        b'{"time":"2026-11-23T12:0'
    )
    lines, _, known = export(tmp_path / "log")
    assert lines[1:-1] == [[0.0, "o", "a\n"], [1.0, "m", "5 bytes missing"], [2.0, "o", "€"]]
    assert known


def test_all_files_are_one_log(tmp_path: Path) -> None:
    (tmp_path / "log.2.gz").write_bytes(gzip.compress(b"first "))
    (tmp_path / "log.2.times").write_bytes(index((0, 5, 0, NOW)))
    (tmp_path / "log.1").write_bytes(b"second ")
    (tmp_path / "log.1.times").write_bytes(index((0, 5, 6, NOW + S)))
    (tmp_path / "log").write_bytes(b"2026-11-23T12:00:05.000000Z third")
    pieces = [*log_pieces(str(tmp_path / "log"))]
    assert pieces == [
        Piece(NOW, b"first "),
        Piece(NOW + S, b"second "),
        Piece(NOW + 5 * S, b"third"),
    ]


def test_a_span_of_a_log(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(
        b"".join(b"2026-11-23T12:00:%02d.000000Z %d\n" % (n, n) for n in range(10))
    )
    lines, count, _ = export(tmp_path / "log", begin=NOW + 3 * S, end=NOW + 5 * S)
    assert [line[2] for line in lines[1:-1]] == ["3\n", "4\n"]
    assert count == 4
    with pytest.raises(ConsoleError, match="log: there is no output in that span"):
        export(tmp_path / "log", begin=NOW + 60 * S)


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConsoleError) as caught:
        export(tmp_path / "log")
    assert str(caught.value) == f"cannot read {tmp_path}/log: no such file or directory"


def test_a_file_that_is_no_gzip_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "log.1.gz").write_bytes(b"what")
    with pytest.raises(ConsoleError, match=f"cannot read {tmp_path}/log.1.gz: not a gzipped file"):
        export(tmp_path / "log")


def test_a_time_that_is_none_is_one_line() -> None:
    with pytest.raises(ConsoleError, match="soon is no time such as"):
        parse_time("soon")


# Files


def test_a_recording_that_is_there_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "x.cast"
    path.write_text("before")
    with (
        pytest.raises(ConsoleError, match="is there already: name another, or say --overwrite"),
        target(str(path), overwrite=False),
    ):
        pass
    assert path.read_text() == "before"
    with target(str(path), overwrite=True) as file:
        file.write(b"after")
    assert path.read_text() == "after"


def test_a_recording_of_nothing_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "x.cast"
    with pytest.raises(ConsoleError), target(str(path), overwrite=False):
        raise ConsoleError("nothing")
    assert not path.exists()


# Journals


def test_a_worker_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    workers: list[socket.socket] = []
    monkeypatch.setattr(monitor, "attach", lambda *given: workers.append(given[-1].dup()))
    monkeypatch.setattr(recording, "ANSWER_WITHIN", 0.01)
    recorder = Recorder(
        "vm3",
        None,
        lambda: "",
        lambda size: Writer(io.BytesIO(), size, "x"),
        follow=False,
    )
    with pytest.raises(ConsoleError, match="vm3 does not answer"):
        recorder.run()
    workers.pop().close()
