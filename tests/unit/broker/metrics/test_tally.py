"""What is counted as it happens."""

from pathlib import Path

from guestd.broker.history.store import Store
from guestd.broker.metrics.tally import ROUND_SECONDS, Tally
from guestd.model.event import EventCode


def test_a_round_is_in_the_bucket_of_its_upper_bound() -> None:
    tally = Tally()
    for seconds in (0.0, ROUND_SECONDS[0], ROUND_SECONDS[1], ROUND_SECONDS[-1], ROUND_SECONDS[-1] * 1.01):
        tally.count_round(seconds)
    assert (tally.rounds[0], tally.rounds[1], tally.rounds[-2], tally.rounds[-1]) == (2, 1, 1, 1)
    assert len(tally.rounds) == len(ROUND_SECONDS) + 1


async def test_what_the_history_cannot_keep_is_counted(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    tally = Tally()
    store = Store(tmp_path / "file" / "history.db", 1 << 20, tally=tally)
    await store.start()
    store.note(EventCode.GROWN, "grown", "a")
    store.note(EventCode.BROKER, "broker stops")
    await store.stop()
    assert tally.events_lost >= 2 and tally.events_left_out == 0  # these two, and that it cannot be written


async def test_what_is_left_out_of_a_flood_is_counted(tmp_path: Path) -> None:
    tally = Tally()
    store = Store(tmp_path / "history.db", 1 << 20, tally=tally)
    await store.start()
    for _ in range(10_000):
        store.note(EventCode.GROWN, "grown", "a")
    await store.stop()
    assert tally.events_left_out > 5_000 and tally.events_lost == 0
