"""Metrics of real daemons, asked for as Prometheus does."""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from scene import attach, boot, converse

from conftest import StartDaemon
from launch import COMMAND, WITHIN, Daemon, command, environment, until, wait_readable

PREFIX = "vhost_device_console_"


@contextmanager
def metrics(folder: Path, *options: str, **env: str) -> Iterator[str]:
    """Serve metrics of the daemons in `folder`; give where. They must end as they are told."""
    with subprocess.Popen(
        [*COMMAND, "metrics", *options],
        env=environment(folder, **env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            wait_readable(process.stdout.fileno(), time.monotonic() + WITHIN, "it says nothing")
            yield process.stdout.readline().strip()
        finally:
            process.terminate()
            _, said = process.communicate(timeout=WITHIN)
        assert (process.returncode, said) == (0, "")


class Connection(http.client.HTTPConnection):
    """A connection to where `metrics` said that it listens."""

    def __init__(self, where: str) -> None:
        host, _, port = where.removeprefix("http://").removesuffix("/metrics").rpartition(":")
        self._path = where.removeprefix("unix:") if where.startswith("unix:") else None
        super().__init__(host.strip("[]"), int(port) if port.isdecimal() else 80, timeout=WITHIN)

    def connect(self) -> None:
        if self._path is None:
            super().connect()
        else:
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.connect(self._path)


def scrape(where: str, path: str = "/metrics") -> str:
    connection = Connection(where)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        assert answer.status == 200
        return answer.read().decode()
    finally:
        connection.close()


def value(text: str, name: str, **labels: str) -> float:
    """Return the sum of the samples of that name which have these labels."""
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == PREFIX + name and labels.items() <= sample.labels.items()
    )


Counters = dict[tuple[str, str], float]


def counters(text: str) -> Counters:
    """Return everything that only ever grows."""
    return {
        (sample.name, str(sample.labels)): sample.value
        for family in text_string_to_metric_families(text)
        if family.type in ("counter", "histogram")
        for sample in family.samples
    }


def gone_back(before: Counters, after: Counters) -> dict[tuple[str, str], tuple[float, float]]:
    """Return what is less than it was, or not there any more."""
    return {
        name: (count, after.get(name, -1.0))
        for name, count in before.items()
        if after.get(name, -1.0) < count
    }


@pytest.fixture
def served(daemon: StartDaemon) -> Daemon:
    return daemon("unix")


def test_a_scrape_counts_what_went_each_way(served: Daemon) -> None:
    with metrics(served.folder, "--listen", "127.0.0.1:0") as where:
        with boot(served) as console, attach(served) as peer:
            converse(console, peer)

            def both() -> bool:
                text = scrape(where)
                return (
                    value(text, "port_output_bytes_total", guest="c.sock0", port="console0"),
                    value(text, "port_input_bytes_total", guest="c.sock0", port="console0"),
                ) == (len(b"to people\n"), len(b"to the guest\n"))

            until(both, "the bytes were never counted")
            text = scrape(where)
        assert value(text, "guest_state", guest="c.sock0", state="running") == 1
        assert value(text, "frontend_connected") == 1
        assert value(text, "port_readers") == 1
        assert value(text, "port_reader_lag_bytes") == 0
        assert value(text, "chains_total") > 0
        assert value(text, "kicks_total") > 0
        assert value(text, "interrupts_total") > 0
        assert value(text, "worker_resident_memory_bytes") > 1 << 20
        assert value(text, "daemons", state="answering") == 1


def test_what_wakes_a_worker_is_timed(daemon: StartDaemon) -> None:
    """Every write of a guest whose worker sleeps is in the histogram, with a time above nothing."""
    served = daemon("unix", 1, "--poll-us", "0")
    with metrics(served.folder, "--listen", "127.0.0.1:0") as where, boot(served) as console:
        before = value(scrape(where), "service_seconds_count")
        for _ in range(10):
            console.write(b"awake\n")
            until(lambda: asleep(served), "its worker never slept")
        until(
            lambda: value(scrape(where), "service_seconds_count") >= before + 10,
            "not every write was timed",
        )
        text = scrape(where)
        count = value(text, "service_seconds_count")
        assert value(text, "service_seconds_bucket", le="+Inf") == count
        assert 1e-6 * count < value(text, "service_seconds_sum") < WITHIN


def asleep(daemon: Daemon) -> bool:
    """Say whether the first guest's worker waits for something."""
    with open(f"/proc/{daemon.workers()[0]}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] == "S"


def test_input_that_wakes_a_worker_is_timed(daemon: StartDaemon) -> None:
    served = daemon("unix", 1, "--poll-us", "0")
    with boot(served) as console, attach(served) as peer:
        peer.sendall(b"begin\n")
        console.read_until(b"begin\n")
        before = sum(served.status()[0]["services"]["counts"])
        for _ in range(10):
            until(lambda: asleep(served), "its worker never slept")
            peer.sendall(b"typed\n")
            console.read_until(b"typed\n")
        served.until(
            lambda guests: sum(guests[0]["services"]["counts"]) >= before + 10,
            "not all that was typed was timed",
        )


def test_no_counter_goes_back_when_a_worker_is_replaced(served: Daemon) -> None:
    with metrics(served.folder, "--listen", "127.0.0.1:0") as where:
        with boot(served) as console, attach(served) as peer:
            converse(console, peer)
            until(lambda: value(scrape(where), "port_input_bytes_total"), "nothing was counted")
            before = counters(scrape(where))
            served.kill_worker()
            after = counters(scrape(where))
            assert gone_back(before, after) == {}
            converse(console, peer)
        assert value(scrape(where), "worker_restarts_total") == 1


def test_no_counter_goes_back_over_a_reload(served: Daemon) -> None:
    with (
        metrics(served.folder, "--listen", "127.0.0.1:0") as where,
        boot(served) as console,
        attach(served) as peer,
    ):
        converse(console, peer)
        until(lambda: value(scrape(where), "port_input_bytes_total"), "nothing was counted")
        before = counters(scrape(where))
        (worker,) = served.workers()
        served.signal(signal.SIGHUP)
        served.until(
            lambda guests: (
                guests[0]["worker"] not in (worker, None) and guests[0]["state"] == "running"
            ),
            "its worker was not replaced",
        )
        after = counters(scrape(where))
        assert gone_back(before, after) == {}


def test_how_far_a_reader_is_behind_is_told_until_it_has_read(served: Daemon) -> None:
    wanted = 600_000
    with (
        metrics(served.folder, "--listen", "127.0.0.1:0") as where,
        boot(served) as console,
        attach(served, receive_buffer=4096) as peer,
    ):
        for _ in range(wanted // 4000):
            console.write(b"x" * 4000)
        until(lambda: value(scrape(where), "port_reader_lag_bytes"), "it never lags")
        read = 0
        while read < wanted:
            wait_readable(peer.fileno(), time.monotonic() + WITHIN, f"{read} bytes came")
            read += len(peer.recv(1 << 20))
        until(lambda: not value(scrape(where), "port_reader_lag_bytes"), "it lags for ever")


def test_a_unix_socket_is_listened_at_and_removed(served: Daemon) -> None:
    path = served.folder / "m.sock"
    with metrics(served.folder, "--listen", f"unix:{path}") as where:
        assert where == f"unix:{path}"
        assert path.stat().st_mode & 0o777 == 0o600
        assert value(scrape(where), "daemons", state="answering") == 1
    assert not path.exists()


def test_scrapers_may_name_what_they_want(served: Daemon) -> None:
    with metrics(served.folder, "--listen", "127.0.0.1:0") as where:
        text = scrape(where, f"/metrics?name[]={PREFIX}kicks_total")
    assert set(re.findall(r"^(\w+)", text, re.MULTILINE)) == {PREFIX + "kicks_total"}


def test_all_scrapers_are_answered_though_one_says_nothing(served: Daemon) -> None:
    with metrics(served.folder, "--listen", "127.0.0.1:0") as where:
        silent = Connection(where)
        silent.connect()
        try:
            assert value(scrape(where), "daemons", state="answering") == 1
        finally:
            silent.close()


def test_a_daemon_that_comes_later_is_there_at_the_next_scrape(
    daemon: StartDaemon, folder: Path
) -> None:
    with metrics(folder, "--listen", "127.0.0.1:0") as where:
        assert value(scrape(where), "daemons", state="answering") == 0
        daemon("unix")
        assert value(scrape(where), "daemons", state="answering") == 1


def test_who_manages_services_is_told_once_it_listens(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(str(folder / "notify"))
        told.settimeout(WITHIN)
        with metrics(folder, "--listen", "127.0.0.1:0", NOTIFY_SOCKET=str(folder / "notify")):
            assert told.recv(100) == b"READY=1"


def test_once_prints_them_and_ends(served: Daemon) -> None:
    done = command(served.folder, "metrics", "--once")
    assert (done.returncode, done.stderr) == (0, "")
    assert value(done.stdout, "guest_state", guest="c.sock0", state="running") == 1


def test_a_daemon_that_hangs_up_is_counted_and_said(folder: Path) -> None:
    run = Path(environment(folder)["RUNTIME_DIRECTORY"])
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(run / "1.sock"))
        listener.listen()
        process = subprocess.Popen(
            [*COMMAND, "metrics", "--once"],
            env=environment(folder),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2):  # to see who is there, and to ask
            wait_readable(listener.fileno(), time.monotonic() + WITHIN, "nobody asks")
            listener.accept()[0].close()
        out, said = process.communicate(timeout=WITHIN)
    assert process.returncode == 0
    assert value(out, "daemons", state="silent") == 1
    assert re.fullmatch(r"vhost-device-console: .*1\.sock.*\n", said)


def test_a_place_that_is_taken_is_said_in_a_line(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        done = command(folder, "metrics", "--listen", where)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"vhost-device-console: error: cannot listen at {where}: address already in use\n"
    )


@pytest.mark.skipif(not os.path.exists("/proc/net/if_inet6"), reason="needs IPv6")
def test_the_other_loopback_will_do_too(folder: Path) -> None:
    with metrics(folder, "--listen", "[::1]:0") as where:
        assert where.startswith("http://[::1]:")
        assert value(scrape(where), "daemons", state="answering") == 0


def test_a_scraper_that_goes_away_harms_nobody(served: Daemon) -> None:
    with metrics(served.folder, "--listen", "127.0.0.1:0") as where:
        for _ in range(20):
            leaving = Connection(where)
            with suppress(OSError):
                leaving.request("GET", "/metrics")
            leaving.close()
        assert value(scrape(where), "daemons", state="answering") == 1
