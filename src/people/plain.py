"""Text without what steers a terminal, whatever pieces it comes in."""

from __future__ import annotations

import codecs
import re

#: What needs a look: control characters but tab, and what begins a sequence.
_ORDINARY = re.compile("[^\x00-\x08\x0a-\x1f\x7f-\x9f]+")

#: ECMA-48: these begin a string, which ST ends; the others of C1 stand alone.
_STRINGS = "PX]^_"

_TEXT, _ESCAPE, _INTERMEDIATE, _SEQUENCE, _STRING = range(5)


class Plain:
    """Removes escape sequences and control characters (ECMA-48) from UTF-8.

    Lines end with a line feed: carriage returns before it go, and one that stands alone begins a
    new line, so that what was written one over the other can be read one after the other. What is
    no UTF-8 becomes U+FFFD. A string that is never ended ends with its line: no more is lost.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._state = _TEXT
        self._returned = False  # to the first column
        self._begun = False  # the line has something in it

    def feed(self, data: bytes | memoryview) -> str:
        """Return what is to be seen of `data`, behind what came before."""
        return self._feed(self._decoder.decode(bytes(data)))

    def end(self) -> str:
        """Return what was held back because there might have been more of it."""
        return self._feed(self._decoder.decode(b"", final=True))

    def _feed(self, text: str) -> str:
        out: list[str] = []
        at = 0
        while at < len(text):
            if self._state == _TEXT and (match := _ORDINARY.match(text, at)):
                self._put(out, match[0])
                at = match.end()
            else:
                self._take(out, text[at])
                at += 1
        return "".join(out)

    def _put(self, out: list[str], text: str) -> None:
        if self._returned and self._begun:
            out.append("\n")
        self._returned = False
        self._begun = True
        out.append(text)

    def _take(self, out: list[str], char: str) -> None:
        if char == "\n":
            out.append(char)
            self._returned = self._begun = False
            if self._state != _SEQUENCE:
                self._state = _TEXT
        elif char == "\r" and self._state != _STRING:
            self._returned = True
        elif char == "\x1b":
            self._state = _ESCAPE
        elif "\x80" <= char <= "\x9f":
            self._begin(chr(ord(char) - 0x40))
        elif char in "\x18\x1a" or (char == "\x07" and self._state == _STRING):
            self._state = _TEXT
        elif char >= " " and char != "\x7f":
            self._go_on(char)

    def _begin(self, char: str) -> None:
        """Begin what ESC and `char` begin."""
        if char == "[":
            self._state = _SEQUENCE
        elif char in _STRINGS:
            self._state = _STRING
        elif char < "0":
            self._state = _INTERMEDIATE
        else:
            self._state = _TEXT

    def _go_on(self, char: str) -> None:
        if self._state == _ESCAPE:
            self._begin(char)
        elif self._state == _INTERMEDIATE:
            self._state = _INTERMEDIATE if char < "0" else _TEXT
        elif self._state == _SEQUENCE and "@" <= char <= "~":
            self._state = _TEXT
