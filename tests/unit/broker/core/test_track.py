"""One resize at a time: its deadlines, pauses and budget."""

from guestd.broker.core.track import Phase, Timing, Track
from guestd.model.messages import OrderId
from guestd.model.resources import Kind

TIMING = Timing(retry_seconds=5, retry_max_seconds=60, budget_window_seconds=60, budget_grows=6, budget_shrinks=3)


def test_a_phase_begins_with_a_deadline_and_ends_without_an_order() -> None:
    track = Track(Kind.CPU)
    track.begin(Phase.PLUGGING, 2000, 10.0, 4.0, 1000)
    track.order, track.doubtful = OrderId(1, 1, 1), True
    assert (track.phase, track.amount, track.deadline, track.progress) == (Phase.PLUGGING, 2000, 14.0, 1000)
    track.end()
    assert (track.phase, track.order, track.doubtful) == (Phase.IDLE, None, False)


def test_pauses_double_up_to_the_longest() -> None:
    track, pauses = Track(Kind.MEMORY), []
    for number in range(7):
        now = number * 1000.0
        track.set_back(now, TIMING)
        pauses.append(track.shrink_after - now)
    assert pauses == [5, 10, 20, 40, 60, 60, 60]
    assert track.grow_after == 6000 + 5  # growing never waits longer than the first pause
    track.succeed()
    track.set_back(10_000, TIMING)
    assert track.shrink_after == 10_005


def test_the_guest_may_ask_for_a_longer_pause_but_not_for_ever() -> None:
    track = Track(Kind.MEMORY)
    track.set_back(0, TIMING, asked_pause=30)
    assert track.shrink_after == 30
    track = Track(Kind.MEMORY)
    track.set_back(0, TIMING, asked_pause=1e9)
    assert track.shrink_after == 60


def test_a_pause_never_gets_shorter() -> None:
    track = Track(Kind.MEMORY, shrink_after=500.0, grow_after=400.0)
    track.set_back(0, TIMING)
    assert (track.shrink_after, track.grow_after) == (500, 400)


def test_grows_and_shrinks_have_a_budget_each_and_the_window_moves_on() -> None:
    track = Track(Kind.CPU)
    for number in range(3):
        assert track.in_budget(number, TIMING, shrinking=True)
        track.begin(Phase.ASKING, 0, number, 1, 0)
        track.begin(Phase.UNPLUGGING, 0, number, 1, 0)  # the same resize goes on: not counted again
        track.end()
    assert not track.in_budget(3, TIMING, shrinking=True)
    for number in range(3, 9):
        assert track.in_budget(number, TIMING, shrinking=False)
        track.begin(Phase.PLUGGING, 0, number, 1, 0)
        track.begin(Phase.PLUGGING, 0, number, 1, 0)  # goes further
        track.end()
    assert not track.in_budget(9, TIMING, shrinking=False)
    assert track.budget_back_at(9, TIMING) == 60
    assert track.in_budget(60.0, TIMING, shrinking=True)
    assert len(track.shrunk_at) == 2
    assert not track.in_budget(62, TIMING, shrinking=False)
    assert track.in_budget(63, TIMING, shrinking=False)


def test_a_shrink_that_turns_into_a_grow_is_a_grow_as_well() -> None:
    track = Track(Kind.MEMORY)
    track.begin(Phase.UNPLUGGING, 0, 1, 1, 0)
    track.begin(Phase.PLUGGING, 0, 2, 1, 0)
    assert (track.shrunk_at, track.grown_at) == ([1], [2])


def test_success_forgets_setbacks_and_being_overdue() -> None:
    track = Track(Kind.CPU, setbacks=4, overdue=True)
    track.succeed()
    assert (track.setbacks, track.overdue) == (0, False)
