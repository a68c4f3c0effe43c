"""Metrics for Prometheus: what every daemon says of itself, asked anew at each scrape.

Names and units are as https://prometheus.io/docs/practices/naming/ wants them. What counts goes on
over a guest's workers; it begins at 0 with the daemon.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import accumulate
from socketserver import ThreadingMixIn
from typing import Any, Generic, NamedTuple, TypeVar
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, generate_latest, make_wsgi_app
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from .. import monitor, systemd
from ..errors import ConsoleError
from ..monitor import GuestStatus, PortStatus, Status
from ..privileges import confine_entrance
from ..supervision import State
from .listening import is_unix, listening

_log = logging.getLogger(__name__)

PREFIX = "vhost_device_console_"

#: Why it does not listen elsewhere unless told so.
_EXPOSED = "other machines could see what guests there are: add --allow-remote if they may"

#: Where it listens unless told otherwise.
LISTEN = "127.0.0.1:9417"

#: Daemons asked at once, and scrapers answered at once; one more of those waits.
_ASKED_AT_ONCE = 8
_MOST_SCRAPERS = 16

#: Seconds that a scraper may be silent.
_SCRAPER_WITHIN = 10

_GUEST = ("daemon", "guest")
_PORT = (*_GUEST, "port")

_Part = TypeVar("_Part")


class _Of(NamedTuple, Generic[_Part]):
    """A metric: its name and help, and its value for a guest or a port, None for no sample."""

    name: str
    help: str
    value: Callable[[_Part], float | None]


_GUEST_COUNTS: tuple[_Of[GuestStatus], ...] = (
    _Of("sessions", "Frontends that connected.", lambda g: g.sessions),
    _Of("kicks", "Notifications from the guest.", lambda g: g.kicks),
    _Of("interrupts", "Notifications to the guest (calls).", lambda g: g.calls),
    _Of("chains", "The guest's buffers that were completed.", lambda g: g.chains),
    _Of("refused", "Messages and frontends that were turned away.", lambda g: g.refused),
    _Of("broken_queues", "Virtqueues stopped for the guest's mistakes.", lambda g: g.broken),
    _Of(
        "ignored_control_messages",
        "Control messages of the guest's that made no sense.",
        lambda g: g.ignored,
    ),
    _Of("worker_restarts", "Workers started in place of another.", lambda g: g.restarts),
    _Of("worker_cpu_seconds", "Processor time of all workers.", lambda g: g.cpu_seconds),
)

_GUEST_LEVELS: tuple[_Of[GuestStatus], ...] = (
    _Of("frontend_connected", "Whether a frontend is connected.", lambda g: g.frontend is not None),
    _Of("worker_resident_memory_bytes", "Resident memory of the worker.", lambda g: g.rss),
)

_PORT_COUNTS: tuple[_Of[PortStatus], ...] = (
    _Of("port_output_bytes", "Bytes that the guest wrote.", lambda p: p.output),
    _Of("port_input_bytes", "Bytes that the guest was given.", lambda p: p.input),
    _Of("port_missed_bytes", "Bytes that readers were too slow for.", lambda p: p.missed),
    _Of("port_discarded_bytes", "Bytes written to a disabled queue.", lambda p: p.discarded),
    _Of("port_stalls", "Times that a stuck reader let the guest wait.", lambda p: p.stalls),
)

_PORT_LEVELS: tuple[_Of[PortStatus], ...] = (
    _Of("port_readers", "Readers attached now.", lambda p: p.readers),
    _Of("port_reader_lag_bytes", "What the slowest reader has yet to read.", lambda p: p.lag),
    _Of("port_open", "Whether a program in the guest has it open.", lambda p: p.open),
    _Of("port_failed", "Whether the guest could not add it.", lambda p: p.state == "failed"),
    _Of("port_held", "Whether the guest waits for a reader.", lambda p: p.held),
    _Of(
        "port_log_failing",
        "Whether its log cannot be written; no sample without a log.",
        lambda p: None if p.log is None else p.log_failing,
    ),
)


class _Row(NamedTuple):
    """One guest and the labels of its samples."""

    labels: tuple[str, str]
    guest: GuestStatus


def exposition(answers: Sequence[tuple[str, Status]], silent: int) -> Iterator[Metric]:
    """Yield all metrics of the daemons that answered, by their label; `silent` ones did not."""
    daemons = GaugeMetricFamily(
        PREFIX + "daemons", "Daemons that run, by whether they answer.", labels=("state",)
    )
    daemons.add_metric(("answering",), len(answers))
    daemons.add_metric(("silent",), silent)
    yield daemons
    info = GaugeMetricFamily(
        PREFIX + "build_info", "The versions of the daemons that answer.", labels=("version",)
    )
    for version in sorted({status.version for _, status in answers}):
        info.add_metric((version,), 1)
    yield info
    rows = _rows(answers)
    yield _states(rows)
    yield from _families(CounterMetricFamily, _GUEST_COUNTS, _GUEST, rows)
    yield from _families(GaugeMetricFamily, _GUEST_LEVELS, _GUEST, rows)
    yield _services(rows)
    ports = [((*row.labels, port.name), port) for row in rows for port in row.guest.ports]
    yield from _families(CounterMetricFamily, _PORT_COUNTS, _PORT, ports)
    yield from _families(GaugeMetricFamily, _PORT_LEVELS, _PORT, ports)


def _rows(answers: Sequence[tuple[str, Status]]) -> list[_Row]:
    """Return all guests; no two have the same labels, as Prometheus would refuse them all."""
    names = Counter((daemon, guest.name) for daemon, status in answers for guest in status.guests)
    return [
        _Row(
            (
                daemon,
                guest.name
                if names[daemon, guest.name] == 1
                else f"{guest.name} of process {guest.daemon}",
            ),
            guest,
        )
        for daemon, status in answers
        for guest in status.guests
    ]


def _families(
    kind: type[CounterMetricFamily | GaugeMetricFamily],
    metrics: Sequence[_Of[_Part]],
    names: Sequence[str],
    parts: Sequence[tuple[Sequence[str], _Part]],
) -> Iterator[Metric]:
    for name, text, value in metrics:
        family = kind(PREFIX + name, text, labels=names)
        for labels, part in parts:
            if (sample := value(part)) is not None:
                family.add_metric(labels, sample)
        yield family


def _states(rows: Sequence[_Row]) -> Metric:
    family = GaugeMetricFamily(
        PREFIX + "guest_state",
        "1 for the state that the guest's worker is in.",
        labels=(*_GUEST, "state"),
    )
    for labels, guest in rows:
        for state in State:
            family.add_metric((*labels, state), guest.state == state)
    return family


def _services(rows: Sequence[_Row]) -> Metric:
    family = HistogramMetricFamily(
        PREFIX + "service_seconds",
        "From when the guest or a client woke the worker until the buffers were completed.",
        labels=_GUEST,
    )
    for labels, guest in rows:
        if (services := guest.services) is not None:
            bounds = [*map(str, services.bounds), "+Inf"]
            family.add_metric(
                labels,
                [*zip(bounds, accumulate(services.counts), strict=False)],
                services.seconds,
            )
    return family


class Daemons(Collector):
    """Asks the daemons that `find` finds, by their monitor sockets, whenever it is collected."""

    def __init__(self, find: Callable[[], Sequence[str]]) -> None:
        self._find = find
        self._failed: dict[str, str] = {}
        self._turn = threading.Lock()  # a daemon is asked once at a time: it has other clients

    def describe(self) -> Iterator[Metric]:
        """Yield all metrics without samples."""
        return exposition([], 0)

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics; a daemon that does not answer is logged once."""
        with self._turn:
            answers, silent = self._ask()
        yield from exposition(answers, silent)

    def _ask(self) -> tuple[list[tuple[str, Status]], int]:
        paths = self._find()
        with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
            replies = [*zip(paths, pool.map(_ask, paths), strict=True)]
        failed = {path: reply for path, reply in replies if isinstance(reply, str)}
        for path, why in failed.items():
            if self._failed.get(path) != why:
                _log.warning("%s", why)
        self._failed = failed
        answers = [(_label(path), reply) for path, reply in replies if isinstance(reply, Status)]
        return answers, len(failed)


