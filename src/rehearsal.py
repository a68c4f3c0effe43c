"""A worker's first minutes, played once in the master before any worker is forked.

What CPython does to code that runs for the first times (specialised instructions, type caches and
their references) it writes into pages that are shared after a fork, so each worker would have its
own copy of them. Here that happens before: the master serves one guest, played by a child, as a
worker would, and the workers inherit what it left. It saves each about 0.7 MiB, and needs a part
of a second.
"""

from __future__ import annotations

import gc
import logging
import os
import resource
import signal
import socket
from contextlib import ExitStack

from . import config, journal, orders, worker

#: How often the guest comes; CPython specialises a function when it is called the eighth time.
_ROUNDS = 4

_WITHIN_S = 3

_log = logging.getLogger(__name__)


def rehearse() -> None:
    """Serve a guest that comes, is talked to and goes; what fails is only said in the debug log.

    Call it before signals have handlers: those of a worker are installed meanwhile, the ones before
    them, and no others, afterwards. No signal is taken until then.
    """
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    before = signal.getsignal(signal.SIGTERM)
    failure: Exception | None = None
    logger = logging.getLogger(__package__)
    silence = logging.NullHandler()
    logger.addHandler(silence)
    logger.propagate = False  # a guest that is none is nobody's news
    try:
        _serve()
    except Exception as error:  # whatever it is, the daemon can do without
        failure = error
    finally:
        logger.propagate = True
        logger.removeHandler(silence)
        signal.signal(signal.SIGTERM, before)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        gc.collect()
    if failure is not None:
        _log.debug("a worker could not be rehearsed: %s", failure)


def _serve() -> None:
    port = config.Port(id=0, name="rehearsal", backend=config.Network(config.LOCALHOST, 0))
    guest = config.Guest(name="rehearsal", ports=(port,), max_ports=1)
    with ExitStack() as undo:
        # Abstract and numbered by the system: nothing is left behind, and nobody is in the way.
        frontend = undo.enter_context(socket.socket(socket.AF_UNIX))
        frontend.bind("")
        endpoint = undo.enter_context(socket.socket())
        endpoint.bind((config.LOCALHOST, 0))
        for listener in (frontend, endpoint):
            listener.listen()
            listener.setblocking(False)
        ours, theirs = orders.pair()
        undo.enter_context(ours)
        undo.enter_context(theirs)
        journal_fd = journal.create(port.name, port.output_bytes, port.input_bytes)
        heard, health = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        guest_pid = os.fork()
        if guest_pid == 0:
            os.close(health)
            _play(frontend.getsockname(), endpoint.getsockname())
        undo.callback(os.waitpid, guest_pid, 0)
        # The worker ends when nobody holds this end any more: when the child has ended, however.
        os.close(heard)
        worker.run(
            guest,
            worker.Inheritance(
                frontend=frontend.detach(),
                ports=(worker.PortFiles(journal_fd, endpoint.detach()),),
                health=health,
                orders=theirs.detach(),
            ),
        )


def _play(frontend: bytes, endpoint: tuple[str, int]) -> None:
    """Be the guest and the person at its console; never returns."""
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
        signal.alarm(_WITHIN_S)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        from .testing import ConsoleDriver, GuestMemory, connect_like_qemu

        for _ in range(_ROUNDS):
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(frontend)
            with GuestMemory() as memory, connect_like_qemu(connection, memory) as session:
                console = ConsoleDriver(session)
                console.wait_open()
                with socket.create_connection(endpoint) as person:
                    console.write(b"x")
                    person.recv(1)
                    person.send(b"y")
                    console.read(1)
    finally:
        os._exit(0)
