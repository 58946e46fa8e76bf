"""Units and rounding, in one place.

Decision amounts are integers: CPU in millicores (1000 = one vCPU), memory in bytes. Rounding rules:

1. A demand is rounded *up* to whole units (a VM that needs 1.2 vCPUs needs 2).
2. A limit or a capacity is rounded *down* (what does not exist as a whole unit cannot be granted),
   except a minimum, which is rounded up.
"""

import re

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40
MILLICORES_PER_VCPU = 1000

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(B|KiB|MiB|GiB|TiB)?\s*")
_FACTOR = {None: 1, "B": 1, "KiB": KIB, "MiB": MIB, "GiB": GIB, "TiB": TIB}


def round_down(amount: int, unit: int) -> int:
    """The largest multiple of `unit` that is not above `amount` (both in the same unit of measure)."""
    return amount - amount % unit


def round_up(amount: int, unit: int) -> int:
    """The smallest multiple of `unit` that is not below `amount`."""
    return -(-amount // unit) * unit


def parse_size(text: str) -> int:
    """Bytes from a size such as ``512MiB`` or ``1.5 GiB``; a bare number is bytes.

    :raise ValueError: When the text is not a size, or not a whole number of bytes.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a size; write for example 512MiB or 4GiB")
    from fractions import Fraction  # for configuration only: a guest does without

    value = Fraction(match[1]) * _FACTOR[match[2]]
    if value.denominator != 1:
        raise ValueError(f"{text!r} is not a whole number of bytes")
    return value.numerator


def parse_cpus(text: str) -> int:
    """Millicores from ``250m`` or a number of CPUs such as ``2`` or ``1.5``.

    :raise ValueError: When the text is neither, or finer than a millicore.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(m?)\s*", text)
    if match is None:
        raise ValueError(f"{text!r} is not a number of CPUs; write for example 2, 1.5 or 250m")
    value = float(match[1]) * (1 if match[2] else MILLICORES_PER_VCPU)
    if abs(value - round(value)) > 1e-6:
        raise ValueError(f"{text!r} is finer than a millicore")
    return round(value)


def format_size(amount_bytes: int) -> str:
    """A size for people, exact or to one decimal: ``512 MiB``, ``1.5 GiB``."""
    for unit, factor in (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(amount_bytes) >= factor:
            value = amount_bytes / factor
            return f"{value:.0f} {unit}" if value == int(value) else f"{value:.1f} {unit}"
    return f"{amount_bytes} B"


def format_cpus(amount_millicores: int) -> str:
    """CPUs for people: ``3``, ``0.25``."""
    return f"{amount_millicores / MILLICORES_PER_VCPU:g}"
