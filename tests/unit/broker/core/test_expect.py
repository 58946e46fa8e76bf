"""What guests are likely to need soon: kept while there is plenty, never granted."""

import pytest
from one_guest import BOOT, LIMITS, TIMING, USABLE, One, hello, reclaim, sent, vm

from guestd.broker.core.expect import INTERVAL_SECONDS, Expectation
from guestd.broker.core.ledger import HostCapacity
from guestd.model.messages import AckStatus, Demand, Heartbeat, Reclaim, Urgency
from guestd.model.reason import Reason
from guestd.model.resources import Kind, Resources
from guestd.model.units import GIB, MIB


def test_the_mean_need_of_an_interval_is_what_is_learned_from() -> None:
    expectation = Expectation()
    seen: dict[str, int] = {}
    now = 0.0
    for _ in range(30):
        expectation.note("a", 100, now)
        expectation.note("a", 300, now + INTERVAL_SECONDS / 2)
        expectation.note("b", 50, now)
        now += INTERVAL_SECONDS
        seen = expectation.step(now)
    # 1.1 x the largest mean of the last hour is what the law begins with
    assert 190 <= seen["a"] <= 230
    assert 45 <= seen["b"] <= 60


def test_a_guest_of_which_less_than_half_is_known_is_not_learned_from() -> None:
    expectation = Expectation()
    now = 0.0
    for _ in range(30):
        expectation.note("a", 100, now)
        expectation.note("a", None, now + INTERVAL_SECONDS / 3)
        now += INTERVAL_SECONDS
        assert expectation.step(now) == {}


def test_a_guest_that_comes_in_the_place_of_another_begins_anew() -> None:
    expectation = Expectation()
    now = 0.0
    for _ in range(20):
        expectation.note("a", 100, now)
        now += INTERVAL_SECONDS
        expectation.step(now)
    expectation.forget("a")
    expectation.note("b", 10, now)
    now += INTERVAL_SECONDS
    assert expectation.step(now) == {}


class Expecting(One):
    """It had 2 GiB for two hours."""

    def __init__(self, memory: int = 8 * GIB) -> None:
        super().__init__(HostCapacity(Resources(8000, memory)))
        self.grown(1, 2 * GIB)
        for _ in range(24):
            self.now += INTERVAL_SECONDS
            self.machine.on_heartbeat("a", self.session, Heartbeat(), self.now)
            self.machine.next_actions(self.now)
        assert self.track(Kind.MEMORY).expected > GIB


def test_what_is_likely_to_be_needed_again_is_kept_while_there_is_plenty() -> None:
    one = Expecting()
    assert not [message for message in sent(one.demand(memory=BOOT)) if isinstance(message, Reclaim)]
    one.machine.explain("a", one.now)
    reason = one.track(Kind.MEMORY).reason
    assert reason.code == "expected"
    assert "there is plenty" in reason.text


def test_nothing_is_granted_for_an_expectation() -> None:
    one = Expecting()
    one.track(Kind.MEMORY).expected = 64 * GIB
    one.demand(memory=2 * GIB)
    assert one.track(Kind.MEMORY).target == 2 * GIB


def test_what_is_no_longer_likely_is_asked_back() -> None:
    one = Expecting()
    one.demand(memory=BOOT)
    asked: list[Reclaim] = []
    for _ in range(60):
        one.now += INTERVAL_SECONDS
        one.machine.on_heartbeat("a", one.session, Heartbeat(), one.now)
        asked += [message for message in sent(one.machine.next_actions(one.now)) if isinstance(message, Reclaim)]
        if asked:
            break
    assert asked, "after five hours at its minimum it is not expected back"


@pytest.mark.parametrize("needed", [2 * GIB, 2 * GIB + 640 * MIB])
def test_as_soon_as_somebody_lacks_something_needs_alone_count(needed: int) -> None:
    one = Expecting(memory=4 * GIB)
    one.demand(memory=BOOT)
    one.machine.add_guest("b", LIMITS)
    one.machine.on_vm_state("b", vm(), one.now)
    session, _ = one.machine.on_connected("b", hello(boot=2), one.now)
    demand = Demand(
        1,
        Resources(1000, min(needed, LIMITS.max.memory_bytes)),
        Resources(1000, BOOT),
        1 << 40,
        Urgency.NOW,
        (Reason("test", "test"),),
        USABLE,
    )
    one.machine.on_demand("b", session, demand, one.now)
    actions = [*one.step(), *one.step()]
    order = reclaim(actions)
    assert order.amount == BOOT
    one.answer(order, AckStatus.DONE, BOOT)
    one.is_now(vm())
    one.step(TIMING.cool_down_seconds)
    assert one.machine.guests["b"].tracks[Kind.MEMORY].target == min(needed, LIMITS.max.memory_bytes)
