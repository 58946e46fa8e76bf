"""What happened, asked of a real store: over restarts, by time, followed, flooded."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guestd.broker.core.guest import GuestState
from guestd.broker.history import feed
from guestd.broker.history import store as store_module
from guestd.broker.history.store import Store
from guestd.model.errors import HistoryError
from guestd.model.event import DecisionInputs, EventCode, EventQuery
from guestd.model.reason import Reason
from guestd.model.resources import Kind, Limits, Resources
from guestd.model.units import GIB

BEGIN = datetime(2026, 3, 1, 14, 0, tzinfo=UTC)
LIMITS = Limits(Resources(1000, GIB), Resources(4000, 8 * GIB))


class Wall:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = BEGIN

    def __call__(self) -> float:
        return self.now.timestamp()

    def at(self, hour: int, minute: int, second: float = 0.0) -> None:
        self.now = BEGIN.replace(hour=hour, minute=minute) + timedelta(seconds=second)


@pytest.fixture
def wall() -> Wall:
    return Wall()


@pytest.fixture
async def store(tmp_path: Path, wall: Wall) -> AsyncIterator[Store]:
    one = Store(tmp_path / "history.db", 4 << 20, wall, changed=taken)
    await one.start()
    yield one
    await one.stop()


CHANGED: list[GuestState] = []


def taken() -> list[GuestState]:
    found = CHANGED[:]
    CHANGED.clear()
    return found


def look(store: Store, *guests: GuestState) -> None:
    """Those changed."""
    CHANGED.extend(guests)
    store.look()


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)


def inputs(demand: int) -> DecisionInputs:
    return DecisionInputs(demand, demand, LIMITS, 4000, 4000, demand, capacity=8000, free=100)


def guest(name: str, reserved: int) -> GuestState:
    one = GuestState(name, LIMITS)
    one.tracks[Kind.CPU].reserved = reserved
    return one


async def test_everything_is_there_again_after_a_restart(tmp_path: Path, wall: Wall) -> None:
    path = tmp_path / "history.db"
    first = Store(path, 4 << 20, wall, changed=taken)
    await first.start()
    first.note(EventCode.GROWING, "growing", "a", Kind.CPU, 1000, 2000, Reason("demand", "needs 2 CPU"), inputs(2000))
    look(first, guest("a", 2000))
    wall.at(14, 1)
    look(first, guest("a", 3000))
    before = await first.events(EventQuery())
    wall.at(14, 2, 3)
    look(first, guest("a", 3500))
    wall.at(14, 2, 7)
    await first.stop()
    wall.at(14, 5)
    second = Store(path, 4 << 20, wall, changed=taken)
    await second.start()
    assert await second.events(EventQuery()) == before
    second.note(EventCode.GROWN, "grown", "a", Kind.CPU)
    look(second, guest("a", 1000))
    wall.at(14, 6)
    found = await second.events(EventQuery())
    assert [one.id for one in found] == [1, 2]
    history = await second.history("a", BEGIN, None, 0)
    assert history.step_seconds == 10.0
    reserved = {(point.at - BEGIN).seconds: point.resources[0].reserved for point in history.points}
    expected = dict.fromkeys(range(0, 60, 10), 2000) | dict.fromkeys(range(60, 120, 10), 3000) | {120: 3500}
    expected |= dict.fromkeys(range(300, 360, 10), 1000)
    assert reserved == expected, "what nobody recorded is left out"
    await second.stop()


async def test_an_event_that_nobody_follows_is_put_together_soon_and_one_that_is_followed_at_once(
    store: Store, wall: Wall
) -> None:
    store.note(EventCode.OPERATOR, "first", "a")
    assert store._feed.events(EventQuery()) == ()
    await asyncio.sleep(0.6)
    assert [one.text for one in store._feed.events(EventQuery())] == ["first"]
    store.note(EventCode.OPERATOR, "second", "a")
    stream = store.follow("", 1)
    assert (await anext(stream)).event.text == "second"
    wall.at(14, 1)
    store.note(EventCode.OPERATOR, "third", "a")
    newest = store._feed.events(EventQuery())[-1]
    assert (newest.text, newest.at) == ("third", wall.now)
    assert (await anext(stream)).event == newest
    assert store._feed.events(EventQuery())[1].at == BEGIN, "when it happened, not when it was put together"
    await stream.aclose()


async def test_who_asks_and_goes_away_takes_nothing_along(store: Store, wall: Wall) -> None:
    going = threading.Event()
    store._thread.submit(going.wait)  # a slow disk
    store.note(EventCode.OPERATOR, "noted", "a")
    look(store, guest("a", 3000))
    wall.at(14, 0, 11)
    store._tick()
    question = asyncio.create_task(store.events(EventQuery()))
    await asyncio.sleep(0.05)
    question.cancel()
    await asyncio.gather(question, return_exceptions=True)
    assert question.cancelled()
    going.set()
    assert [one.text for one in await store.events(EventQuery())] == ["noted"]
    assert [one.resources[0].reserved for one in (await store.history("a", BEGIN, None, 0)).points] == [3000, 3000]
    assert store._tally.events_lost == store._tally.samples_lost == 0


async def test_what_no_file_can_hold_is_lost_alone_and_the_writer_goes_on(
    tmp_path: Path, wall: Wall, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(store_module, "_WRITE_SECONDS", 0.02)
    store = Store(tmp_path / "history.db", 4 << 20, wall, changed=taken)
    await store.start()
    store.note(EventCode.BROKER, "refused: caf\udce9.toml", "", reason=Reason("\ud800", "\ud800" * 300))
    look(store, guest("a", 1 << 70))
    wall.at(14, 0, 11)
    store._tick()
    await until(lambda: store._tally.samples_lost > 0)
    look(store, guest("a", 2000))
    store.note(EventCode.OPERATOR, "afterwards", "a")
    await until(lambda: "can be written again" in caplog.text)
    found = await store.events(EventQuery())
    assert [one.text for one in found if one.code is EventCode.OPERATOR] == ["afterwards"]
    await store.stop()


async def test_a_text_that_is_none_in_utf_8_is_kept_escaped(store: Store) -> None:
    store.note(EventCode.BROKER, "refused: caf\udce9.toml", "", reason=Reason("\ud800", "\ud800" * 300))
    (found,) = await store.events(EventQuery())
    assert found.text == "refused: caf\\udce9.toml"
    assert found.reason is not None
    assert found.reason.code == "\\ud800"
    assert len(found.reason.text.encode()) == 512
    assert store._feed.events(EventQuery()) == (found,)


async def test_what_changes_in_quick_succession_is_seen_together_and_nothing_that_lasts_is_missed(
    store: Store, wall: Wall
) -> None:
    async def highest() -> int:
        return max(point.resources[0].reserved for point in (await store.history("a", BEGIN, None, 0)).points)

    one = guest("a", 1000)
    look(store, one)
    for reserved in (2000, 3000):
        one.tracks[Kind.CPU].reserved = reserved
        look(store, one)
    wall.at(14, 0, 1)
    assert await highest() == 3000, "whoever asks sees it at once"
    one.tracks[Kind.CPU].reserved = 4000
    look(store, one)  # and nothing else happens
    await asyncio.sleep(0.6)
    one.tracks[Kind.CPU].reserved = 1000
    look(store, one)
    wall.at(14, 0, 11)
    assert await highest() == 4000


async def test_quiet_guests_are_written_again_after_a_time_in_which_nothing_was(
    store: Store, wall: Wall, tmp_path: Path
) -> None:
    quiet = [guest(f"web-{number}", 2000) for number in range(20)]
    look(store, *quiet)
    for minute in range(1, 6):
        wall.at(14, minute)
        await store.events(EventQuery())
        if minute == 3:
            (tmp_path / "history.db").rename(tmp_path / "elsewhere")
            store.note(EventCode.OPERATOR, "so that something is written", "a")
    for one in quiet:
        history = await store.history(one.name, BEGIN, None, 0)
        begins = [(point.at - BEGIN).seconds for point in history.points]
        assert begins == list(range(begins[0], 300, 10)), one.name
        assert 180 <= begins[0] <= 250


async def test_a_range_has_its_begin_and_not_its_end(store: Store, wall: Wall) -> None:
    for second in (0, 1, 1, 2):
        wall.at(14, 0, second)
        store.note(EventCode.OPERATOR, f"{second}", "a")
    since, until = BEGIN + timedelta(seconds=1), BEGIN + timedelta(seconds=2)
    assert [one.id for one in await store.events(EventQuery(since=since, until=until))] == [2, 3]
    assert [one.id for one in await store.events(EventQuery("a", until=since))] == [1]
    assert [one.id for one in await store.events(EventQuery(since=until, newest=True))] == [4]


async def test_why_was_it_shrunk_at_14_02(store: Store, wall: Wall) -> None:
    def decide(code: EventCode, text: str, demand: int) -> None:
        store.note(code, text, "web-1", Kind.CPU, 4000, demand, Reason("demand", f"needs {demand}"), inputs(demand))

    wall.at(14, 0)
    decide(EventCode.GROWN, "grown to 4 CPU", 4000)
    wall.at(14, 2, 17.3)
    decide(EventCode.SHRUNK, "shrunk to 2 CPU", 2000)
    store.note(EventCode.SHRUNK, "another's", "web-2", Kind.CPU)
    store.note(EventCode.SHRUNK, "another kind", "web-1", Kind.MEMORY)
    store.note(EventCode.VM, "no decision", "web-1", Kind.CPU)
    wall.at(14, 9)
    decide(EventCode.GROWN, "grown to 3 CPU", 3000)
    for at, text, demand in (
        ((14, 0, 0.0), "grown to 4 CPU", 4000),
        ((14, 2, 0.0), "shrunk to 2 CPU", 2000),  # a whole minute is all of it
        ((14, 2, 17.0), "grown to 4 CPU", 4000),
        ((14, 2, 17.3), "shrunk to 2 CPU", 2000),
        ((14, 8, 59.0), "shrunk to 2 CPU", 2000),
        ((23, 0, 0.0), "grown to 3 CPU", 3000),
    ):
        wall.at(*at)
        past = await store.past("web-1", wall.now)
        decision = past[Kind.CPU].decision
        assert decision is not None
        assert (decision.text, decision.inputs) == (text, inputs(demand))
        assert [one.text for one in past[Kind.CPU].events] == [
            "grown to 4 CPU",
            "shrunk to 2 CPU",
            "no decision",
            "grown to 3 CPU",
        ]
    nothing = await store.past("web-1", BEGIN - timedelta(minutes=3))
    assert nothing[Kind.CPU].decision is nothing[Kind.MEMORY].decision is None


async def test_ten_events_before_and_ten_after(store: Store, wall: Wall) -> None:
    for number in range(40):
        wall.at(14, number)
        store.note(EventCode.GROWN, f"{number}", f"web-{number % 2}", Kind.CPU)
        store.note(EventCode.OPERATOR, f"{number}", "web-0", Kind.MEMORY)
    past = await store.past("web-0", BEGIN + timedelta(minutes=20, seconds=30))
    assert [int(one.text) for one in past[Kind.CPU].events] == [*range(2, 21, 2), *range(22, 40, 2)]
    assert [int(one.text) for one in await store.last_events("web-0", Kind.MEMORY)] == list(range(20, 40))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["", "a", "b"])), max_size=30),
    st.sampled_from(["", "a", "c"]),
    st.none() | st.integers(-1, 40),
    st.none() | st.integers(-1, 40),
    st.integers(0, 35),
    st.integers(1, 12),
    st.booleans(),
)
def test_the_file_answers_like_a_list(
    tmp_path_factory: pytest.TempPathFactory,
    made: list[tuple[int, str]],
    name: str,
    since: int | None,
    until: int | None,
    after: int,
    limit: int,
    newest: bool,
) -> None:
    async def run() -> None:
        wall = Wall()
        store = Store(tmp_path_factory.mktemp("h") / "history.db", 1 << 20, wall)
        await store.start()
        held = store._feed
        for later, one in made:
            wall.now += timedelta(seconds=later)
            store.note(EventCode.OPERATOR, "x", one)
        begin, end = (None if one is None else BEGIN + timedelta(seconds=one) for one in (since, until))
        query = EventQuery(name, begin, end, after, limit, newest)
        assert await store.events(query) == held.events(query)
        await store.stop()

    asyncio.run(run())


async def test_following_begins_after_what_was_seen_and_never_leaves_one_out(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "TAIL", 50)
    store._feed._tail = type(store._feed._tail)(maxlen=50)
    for number in range(2500):
        store.note(EventCode.OPERATOR, f"{number}", "ab"[number % 2])
    stream = store.follow("", 100)
    seen = [await anext(stream) for _ in range(1500)]
    for number in range(2500, 2600):
        store.note(EventCode.OPERATOR, f"{number}", "a")
    seen += [await anext(stream) for _ in range(1000)]
    assert [one.event.id for one in seen] == list(range(101, 2601))
    assert not any(one.missed for one in seen)
    await stream.aclose()
    assert store._feed._followers == []
    for beyond in (0, 10_000_000):
        live = store.follow("a", beyond)
        first = asyncio.ensure_future(anext(live))
        await asyncio.sleep(0)
        store.note(EventCode.OPERATOR, "now", "b")
        store.note(EventCode.OPERATOR, "now", "a")
        assert (await first).event.guest == "a"
        await live.aclose()


async def test_a_flapping_guest_leaves_a_count_and_others_are_not_concerned(store: Store) -> None:
    for number in range(500):
        store.note(EventCode.CHANNEL, f"connected {number}", "bad")
    store.note(EventCode.CHANNEL, "connected", "good")
    store.note(EventCode.OPERATOR, "paused", "bad")
    kept = await store.events(EventQuery("bad"))
    assert len(kept) == 21
    assert kept[-1].text == "paused"
    assert len(await store.events(EventQuery("good"))) == 1
    store._floods._buckets["bad"].tokens = 10
    await asyncio.wait_for(_until(store, "480 events were left out: too many at once"), 10)


async def _until(store: Store, text: str) -> None:
    stream = store.follow("bad", 0)
    while (await anext(stream)).event.text != text:
        pass
    await stream.aclose()


async def test_texts_are_bounded(store: Store) -> None:
    store.note(EventCode.CHANNEL, "ü" * 10_000, "a", reason=Reason("c" * 1000, "\x1b" * 10_000))
    (found,) = await store.events(EventQuery())
    assert found.text == "ü" * 256
    assert found.reason == Reason("c" * 64, "\x1b" * 512)


async def test_a_range_that_is_none_is_refused(store: Store) -> None:
    for since, until in ((BEGIN, BEGIN), (BEGIN, BEGIN - timedelta(days=1))):
        with pytest.raises(ValueError, match="begin before it ends"):
            await store.history("a", since, until, 100)
    with pytest.raises(ValueError, match=r"must be within 1\.\.2000"):
        await store.history("a", None, None, 2001)


async def test_what_cannot_be_read_is_no_empty_past(tmp_path: Path, wall: Wall) -> None:
    (tmp_path / "history.db").mkdir()
    store = Store(tmp_path / "history.db", 4 << 20, wall, changed=taken)
    await store.start()
    store.note(EventCode.OPERATOR, "seen", "a")
    for question in (store.history("a", BEGIN - timedelta(hours=1), None, 0), store.past("a", BEGIN)):
        with pytest.raises(HistoryError, match=r"^history .*history.db: .*make .* writable for user"):
            await question
    assert [one.text for one in await store.events(EventQuery("a"))] == ["seen"], "the newest are in memory"
    (tmp_path / "history.db").rmdir()
    assert (await store.history("a", BEGIN - timedelta(hours=1), None, 0)).points == ()
    await store.stop()
    with pytest.raises(HistoryError, match="it is closed"):
        await store.history("a", BEGIN - timedelta(hours=1), None, 0)


async def test_history_of_a_day_is_in_minutes_and_no_longer_than_asked_for(store: Store, wall: Wall) -> None:
    for minute in range(26 * 60):
        wall.now = BEGIN + timedelta(minutes=minute, seconds=5)
        look(store, guest("a", 1000 + minute))
    day = await store.history("a", wall.now - timedelta(days=1), None, 2000)
    assert day.step_seconds == 60.0
    assert len(day.points) == 1440
    assert [point.resources[0].reserved for point in day.points] == list(range(1000 + 120, 1000 + 1560))
    fewer = await store.history("a", wall.now - timedelta(days=1), None, 100)
    assert fewer.step_seconds == 900.0
    assert len(fewer.points) == 96
    week = await store.history("a", wall.now - timedelta(days=7), None, 2000)
    assert week.step_seconds == 600.0
    assert len(week.points) == 156
    assert (await store.history("nobody", None, None, 0)).points == ()


async def test_a_question_waits_for_the_disk_and_the_loop_does_not(store: Store) -> None:
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    for number in range(3000):
        store.note(EventCode.OPERATOR, f"{number}", "a")
    found = await store.events(EventQuery(limit=5000))
    counting.cancel()
    assert len(found) == 3000
    assert turns > 3


async def test_a_peak_before_a_crash_is_in_the_longer_steps_too(tmp_path: Path, wall: Wall) -> None:
    path = tmp_path / "history.db"
    first = Store(path, 4 << 20, wall, changed=taken)
    await first.start()
    for second, reserved in ((3, 1000), (14, 4000), (27, 1000), (41, 1000)):
        wall.at(14, 0, second)
        look(first, guest("a", reserved))
    await first.events(EventQuery())  # so that what was to be written is
    assert first._task is not None
    first._task.cancel()
    first._file._close()
    wall.at(14, 3)
    second = Store(path, 4 << 20, wall, changed=taken)
    await second.start()
    look(second, guest("a", 2000))
    wall.at(14, 20)
    for age, step in ((timedelta(hours=20), 60.0), (timedelta(days=7), 600.0)):
        history = await second.history("a", wall.now - age, None, 2000)
        assert history.step_seconds == step
        assert history.points[0].resources[0].reserved == 4000
    await second.stop()
