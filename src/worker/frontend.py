"""The frontend's coming and going, and its messages: one at a time, each one answered.

The session says what a message means; whoever is given here as `apply` does it.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from typing import Any

from ..errors import FrontendError, RefusedError
from ..health import Health
from .poller import Poller
from .vhost_user import message as wire
from .vhost_user import session as fx
from .vhost_user.channel import Channel, Message

#: Messages of the frontend before the queues have their turn.
_MESSAGES = 64

#: How long a message may take from its first byte to its last.
_MESSAGE_S = 5.0

#: How long a frontend waits when the system has no room for it.
_NO_ROOM_S = 1.0

#: Refused messages that are logged one by one; the rest of a session's are only counted.
_LOGGED_REFUSALS = 10


class Frontend:
    """The vhost-user socket `fd`, listening or connected, and the one frontend at it.

    `begin` makes a session for a frontend that came, `apply` carries out its effects, `gone` hears
    that it went; a socket that was connected from the start has no other frontend after it.
    """

    def __init__(
        self,
        fd: int,
        poller: Poller,
        counters: Health,
        log: logging.LoggerAdapter[logging.Logger],
        *,
        begin: Callable[[], fx.Session],
        apply: Callable[[fx.Effect], Any],
        gone: Callable[[], None],
        changed: Callable[[], None],
    ) -> None:
        self._poller = poller
        self._counters = counters
        self._log = log
        self._begin = begin
        self._apply = apply
        self._gone = gone
        self._changed = changed
        self._channel: Channel | None = None
        self._session: fx.Session
        self._refusals = 0
        self._message_timer = poller.timer(self._too_slow)
        self._no_room = poller.timer(self._listen)
        self._socket = socket.socket(fileno=fd)
        self.listening = bool(self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
        if self.listening:
            self._socket.setblocking(False)
            self._listen()
        else:
            self._connected(self._socket)

    def _listen(self) -> None:
        self._poller.watch(self._socket.fileno(), self._on_arrival)

    def _on_arrival(self, _: int) -> None:
        if self._channel is not None:
            self._on_channel(0)  # it may have hung up in the same moment
        try:
            sock, _addr = self._socket.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            self._log.warning("cannot take a frontend, next try in a second: %s", error)
            self._poller.forget(self._socket.fileno())
            self._no_room.start(_NO_ROOM_S)
            return
        if self._channel is not None:
            self._log.warning("another frontend was refused: one is connected already")
            self._counters.refused += 1
            self._changed()
            sock.close()
            return
        self._connected(sock)

    def _connected(self, sock: socket.socket) -> None:
        self._channel = Channel(sock)
        self._session = self._begin()
        self._poller.watch(self._channel.fileno(), self._on_channel)
        self._counters.frontend = self._channel.peer()
        self._counters.sessions += 1
        self._refusals = 0
        self._log.info("frontend %d connected", self._counters.frontend)
        self._changed()

    def _on_channel(self, _: int) -> None:
        channel = self._channel
        if channel is None:
            return
        try:
            for _turn in range(_MESSAGES):
                message = channel.receive()
                if message is None:
                    break
                self._on_message(channel, message)
        except FrontendError as error:
            self.fail(error)
            return
        if channel.closed:
            self._log.info("frontend disconnected")
            self.drop()
        elif not channel.partial:
            self._message_timer.stop()
        elif self._message_timer.due is None:
            self._message_timer.start(_MESSAGE_S)

    def _too_slow(self) -> None:
        self._log.error("frontend dropped: a message was not whole after %g s", _MESSAGE_S)
        self.drop()

    def _on_message(self, channel: Channel, message: Message) -> None:
        request, _size, reply, need_reply = message.header
        session = self._session
        answer: fx.Reply | None = None
        try:
            if reply:
                raise FrontendError(f"vhost-user message {request} is a reply to nothing")
            if message.stray_fds:
                raise RefusedError(f"file descriptors came inside vhost-user message {request}")
            answer = self._carry_out(session.handle(request, message.payload, message.fds))
            failed = 0
        except RefusedError as error:
            self._refuse(error)
            if not session.acknowledges(request, asked=need_reply):
                raise
            failed = 1
        finally:
            message.close_fds()
        if answer is not None:
            try:
                channel.send(wire.encode(request, answer.payload, reply=True), answer.fd)
            finally:
                if answer.fd is not None:
                    os.close(answer.fd)
        elif session.acknowledges(request, asked=need_reply):
            channel.send(wire.encode(request, wire.encode_u64(failed), reply=True))

    def _refuse(self, error: RefusedError) -> None:
        self._counters.refused += 1
        self._refusals += 1
        if self._refusals <= _LOGGED_REFUSALS:
            self._log.warning("refused: %s", error)
        self._changed()

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

    def fail(self, error: FrontendError) -> None:
        """Let the frontend go for what it did."""
        self._log.error("frontend dropped: %s", error)
        self.drop()

    def drop(self) -> None:
        """Let the frontend go, if there is one, and listen for the next."""
        channel, self._channel = self._channel, None
        if channel is None:
            return
        self._gone()
        self._message_timer.stop()
        self._poller.forget(channel.fileno())
        channel.close()
        self._counters.frontend = None
        if not self.listening:
            self._poller.stop()
        self._changed()

    def close(self) -> None:
        """Let the frontend go and listen no more."""
        self.drop()
        if self.listening:
            self._poller.forget(self._socket.fileno())
        self._socket.close()
