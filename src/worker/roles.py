"""Who types at one port: one of those who take turns, while the others watch."""

from __future__ import annotations

from typing import Protocol

import msgspec

from ..attachment import Ask


class Standing(msgspec.Struct, array_like=True):
    """Somebody's place among those who take turns, which a successor has to know.

    In `epoch` it was told last whether it is the `writer`. `wants` says that it would be.
    """

    wants: bool
    writer: bool = False
    epoch: int = 0


class Player(Protocol):
    """Somebody who takes turns."""

    @property
    def name(self) -> str:
        """As whom others see it."""

    @property
    def standing(self) -> Standing:
        """Its place among the others."""

    def tell_role(self, by: str) -> None:
        """Hear its role, and the writer's name, empty for nobody."""


class Roles:
    """Those who take turns, in the order in which they came; one at most is the writer.

    The first who wants to is, until it leaves, gives it up, or another takes it by force.
    """

    def __init__(self) -> None:
        self._players: list[Player] = []

    @property
    def _writer(self) -> Player | None:
        return next((player for player in self._players if player.standing.writer), None)

    def came(self, player: Player) -> None:
        """Take in another one."""
        self._players.append(player)
        if self._writer is None and player.standing.wants:
            self._choose(player)
        else:
            self._tell(player)

    def resumed(self, player: Player) -> None:
        """Take in one that a predecessor had, with its role."""
        self._players.append(player)
        self._tell(player)

    def left(self, player: Player) -> None:
        """Let one go."""
        self._players.remove(player)
        if player.standing.writer:
            self._choose_first()

    def asked(self, player: Player, ask: Ask) -> bool:
        """Do what it asks for; return whether that has changed anything."""
        standing = player.standing
        before = (standing.wants, standing.writer)
        standing.wants = ask.write
        if not ask.write and standing.writer:
            self._choose_first()
        elif ask.write and (ask.force or self._writer is None):
            self._choose(player)
        else:
            self._tell(player)
        return before != (standing.wants, standing.writer)

    def _choose_first(self) -> None:
        self._choose(next((player for player in self._players if player.standing.wants), None))

    def _choose(self, chosen: Player | None) -> None:
        for player in self._players:
            standing = player.standing
            if standing.writer is not (player is chosen):
                standing.writer = player is chosen
                standing.epoch += 1
        for player in self._players:
            self._tell(player)

    def _tell(self, player: Player) -> None:
        writer = self._writer
        player.tell_role("" if writer is None else writer.name)
