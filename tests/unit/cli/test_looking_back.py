"""`guestctl get`, `events`, `history` and `explain`."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fake_client import AT, EVENTS, EXPLANATION, HISTORY, FakeClient
from test_status import GUEST

from guestd.cli import events, explain, history, one_guest
from guestd.cli.main import main
from guestd.cli.screen import Line, Screen, width_of
from guestd.model.errors import NotFoundError, UnreachableError
from guestd.model.event import Event, EventCode, EventQuery, SeenEvent
from guestd.model.resources import Kind

NASTY = "[red]x[/red]\x1b[2J\u202eevil"
SHOWN = "[red]x[/red]\\x1b[2J\\u202eevil"


def text(lines: list[Line], screen: Screen | None = None) -> str:
    return "\n".join((screen or Screen()).text(line) for line in lines)


def test_get_shows_amounts_of_both_kinds_and_what_needs_words(
    client: type[FakeClient], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["get", "demo"]) == 0
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["demo", "running"]
    assert ["needs", "3.5", "CPU", "1.6", "GiB"] in lines
    assert ["max", "4", "CPU", "3", "GiB"] in lines
    assert ["phase", "plugging", "idle"] in lines
    assert "4 processes run on 2 CPUs" in out
    assert ("guest", "demo") in client.calls


def test_get_fits_on_40_columns() -> None:
    assert all(width_of(Screen().text(line)) <= 40 for line in one_guest.render(GUEST, 40))


def test_events_are_the_newest_of_the_time_that_was_asked_for(
    client: type[FakeClient], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["events", "demo", "--since", "2026-03-10T14:00:00Z", "--until", "2026-03-10T15:00Z"]) == 0
    (query,) = (call[1] for call in client.calls if call[0] == "events")
    assert (query.guest, query.newest, query.limit) == ("demo", True, 50)
    assert query.since == datetime(2026, 3, 10, 14, tzinfo=UTC)
    assert query.until == datetime(2026, 3, 10, 15, tzinfo=UTC)
    words = [line.split()[2:] for line in capsys.readouterr().out.splitlines()]
    assert words[0] == ["demo", "growing", "cpu:", "grows", "to", "4", "CPU"]
    assert words[2] == ["-", "broker", "started"]


def test_events_as_json_are_one_value_and_followed_ones_a_line_each(
    client: type[FakeClient], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["events", "-o", "json"]) == 0
    assert [one["id"] for one in json.loads(capsys.readouterr().out)["events"]] == [7, 8, 9]
    client.stream = [SeenEvent(EVENTS[0], missed=3), UnreachableError("the socket: the broker ended the stream")]
    assert main(["events", "--follow", "-o", "json"]) == 5
    out, err = capsys.readouterr()
    assert [(one["event"]["id"], one["missed"]) for one in map(json.loads, out.splitlines())] == [
        (7, 0),
        (8, 0),
        (9, 0),
        (7, 3),
    ]
    assert ("watch", "", 9) in client.calls
    assert "no more events after number 7: the socket: the broker ended the stream" in err


def test_nothing_is_missed_between_an_empty_list_and_what_follows(
    client: type[FakeClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def events_of(self: FakeClient, query: EventQuery) -> tuple[Event, ...]:
        return EVENTS[:1] if query == EventQuery(limit=1, newest=True) else ()

    monkeypatch.setattr(FakeClient, "events", events_of)
    client.stream = [UnreachableError("gone")]
    assert main(["events", "demo", "--follow"]) == 5
    assert ("watch", "demo", 7) in client.calls


def test_what_was_missed_is_said() -> None:
    assert "3 events missed" in text(events.render(SeenEvent(EVENTS[0], missed=3), AT))


def test_events_of_a_guest_that_never_was(client: type[FakeClient], capsys: pytest.CaptureFixture[str]) -> None:
    client.past = ()
    client.error = None
    assert main(["events"]) == 0
    assert capsys.readouterr().out == "No events.\n"
    client.error = NotFoundError("no guest 'x'")
    assert main(["events", "x"]) == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["events", "--since", "then"], ["--since", "'then'", "14:02"]),
        (["events", "--since", "1h", "--until", "2h"], ["--until", "after --since"]),
        (["events", "--follow", "--until", "1h"], ["--until", "--follow"]),
        (["events", "--limit", "0"], ["--limit"]),
        (["history", "demo", "--kind", "disk"], ["--kind", "disk"]),
        (["history", "demo", "--until", "2h"], ["--until", "after --since"]),
        (["explain", "demo", "--at", "99:99"], ["--at", "'99:99'"]),
        (["explain", "demo", "--at", "2999-03-01T14:02:00Z"], ["--at", "2999-03-01", "is in the future"]),
        (["explain"], ["GUEST"]),
    ],
)
def test_bad_values_name_option_and_way_out(
    client: type[FakeClient], capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    assert main(arguments) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert all(word in said for word in words)
    assert client.calls == []


def test_explain_says_why_from_what_and_what_it_would_take(
    client: type[FakeClient], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", "demo", "--at", "2026-03-10T14:02:00Z"]) == 0
    assert ("explain", "demo", AT) in client.calls
    out = capsys.readouterr().out
    for words in (
        "CPU: has 4 CPUs because it asked for 3.5",
        "why: as much as it needs",
        "needs 3.5 CPU; uses 3.1 CPU; has 4 CPU (3 CPU plugged)",
        "limits 1 CPU to 4 CPU",
        "the host has 8 CPU, 4 CPU free, too little for all",
        "the guest says: 4 runnable",
        "1. raise its max: guestctl set-limits demo --cpu-max 6",
        "growing      cpu: grows to 4 CPU",
        "Memory: has 1.6 GiB, all that it asks for",
    ):
        assert words in out


def test_a_time_of_which_nothing_is_recorded_is_a_failure(
    client: type[FakeClient], capsys: pytest.CaptureFixture[str]
) -> None:
    client.unknown_time = True
    assert main(["explain", "demo", "--at", "2026-03-10T14:02:00Z", "-o", "json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["unknown_time"] is True
    assert "nothing is recorded of 2026-03-10" in err
    assert "guestctl events demo" in err


@pytest.mark.parametrize("width", [40, 60, 100])
def test_explain_and_events_fit_on_narrow_terminals_with_all_their_words(width: int) -> None:
    later = AT + timedelta(days=2)
    lines = explain.render(EXPLANATION, None, later, width)
    assert all(width_of(Screen().text(line)) <= width for line in lines)
    assert text(lines).split() == text(explain.render(EXPLANATION, None, later, 1000)).split()
    for event in EVENTS:
        narrow = events.render(SeenEvent(event), AT, width)
        assert all(width_of(Screen().text(line)) <= width for line in narrow)
        assert event.text.split()[-1] in text(narrow).split()


def test_nobody_steers_the_terminal_by_the_text_of_an_event() -> None:
    event = Event(1, AT, NASTY, Kind.CPU, EventCode.REFUSED, NASTY)
    found = text(events.render(SeenEvent(event), AT))
    assert found.count(SHOWN) == 2
    assert "\x1b" not in found


def test_history_is_a_table_where_there_is_no_terminal(
    client: type[FakeClient], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["history", "demo", "--since", "2026-03-10T14:00Z", "--kind", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["demo", "CPUs"]
    assert lines[1].split() == ["TIME", "NEEDS", "GRANTED", "PLUGGED", "USABLE", "USED"]
    assert lines[12].split()[1:] == ["1", "1.4", "2", "1", "0.5"]
    assert len(lines) == 2 + len(HISTORY.points)


def test_history_for_programs_is_of_the_kind_that_was_asked_for(
    client: type[FakeClient], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["history", "demo", "--since", "2026-03-10T14:00Z", "--kind", "memory", "-o", "json"]) == 0
    assert {key for point in json.loads(capsys.readouterr().out)["points"] for key in point} == {"at", "memory"}


def test_history_is_plotted_on_a_terminal() -> None:
    screen = Screen(width=80, height=24)
    plotted = text(history.render("demo", HISTORY, (Kind.CPU, Kind.MEMORY), screen), screen)
    assert "• needs  o granted  + plugged  · usable" in plotted
    assert plotted.count("┌") == 2
    for sign in "•o+·":
        assert plotted.count(sign) > 20
    assert "\x1b" not in plotted
    assert max(map(width_of, plotted.splitlines())) <= 80
    coloured = Screen(width=80, height=24, colours=True)
    assert "\x1b[3" in text(history.render("demo", HISTORY, (Kind.CPU,), coloured), coloured)
    narrow = Screen(width=59, height=24)
    table = text(history.render("demo", HISTORY, (Kind.CPU,), narrow), narrow)
    assert "GRANTED" in table
    assert max(map(len, table.splitlines())) <= 59


def test_a_plot_of_a_single_point_of_nothing_is_one_too() -> None:
    one = replace(HISTORY, points=HISTORY.points[:1])
    screen = Screen(width=60, height=24)
    assert "┌" in text(history.render("demo", one, (Kind.CPU,), screen), screen)


def test_a_broker_elsewhere_is_asked_with_the_files_of_options_and_environment(
    client: type[FakeClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GUESTD_HOST", "192.0.2.1:9755")
    monkeypatch.setenv("GUESTD_CA", "/ca.pem")
    assert main(["get", "demo", "--cert", "/c.pem", "--key", "/k.pem"]) == 0
    assert ("remote", "192.0.2.1:9755", Path("/c.pem"), Path("/k.pem"), Path("/ca.pem")) in client.calls


def test_a_broker_elsewhere_needs_all_files(client: type[FakeClient], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--host", "192.0.2.1:9755", "--cert", "/c.pem", "--ca", "/ca.pem"]) == 2
    assert "--key (or GUESTD_KEY)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["set-limits", "demo", "--reset"], ["pause", "demo"], ["resume", "demo"], ["reclaim", "demo", "--dry-run"]],
)
def test_a_broker_elsewhere_is_never_changed(
    client: type[FakeClient], capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert main([*arguments, "--host", "192.0.2.1:9755"]) == 3
    assert "only possible on the host itself" in capsys.readouterr().err
    assert client.calls == []


def test_what_cannot_be_reached_elsewhere_has_its_own_advice(
    client: type[FakeClient], capsys: pytest.CaptureFixture[str]
) -> None:
    client.error = UnreachableError("192.0.2.1:9755: nobody answers")
    files: list[Any] = ["--cert", "/c.pem", "--key", "/k.pem", "--ca", "/ca.pem"]
    assert main(["status", "--host", "192.0.2.1:9755", *files]) == 5
    assert "[monitor]" in capsys.readouterr().err
