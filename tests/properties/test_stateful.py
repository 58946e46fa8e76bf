"""Both cores under fire for 20,000 steps, see `fire`. Derandomized: the same code gives the same examples."""

import pytest
from fire import HAPPENED, burn, report

EXAMPLES = 190
STEPS = 20_000
AT_LEAST = 200


@pytest.mark.timeout(900)
def test_every_promise_holds_under_fire_and_peace_converges(capsys: pytest.CaptureFixture[str]) -> None:
    HAPPENED.clear()
    burn(EXAMPLES)
    with capsys.disabled():
        print(f"\nunder fire, by what happened in the cores:\n{report()}")
    assert HAPPENED["step"] >= STEPS
    for what in (
        "grow",
        "shrink",
        "partial",
        "refusal",
        "overdue",
        "crash",
        "clock step",
        "lost",
        "duplicated",
        "delayed",
    ):
        assert HAPPENED[what] >= AT_LEAST, f"only {HAPPENED[what]} times: {what}"
