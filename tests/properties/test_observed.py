"""The world under fire while operators have guests only observed, serve them again, and reclaim what is spare."""

from collections import Counter

import pytest
from fire import HAPPENED, NAMES, WorldUnderFire, burn, guests, seconds
from hypothesis import strategies as st
from hypothesis.stateful import rule

from guestd.model.errors import AdmissionError
from guestd.model.explanation import ReclaimRequest
from guestd.model.units import MIB

EXAMPLES = 20


class ObservedUnderFire(WorldUnderFire):
    """See the module; who is observed is left alone by `guest_invariants.observed_are_left_alone`."""

    @rule(name=guests, seconds=seconds)
    def change_mode(self, name: str, seconds: float) -> None:
        if self.world.broker is not None:
            observed = name not in self.world.observed
            self.world.observe(name, observed)
            HAPPENED["observed" if observed else "served again"] += 1
        self.run(seconds)

    @rule(name=guests, mebibytes=st.sampled_from((None, 0, 200)), seconds=seconds)
    def reclaim(self, name: str, mebibytes: int | None, seconds: float) -> None:
        load = self.guest(name).load
        load.memory_bytes = 1300 * MIB
        self.run(2.5)
        load.tasks, load.memory_bytes, load.unmovable_bytes = 0.1, 100 * MIB, 0
        self.run(3.5)  # a lower need is believed by then, and it has just grown
        if self.world.broker is not None:
            memory = None if mebibytes is None else mebibytes * MIB
            try:
                dry = self.world.reclaim(name, ReclaimRequest(memory_bytes=memory, dry_run=True))
                done = self.world.reclaim(name, ReclaimRequest(memory_bytes=memory))
                assert dry == done, f"(25) a dry run says something else: {dry}, {done}"
                HAPPENED["reclaimed"] += sum(one.goal < one.reserved for one in done)
            except AdmissionError:
                HAPPENED["reclaim refused"] += 1
        self.run(seconds)

    def _peace(self) -> None:
        if self.world.broker is None:
            self.world.start_broker()
        for name in NAMES:
            self.world.observe(name, False)
        super()._peace()


@pytest.mark.timeout(600)
def test_who_is_observed_is_left_alone_and_the_others_lose_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    before: Counter[str] = Counter(HAPPENED)
    burn(EXAMPLES, machine=ObservedUnderFire)
    happened = HAPPENED - before
    with capsys.disabled():
        print(
            "\nwhile some are observed:",
            {word: happened[word] for word in ("observed", "served again", "would", "reclaimed", "reclaim refused")},
        )
    for what in ("observed", "served again", "would", "grow", "crash"):
        assert happened[what] >= 10, f"only {happened[what]} times: {what}"