def _ask(path: str) -> Status | str:
    try:
        return monitor.ask(path)
    except ConsoleError as error:
        return str(error)


def _label(path: str) -> str:
    """Return what tells daemons apart whose guests have the same names: a service's instance."""
    folder = os.path.dirname(path)
    return "" if folder in monitor.folders(os.environ, os.geteuid()) else os.path.basename(folder)


class _Handler(WSGIRequestHandler):
    timeout = _SCRAPER_WITHIN

    def address_string(self) -> str:
        """Return who asks; nobody looks it up, and a unix socket's client has no address."""
        return "-"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Say nothing about each scrape."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def __init__(self, listener: socket.socket, registry: CollectorRegistry) -> None:
        self._slots = threading.BoundedSemaphore(_MOST_SCRAPERS)
        # Not bound by its base, which would look its own name up.
        super().__init__(("", 0), _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.server_name, self.server_port = "localhost", 0
        self.setup_environ()
        self.set_app(make_wsgi_app(registry))

    def get_request(self) -> tuple[socket.socket, Any]:
        return self.socket.accept()[0], ("-", 0)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread of its own, once there are not too many."""
        self._slots.acquire()
        try:
            super().process_request(request, client_address)
        except BaseException:  # there is no such thread
            self._slots.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def handle_error(self, *_: Any) -> None:
        """Forget a scraper that went away."""
        error = sys.exception()
        if not isinstance(error, OSError):
            _log.error("a scrape failed: %s: %s", type(error).__name__, error)


def once(find: Callable[[], Sequence[str]], *, as_json: bool = False) -> str:
    """Return the metrics as text, or as JSON with the samples' names, labels and values."""
    registry = CollectorRegistry()
    registry.register(Daemons(find))
    if not as_json:
        return generate_latest(registry).decode()
    samples = [
        {"name": sample.name, "labels": sample.labels, "value": sample.value}
        for metric in registry.collect()
        for sample in metric.samples
    ]
    return json.dumps({"samples": samples}, indent=2) + "\n"


def serve(
    find: Callable[[], Sequence[str]], where: str, said: Callable[[str], None], *, remote: bool
) -> None:
    """Answer scrapers at `where` until a signal ends it; `said` hears where that is.

    Raises ConfigError when it cannot listen there.
    """
    with ExitStack() as undo:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: sys.exit(0))
        listener, place = undo.enter_context(listening(where, refusal=None if remote else _EXPOSED))
        confine_entrance()
        registry = CollectorRegistry()
        registry.register(Daemons(find))
        said(place if is_unix(where) else f"http://{place}/metrics")
        systemd.notify("READY=1")
        _Server(listener, registry).serve_forever()
