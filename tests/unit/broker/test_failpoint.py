"""Points at which a test can have the broker die."""

import subprocess
import sys

import pytest

from guestd.broker.failpoint import VARIABLE, Failpoint, parse

CHILD = """
import sys
from guestd.broker.failpoint import Failpoint, reach
for name in sys.argv[1:]:
    reach(Failpoint(name))
    print(name, flush=True)
"""


def passed(armed: str, *names: str) -> tuple[int, list[str]]:
    """How a process ends that passes these points, and which it left behind."""
    ended = subprocess.run(
        [sys.executable, "-c", CHILD, *names], env={VARIABLE: armed}, capture_output=True, text=True, check=False
    )
    return ended.returncode, ended.stdout.split()


def test_the_wanted_passage_of_the_wanted_point_kills_and_no_other() -> None:
    assert passed("", "decided", "recorded") == (0, ["decided", "recorded"])
    assert passed("recorded", "decided", "recorded") == (-9, ["decided"])
    assert passed("decided:2", "decided", "recorded", "decided", "recorded") == (-9, ["decided", "recorded"])
    assert passed("decided:3", "decided", "decided") == (0, ["decided", "decided"])


def test_what_the_variable_says() -> None:
    assert parse({}) == (None, 0)
    assert parse({VARIABLE: "acted"}) == (Failpoint.ACTED, 1)
    assert parse({VARIABLE: "acted:7"}) == (Failpoint.ACTED, 7)


@pytest.mark.parametrize("text", ["nowhere", "acted:", "acted:0", "acted:-1", "acted:x", ":1"])
def test_nonsense_is_refused_with_what_there_is(text: str) -> None:
    with pytest.raises(ValueError, match=r"must be NAME or NAME:N, with a name of started, decided, "):
        parse({VARIABLE: text})
