"""Guest memory whose buffers lie in many small regions, so that most of them cross from one on."""

from __future__ import annotations

from vhost_device_console.testing import GuestMemory
from vhost_device_console.worker.vhost_user.message import Region

PAGE = 4096

_RINGS = Region(0x20_0000, 64 * PAGE, 0x7F00_0000_0000, 0)

#: Where the buffers are, in pages: regions that touch, in files and at user addresses that do not.
_START = 0x5_0000
_SIZES = (1, 2, 1, 3, 1, 4, 1)
BYTES = sum(_SIZES) * PAGE


def _regions() -> list[Region]:
    regions = [_RINGS]
    addr = _START
    for at, pages in enumerate(_SIZES):
        user = 0x6000_0000_0000 - at * 0x100_0000
        regions.append(Region(addr, pages * PAGE, user, (at % 3) * PAGE))
        addr += pages * PAGE
    return regions


class Arena(GuestMemory):
    """Rings have their place in the first, large region; `alloc` is for buffers and their tables.

    It takes bytes in turn from all over the small regions. `wanted` is what these should hold: what
    was written through `write`, and what the test says that the device writes (`expect`).
    """

    def __init__(self) -> None:
        self._live: dict[int, int] = {}
        self._cursor = 0
        self.wanted = bytearray(BYTES)
        super().__init__(_regions())

    def alloc(
        self,
        size: int,
        align: int = 16,  # noqa: ARG002 - buffers and tables may lie anywhere
        *,
        region: int | None = None,
    ) -> int:
        assert region is None
        taken = sorted(self._live.items())
        start = self._cursor
        for at in (start, 0):
            for low, count in taken:
                if low < at + size and at < low + count:
                    at = low + count
            if at + size <= BYTES:
                self._live[at] = size
                self._cursor = at + size
                return _START + at
        raise MemoryError(f"no {size} bytes in one piece")

    def free(self, addr: int) -> None:
        del self._live[addr - _START]

    def write(self, addr: int, data: bytes | bytearray | memoryview) -> None:
        super().write(addr, data)
        self.expect(addr, bytes(data))

    def expect(self, addr: int, data: bytes) -> None:
        """Say that the device should write `data` to `addr`."""
        self.wanted[addr - _START : addr - _START + len(data)] = data

    def check(self) -> None:
        """Fail unless all buffers hold what they should, and the bytes between them too."""
        found = self.read(_START, BYTES)
        if found != self.wanted:
            at = next(at for at in range(BYTES) if found[at] != self.wanted[at])
            raise AssertionError(f"byte {_START + at:#x} is {found[at]}, not {self.wanted[at]}")

    def pages(self) -> dict[int, bytes]:
        """Return every page of this memory by its number."""
        return {
            (region.guest_addr + at) // PAGE: self.read(region.guest_addr + at, PAGE)
            for region, _ in self.regions()
            for at in range(0, region.size, PAGE)
        }

    def restore(self, pages: dict[int, bytes]) -> None:
        """Make these pages what they were, whatever is wanted."""
        for page, data in pages.items():
            super().write(PAGE * page, data)
