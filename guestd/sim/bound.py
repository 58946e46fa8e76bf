"""gRPC channels whose unix sockets are bound to an abstract name before they connect: then the other side can tell
them apart, as it tells vsock peers by their CID.

By a socket mutator, gRPC's own way of having a word about a socket (grpc: src/core/lib/iomgr/socket_mutator.h). Its
layout is no promise of gRPC's: should it change, connections come from no name, and are refused.
"""

import contextlib
import ctypes
import os
import socket
from typing import Any


class _Mutator(ctypes.Structure):
    """`grpc_socket_mutator`, and a field of our own behind it."""


_Mutate = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_int, ctypes.POINTER(_Mutator))
_Compare = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
_Destroy = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Table(ctypes.Structure):
    """`grpc_socket_mutator_vtable`"""

    _fields_ = (
        ("mutate_fd", _Mutate),
        ("compare", _Compare),
        ("destroy", _Destroy),
        ("mutate_fd_2", ctypes.c_void_p),
    )


_Mutator._fields_ = (
    ("table", ctypes.POINTER(_Table)),
    ("references", ctypes.c_ssize_t),
    ("name", ctypes.c_char_p),
)


def _bind(fd: int, mutator: Any) -> bool:
    with contextlib.closing(socket.socket(fileno=os.dup(fd))) as sock:
        try:
            sock.bind(b"\0" + mutator.contents.name)
        except OSError:  # the name is still another socket's: this try to connect fails, the next may not
            return False
    return True


def _compare(one: int | None, other: int | None) -> int:
    return ((one or 0) > (other or 0)) - ((one or 0) < (other or 0))


_TABLE = _Table(_Mutate(_bind), _Compare(_compare), _Destroy(lambda _: None), None)


class BoundTo:
    """The value of a channel's option ``grpc.socket_mutator``. It must outlive the channel.

    :param name: the abstract name without its leading zero byte.
    """

    def __init__(self, name: str) -> None:
        self._mutator = _Mutator(ctypes.pointer(_TABLE), 1, os.fsencode(name))

    def __int__(self) -> int:
        """What gRPC's Python layer takes for a pointer."""
        return ctypes.addressof(self._mutator)
