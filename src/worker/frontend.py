"""The frontend's coming and going, and its messages: one at a time, each one answered.

The master reads them and tells them. The session says what a message means; whoever is given here
as `apply` does it. Nothing is answered before it is committed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any, Protocol

from .. import custody
from ..custody import FrontendCame, FrontendGone, FrontendSaid
from ..errors import FrontendError, RefusedError
from ..events import Happening
from ..health import Health
from .inheritance import Held
from .vhost_user import message as wire
from .vhost_user import session as fx

#: Refused messages that are logged one by one; the rest of a session's are only counted.
_LOGGED_REFUSALS = 10


class Commit(Protocol):
    """Commits what has become of the guest, with an answer to the frontend or its dismissal."""

    def __call__(
        self, answer: bytes | None = None, answer_fd: int | None = None, *, dismiss: bool = False
    ) -> None:
        """Return once it is sent; `answer_fd` stays the caller's."""


class Frontend:
    """The frontend, while there is one.

    `begin` makes a session for a frontend that came, `apply` carries out its effects, `gone` hears
    that it went. `serial` is the last of its events that was dealt with, to the end: what is
    committed before that leaves the event to be told again. `newest` is the last key that came with
    one of them.
    """

    def __init__(
        self,
        serial: int,
        counters: Health,
        log: logging.LoggerAdapter[logging.Logger],
        *,
        begin: Callable[[], fx.Session],
        apply: Callable[[fx.Effect], Any],
        gone: Callable[[], None],
        commit: Commit,
    ) -> None:
        self.serial = serial
        self.newest = 0
        self._counters = counters
        self._log = log
        self._begin = begin
        self._apply = apply
        self._gone = gone
        self._commit = commit
        self._session: fx.Session | None = None
        self._refusals = 0

    @property
    def connected(self) -> bool:
        """Whether there is a frontend."""
        return self._session is not None

    def resume(self, session: fx.Session, pid: int | None) -> None:
        """Go on with the frontend of a predecessor."""
        self._session = session
        self._counters.frontend = pid

    def came(self, event: FrontendCame) -> None:
        """Begin with a frontend."""
        self.serial = event.serial
        self._session = self._begin()
        self._counters.frontend = event.pid
        self._counters.sessions += 1
        self._refusals = 0
        self._log.info("frontend %d connected", event.pid, extra=Happening.FRONTEND_CONNECTED.extra)
        self._commit()

    def said(self, event: FrontendSaid, fds: list[Held]) -> None:
        """Do what a message asks for; its `fds` are taken over."""
        try:
            if self._session is None:  # it was let go when this was on its way
                self._dealt_with(event)
                return
            if len(fds) < len(event.keys):
                raise FrontendError("the system had no room for the file descriptors of a message")
            answer, fd = self._on_message(self._session, event, fds)
        except FrontendError as error:
            custody.close(fds)  # before anybody knows
            fds.clear()
            self.fail(error, event)
            return
        finally:
            custody.close(fds)
        self._dealt_with(event)
        try:
            self._commit(answer, fd)
        finally:
            if fd is not None:
                os.close(fd)

    def gone(self, event: FrontendGone) -> None:
        """Go on without the frontend, which has gone."""
        self._leave()
        self.serial = event.serial
        self._commit()

    def _dealt_with(self, event: FrontendSaid) -> None:
        self.serial = event.serial
        self.newest = max(self.newest, *event.keys, 0)

    def _on_message(
        self, session: fx.Session, said: FrontendSaid, fds: list[Held]
    ) -> tuple[bytes | None, int | None]:
        """Return the message to answer with, if any, and its descriptor. Raises FrontendError."""
        request = said.request
        answer: fx.Reply | None = None
        try:
            if said.reply:
                raise FrontendError(f"vhost-user message {request} is a reply to nothing")
            if said.stray:
                raise RefusedError(f"file descriptors came inside vhost-user message {request}")
            answer = self._carry_out(session.handle(request, said.payload, [*fds]))
            failed = 0
        except RefusedError as error:
            self._refuse(error)
            if not session.acknowledges(request, asked=said.need_reply):
                raise
            failed = 1
        if answer is not None:
            return wire.encode(request, answer.payload, reply=True), answer.fd
        if session.acknowledges(request, asked=said.need_reply):
            return wire.encode(request, wire.encode_u64(failed), reply=True), None
        return None, None

    def _refuse(self, error: RefusedError) -> None:
        self._counters.refused += 1
        self._refusals += 1
        if self._refusals <= _LOGGED_REFUSALS:
            self._log.warning("refused: %s", error)

    def _carry_out(self, steps: fx.Steps) -> fx.Reply | None:
        try:
            effect = next(steps)
            while True:
                try:
                    result = self._apply(effect)
                except RefusedError as error:
                    effect = steps.throw(error)
                else:
                    effect = steps.send(result)
        except StopIteration as done:
            reply: fx.Reply | None = done.value
            return reply

    def fail(self, error: FrontendError, event: FrontendSaid | None = None) -> None:
        """Let the frontend go for what it did, perhaps in this message."""
        self._log.error("frontend dropped: %s", error, extra=Happening.FRONTEND_DROPPED.extra)
        self._leave()
        if event is not None:
            self._dealt_with(event)
        self._commit(dismiss=True)

    def _leave(self) -> None:
        if self._session is None:
            return
        self._gone()
        self._session = None
        self._counters.frontend = None
