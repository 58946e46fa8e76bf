"""Points in time as people write them."""

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

from guestd.cli.when import duration, point, shown

NOW = datetime(2026, 3, 10, 12, 30, tzinfo=UTC)


@pytest.fixture(autouse=True)
def _zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "XYZ-2")  # two hours ahead of UTC
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("1h", NOW - timedelta(hours=1)),
        ("1.5h", NOW - timedelta(minutes=90)),
        ("2d", NOW - timedelta(days=2)),
        ("14:02", datetime(2026, 3, 10, 12, 2, tzinfo=UTC)),
        ("14:30:00", NOW),
        ("14:31", datetime(2026, 3, 9, 12, 31, tzinfo=UTC)),  # not yet today
        ("2026-03-01T14:02:00", datetime(2026, 3, 1, 12, 2, tzinfo=UTC)),
        ("2026-03-01T14:02:00Z", datetime(2026, 3, 1, 14, 2, tzinfo=UTC)),
        ("2026-03-01", datetime(2026, 2, 28, 22, 0, tzinfo=UTC)),
    ],
)
def test_points_in_time(text: str, at: datetime) -> None:
    assert point(text, NOW) == at


@pytest.mark.parametrize("text", ["", "soon", "25:00", "14:61", "-1h", "1", "0s", "9999999d", "2026-13-01", "1h 2m"])
def test_what_is_no_time_says_how_to_write_one(text: str) -> None:
    with pytest.raises(ValueError, match=r"write for example 1h \(ago\), 14:02"):
        point(text, NOW)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), (" 2 h ", 7200), ("1w", 604_800)])
def test_time_spans(text: str, seconds: float) -> None:
    assert duration(text) == seconds


def test_times_are_shown_in_this_zone_and_short_where_there_is_little_room() -> None:
    assert shown(NOW, NOW) == "2026-03-10 14:30:00"
    assert shown(NOW, NOW, 40) == "14:30:00"
    assert shown(NOW - timedelta(days=1), NOW, 40) == "2026-03-09 14:30:00"
