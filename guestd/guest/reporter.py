"""Hands of a guest that can only report: without a root helper nothing is switched, and the broker knows (the guest
says so with its capabilities). The host then sizes it from outside, by CPU quota and balloon.
"""

import errno
import os
import socket
from collections.abc import Sequence
from pathlib import Path

from guestd.guest import psi
from guestd.guest.core.ops import HandResult, HandStatus, HookOp, Op
from guestd.guest.hands import Hands


class NoHands(Hands):
    """Refuses all that takes root. There are no hooks, for it is root that runs them.

    :param root: Where `proc` is.
    """

    def __init__(self, root: Path | str = "/") -> None:
        self._root = Path(root)

    async def batch(self, ops: Sequence[Op], deadline_seconds: float = 10.0) -> list[HandResult]:
        return [
            HandResult(op, HandStatus.OK, state="none")
            if isinstance(op, HookOp)
            else HandResult(op, HandStatus.REFUSED, errno.EPERM)
            for op in ops
        ]

    async def dial(self, port: int, deadline_seconds: float = 5.0) -> socket.socket:
        raise PermissionError(errno.EPERM, "no root helper to dial from a port below 1024")

    async def psi_trigger(self, kind: str, deadline_seconds: float = 5.0) -> int:
        """Since Linux 6.5 everybody may have one (`psi.widened`)."""
        path = self._root / "proc/pressure" / kind
        try:
            return psi.open_trigger(str(path), psi.TRIGGERS[kind])
        except OSError as error:
            number = error.errno or errno.EIO
            raise OSError(number, f"{path}: {os.strerror(number)}, and no root helper to open it") from None
