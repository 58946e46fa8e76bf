"""Points in time as people write them, and as they are shown to them: in their own time zone."""

import re
from datetime import UTC, datetime, timedelta
from typing import Final

_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_LONGEST_SECONDS: Final = 3660 * 86_400


def now() -> datetime:
    """Now, UTC."""
    return datetime.now(UTC)


def duration(text: str) -> float:
    """Seconds from ``90s``, ``30m``, ``1.5h``, ``2d`` or ``1w``.

    :raise ValueError: When it is none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhdw])\s*", text)
    seconds = float(match[1]) * _SECONDS[match[2]] if match else 0.0
    if not 0 < seconds <= _LONGEST_SECONDS:
        raise ValueError(f"{text!r} is not a time span; write for example 90s, 30m, 1h or 2d")
    return seconds


def point(text: str, present: datetime) -> datetime:
    """A point in time, UTC: a span before the present, a time of the day (the last one), or ISO 8601;
    without a time zone this machine's is meant.

    :raise ValueError: When it is none of them.
    """
    try:
        return (present - timedelta(seconds=duration(text))).astimezone(UTC)
    except ValueError:
        pass
    clock = re.fullmatch(r"\s*(\d{1,2}):(\d{2})(?::(\d{2}))?\s*", text)
    try:
        if clock is not None:
            hour, minute, second = int(clock[1]), int(clock[2]), int(clock[3] or 0)
            local = present.astimezone().replace(hour=hour, minute=minute, second=second, microsecond=0, tzinfo=None)
            at = local.astimezone(UTC)
            return at if at <= present else (local - timedelta(days=1)).astimezone(UTC)
        return datetime.fromisoformat(text.strip()).astimezone(UTC)
    except (ValueError, OverflowError, OSError):
        raise ValueError(
            f"{text!r} is not a point in time; write for example 1h (ago), 14:02 or 2026-03-01T14:02:00"
        ) from None


def shown(at: datetime, present: datetime, width: int | None = None) -> str:
    """The time for people: without its day where that is the present one and the screen is narrow."""
    local = at.astimezone()
    narrow = width is not None and width < 80
    today = local.date() == present.astimezone().date()
    return f"{local:%H:%M:%S}" if narrow and today else f"{local:%Y-%m-%d %H:%M:%S}"
