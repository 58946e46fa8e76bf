"""Records survive being written and read."""

import pytest
from demo_worlds import good

from guestd.cli.demo.timeline import Guest, Load, Timeline, from_json, lines, read_lines, to_json


def test_every_kind_of_record_comes_back() -> None:
    timeline = good()
    again = read_lines(lines(timeline.records))
    assert len({type(record) for record in timeline.records}) == 7
    assert [type(record) for record in again.records] == [type(record) for record in timeline.records]
    for before, after in zip(timeline.records, again.records, strict=True):
        assert to_json(before) == to_json(after)


def test_a_line_says_its_source_first() -> None:
    line = to_json(Load(1.00004, 2.0, "cpu-onset", "4"))
    assert line == '{"source": "load", "t": 1.0, "guest_t": 2.0, "event": "cpu-onset", "detail": "4"}'


@pytest.mark.parametrize(
    "line", ["", "nonsense", "[]", "null", "{}", '{"source": "x"}', '{"source": "load", "t": 1}', '{"source": []}']
)
def test_what_is_no_record_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match=r"not a record|Expecting"):
        from_json(line)


def test_empty_lines_are_passed_over() -> None:
    assert read_lines(["\n", to_json(Load(1, 2, "end")) + "\n"]).load("end") is not None


def test_the_guests_records_are_in_the_order_of_its_clock() -> None:
    late, early = (Guest(t, guest_t, 1, 1, 1, 0, 0, 0) for t, guest_t in ((1.0, 20.0), (2.0, 10.0)))
    timeline = Timeline((late, early))
    assert timeline.of(Guest) == [early, late]
    assert timeline.end == 2.0
    assert timeline.load("end") is None
