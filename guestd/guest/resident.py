"""Keeps this process in memory: it is needed just when there is none left.

`memory.min` protects what is charged to guestd's own group. The pages of programs and libraries are charged to whoever
read them first, which at boot is often another Python: without this they are dropped when memory is full, and each step
waits for the disk. Locked are the pages that are there, and others when they come (`MCL_ONFAULT`, Linux 4.4): nothing
is read in or filled for it. Children do not inherit it.
"""

import ctypes
import os

_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4  # <asm-generic/mman.h>: x86, Arm, RISC-V


def stay_resident() -> None:
    """Have the kernel keep all pages of this process that are in use.

    :raise OSError: When it does not, for want of a limit (`LimitMEMLOCK=`) or of the call.
    """
    mlockall = getattr(ctypes.CDLL(None, use_errno=True), "mlockall", None)
    if mlockall is None:
        raise OSError("this system has no mlockall")
    if mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
