"""What an attached program and a worker tell each other: the console with offsets and roles.

The two talk over a SOCK_SEQPACKET pair, so that a record is sent or is not, whoever is killed. A
record begins with its kind:

- `o`: output of the guest's: its absolute offset (u64, little endian), and the bytes
- `i`: input: the epoch (u32) and its offset in what this program has typed (u64), and the bytes
- `{`: anything else, as a line of JSON with a `type`

Output that comes twice, since a successor of a killed worker cannot know what arrived, has the same
offset twice; a gap shows in the offsets. Input that the worker has acknowledged has reached the
port. A successor says with `Resumed` from where it wants it again. Whoever loses the writer's role
or gets it finds a new epoch, and what was typed before and not acknowledged was never typed.
"""

from __future__ import annotations

import struct

import msgspec

#: Bytes of output in one record; of any record, such as one of 256 people with long names.
MOST_OUTPUT = 1 << 16
LARGEST = 1 << 17

#: Bytes of input in one record, and those that may be on their way, unacknowledged.
MOST_INPUT = 1 << 12
WINDOW = 1 << 16

_OUTPUT = struct.Struct("<BQ")
_INPUT = struct.Struct("<BIQ")
_OUTPUT_KIND, _INPUT_KIND = b"oi"

#: What a decoder raises.
_UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)

# What the worker tells


class Hello(msgspec.Struct, tag_field="type", tag="hello", kw_only=True):
    """The first record: the journal, where its output begins (`tail`) and ends, where this goes on.

    `journal` is another number for another journal: offsets of one mean nothing in the other.
    """

    guest: str
    port: int
    name: str
    console: bool
    journal: int
    tail: int
    head: int
    at: int


class Role(msgspec.Struct, tag_field="type", tag="role", kw_only=True):
    """Whether what this program types is taken from now on, in this epoch from offset `read`.

    `by` names who has the role otherwise, empty for nobody.
    """

    writer: bool
    epoch: int
    read: int
    by: str


class Acknowledged(msgspec.Struct, tag_field="type", tag="ack"):
    """Input up to the offset `read` has reached the port."""

    read: int


class Resumed(msgspec.Struct, tag_field="type", tag="resumed"):
    """A successor goes on: input from `read` on is to be sent again."""

    read: int


class Size(msgspec.Struct, tag_field="type", tag="size"):
    """A terminal's size in characters, 0 x 0 where it is not known.

    The port's and `by` whom it was decided; or this program's own.
    """

    columns: int
    rows: int
    by: str = ""


class Person(msgspec.Struct, kw_only=True):
    """Somebody at a port: `attached` over this protocol, or a plain connection otherwise.

    `lag` counts bytes that they have not read.
    """

    name: str
    attached: bool
    writer: bool
    you: bool
    columns: int
    rows: int
    lag: int


class Who(msgspec.Struct, tag_field="type", tag="who"):
    """Everybody at the port, in the order in which they came."""

    people: list[Person]


class Bye(msgspec.Struct, tag_field="type", tag="bye"):
    """The last record: why there is no more."""

    why: str


Told = Hello | Role | Acknowledged | Resumed | Size | Who | Bye

# What the program tells


class Ask(msgspec.Struct, tag_field="type", tag="ask"):
    """Ask for the writer's role, from whoever has it with `force`; without `write` give it up."""

    write: bool
    force: bool = False


class AskWho(msgspec.Struct, tag_field="type", tag="ask-who"):
    """Ask who is here."""


Said = Ask | AskWho | Size

_encoder = msgspec.json.Encoder()
_told: msgspec.json.Decoder[Told] = msgspec.json.Decoder(Told)
_said: msgspec.json.Decoder[Said] = msgspec.json.Decoder(Said)


class Output(msgspec.Struct):
    """Bytes of the guest's at an offset."""

    offset: int
    data: memoryview


class Input(msgspec.Struct):
    """Bytes that were typed, in an epoch, at an offset."""

    epoch: int
    offset: int
    data: memoryview


def encode(message: Told | Said) -> bytes:
    """Return a message as a record."""
    return _encoder.encode(message)


def output_header(offset: int) -> bytes:
    """Return what comes before the bytes in a record of output."""
    return _OUTPUT.pack(_OUTPUT_KIND, offset)


def input_header(epoch: int, offset: int) -> bytes:
    """Return what comes before the bytes in a record of input."""
    return _INPUT.pack(_INPUT_KIND, epoch, offset)


def told(record: memoryview) -> Told | Output:
    """Return what a worker's record says; raises ValueError for one that makes no sense."""
    if len(record) >= _OUTPUT.size and record[0] == _OUTPUT_KIND:
        return Output(_OUTPUT.unpack_from(record)[1], record[_OUTPUT.size :])
    try:
        return _told.decode(record)
    except _UNREADABLE as error:
        raise ValueError(f"a record that makes no sense: {error}") from None


def said(record: memoryview) -> Said | Input:
    """Return what a program's record says; raises ValueError for one that makes no sense."""
    if len(record) >= _INPUT.size and record[0] == _INPUT_KIND:
        _, epoch, offset = _INPUT.unpack_from(record)
        return Input(epoch, offset, record[_INPUT.size :])
    try:
        return _said.decode(record)
    except _UNREADABLE as error:
        raise ValueError(f"a record that makes no sense: {error}") from None
