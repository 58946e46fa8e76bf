"""A guest's RAM, as a vhost-user frontend shares it: file descriptors mapped into this process.

Laws:

1. Every access names a guest-physical address and a length, and both lie in one region, or
   `BadGuestAddress` is raised. Nothing a guest writes can make this process touch anything else.
2. Reads return copies. No view of the mapping outlives a call, so a region can be unmapped between any
   two calls, which is what memory hot-unplug does.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass


class BadGuestAddress(Exception):
    """A guest-physical range that is not wholly inside one shared region."""


@dataclass(frozen=True)
class Region:
    """One stretch of guest RAM.

    :param guest_address: Guest-physical start, in bytes.
    :param size: Length in bytes, above 0.
    :param user_address: Start in the address space of the frontend (QEMU), which ring addresses use.
    :param mmap_offset: Where the region starts in its file, in bytes, page-aligned.
    """

    guest_address: int
    size: int
    user_address: int
    mmap_offset: int


class GuestMemory:
    """The regions shared at the moment. Not thread-safe."""

    def __init__(self) -> None:
        self._mapped: list[tuple[Region, mmap.mmap]] = []

    @property
    def regions(self) -> tuple[Region, ...]:
        """The regions mapped now, in the order they were added."""
        return tuple(region for region, _ in self._mapped)

    def add(self, region: Region, descriptor: int) -> None:
        """Map a region. The descriptor stays the caller's to close.

        :raise OSError: When the file cannot be mapped.
        :raise ValueError: When the region is empty, misaligned or overlaps another.
        """
        start, end = region.guest_address, region.guest_address + region.size
        if region.size <= 0 or start < 0 or end > 1 << 64:
            raise ValueError(f"impossible region {region}")
        if any(start < r.guest_address + r.size and r.guest_address < end for r, _ in self._mapped):
            raise ValueError(f"region {region} overlaps another")
        view = mmap.mmap(descriptor, region.size, mmap.MAP_SHARED, offset=region.mmap_offset)
        self._mapped.append((region, view))

    def remove(self, guest_address: int, size: int) -> None:
        """Unmap the region with exactly this start and length.

        :raise ValueError: When there is none.
        """
        for index, (region, view) in enumerate(self._mapped):
            if region.guest_address == guest_address and region.size == size:
                del self._mapped[index]
                view.close()
                return
        raise ValueError(f"no region at {guest_address:#x} with {size} bytes")

    def replace(self, table: Sequence[tuple[Region, int]]) -> None:
        """Drop all regions and map these instead (region, descriptor).

        :raise OSError: When a file cannot be mapped; no region is left then.
        :raise ValueError: As for `add`; no region is left then.
        """
        self.close()
        try:
            for region, descriptor in table:
                self.add(region, descriptor)
        except (OSError, ValueError):
            self.close()
            raise

    def close(self) -> None:
        """Unmap everything."""
        for _, view in self._mapped:
            view.close()
        self._mapped.clear()

    def read(self, address: int, length: int) -> bytes:
        """Copy `length` bytes out of the guest.

        :raise BadGuestAddress: When the range is not inside one region.
        """
        view, offset = self._find(address, length)
        return view[offset : offset + length]

    def write(self, address: int, data: bytes) -> None:
        """Copy bytes into the guest.

        :raise BadGuestAddress: When the range is not inside one region; nothing is written then.
        """
        view, offset = self._find(address, len(data))
        view[offset : offset + len(data)] = data

    def guest_address_of(self, user_address: int) -> int:
        """The guest-physical address of an address in the frontend's own address space.

        :raise BadGuestAddress: When no region has it.
        """
        for region, _ in self._mapped:
            offset = user_address - region.user_address
            if 0 <= offset < region.size:
                return region.guest_address + offset
        raise BadGuestAddress(f"user address {user_address:#x} is in no region")

    def _find(self, address: int, length: int) -> tuple[mmap.mmap, int]:
        for region, view in self._mapped:
            offset = address - region.guest_address
            if offset >= 0 and length >= 0 and offset + length <= region.size:
                return view, offset
        raise BadGuestAddress(f"{length} bytes at {address:#x} are outside guest memory")
