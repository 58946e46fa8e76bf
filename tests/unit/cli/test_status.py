"""What `guestctl status` shows."""

from dataclasses import replace
from typing import Any

import pytest

from guestd.cli.screen import Screen
from guestd.cli.status import amount_text, fitted, render, status_word
from guestd.cli.text import printable
from guestd.model.reason import Reason
from guestd.model.resources import Kind, Limits, Resources
from guestd.model.units import GIB, MIB
from guestd.model.view import GuestView, HostView, LimitsOrigin, ResizePhase, ResourceView
from guestd.model.vm import VmStatus

HOST = HostView(
    capacity=Resources(8000, 8 * GIB),
    reserve=Resources(),
    overhead=Resources(0, 64 * MIB),
    committed=Resources(4000, 2 * GIB),
    minimums=Resources(1000, 512 * MIB),
    free=Resources(4000, 6 * GIB),
    epoch=3,
    version="0.1.0",
    started_at=None,
    guests=1,
    guests_connected=1,
)
GUEST = GuestView(
    name="demo",
    limits=Limits(Resources(1000, 512 * MIB), Resources(4000, 3 * GIB)),
    limits_origin=LimitsOrigin.FILE,
    vm_status=VmStatus.RUNNING,
    connected=True,
    channel="vsock",
    resources=(
        ResourceView(
            Kind.CPU,
            demand=3500,
            target=4000,
            reserved=4000,
            plugged=3000,
            onlined=2000,
            phase=ResizePhase.PLUGGING,
            reason=Reason("demand", "4 processes run on 2 CPUs"),
        ),
        ResourceView(
            Kind.MEMORY,
            demand=1600 * MIB,
            target=1664 * MIB,
            plugged=1664 * MIB,
            onlined=1536 * MIB,
            phase=ResizePhase.IDLE,
            reason=Reason("idle", "nothing to do"),
        ),
    ),
)


def shown(*guests: GuestView, width: int | None = 80) -> str:
    return "\n".join(Screen(width).text(line) for line in render(HOST, guests, width))


def test_everything_at_80_columns() -> None:
    text = shown(GUEST)
    lines = text.splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 80
    assert lines[0].startswith("host  free 4 CPUs and 6 GiB of 8 CPUs and 8 GiB; 1 of 1 guests connected")
    assert lines[2].split() == ["GUEST", "STATUS", "NEEDS", "TARGET", "PLUGGED", "ONLINE", "MIN..MAX", "PHASE"]
    assert lines[3].split() == ["demo", "running", "CPUs", "3.5", "4", "3", "2", "1..4", "plugging"]
    assert lines[4].split() == ["GiB", "1.56", "1.62", "1.62", "1.5", "0.5..3", "idle"]
    assert "demo  cpu: 4 processes run on 2 CPUs" in text
    assert "nothing to do" not in text


def test_large_numbers_and_long_names_stay_readable_at_80_columns() -> None:
    huge = replace(
        GUEST,
        name="a-very-long-name-of-a-guest-that-goes-on",
        limits=Limits(Resources(1000, GIB), Resources(512_000, 9000 * GIB)),
        vm_status=VmStatus.UNREACHABLE,
    )
    text = shown(huge)
    assert "1..512" in text
    assert "1..9000" in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80


def test_no_guests() -> None:
    assert "No guests" in shown()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({}, "running"),
        ({"vm_status": None}, "unknown"),
        ({"vm_status": VmStatus.GONE}, "gone"),
        ({"vm_status": VmStatus.UNREACHABLE}, "unreachable"),
        ({"vm_status": VmStatus.FROZEN, "paused": True}, "frozen"),
        ({"paused": True}, "paused"),
        ({"connected": False, "degraded": "x"}, "no agent"),
        ({"degraded": "no QMP"}, "degraded"),
    ],
)
def test_the_word_that_matters_most(change: dict[str, Any], word: str) -> None:
    guest = replace(GUEST, **change)
    assert status_word(guest) == word
    assert word in shown(guest)


def test_notes_for_what_needs_words() -> None:
    guest = replace(
        GUEST,
        degraded="QMP socket is missing",
        protocol_errors=2,
        channel="unix, process-unproven",
        demand_reasons=(Reason("cpu-runnable", "4 runnable"), Reason("empty", "")),
    )
    text = shown(guest)
    for words in (
        "QMP socket is missing",
        "2 messages made no sense",
        "channel: unix, process-unproven",
        "says: 4 runnable",
    ):
        assert words in text
    assert "overdue" in shown(replace(GUEST, resources=(ResourceView(Kind.MEMORY, overdue=True),)))


def test_a_guest_cannot_steer_the_terminal_nor_use_markup() -> None:
    nasty = replace(
        GUEST,
        degraded="[red]x[/red] \x1b[2J \u202eevil\r",
        demand_reasons=(Reason("x", "[/bold]\x07"),),
    )
    text = shown(nasty)
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "\u202e" not in text
    assert "[red]x[/red] \\x1b[2J \\u202eevil\\r" in text
    assert "[/bold]\\x07" in text


def test_printable() -> None:
    assert printable("grüße, 世界") == "grüße, 世界"
    assert printable("a\nb\0\x7f\x9b\u2028") == "a\\nb\\x00\\x7f\\x9b\\u2028"
    assert printable("x" * 600) == "x" * 512 + "…"
    assert printable("\ud800") == "\\ud800"


def test_amounts() -> None:
    assert amount_text(Kind.CPU, 250) == "0.25"
    assert amount_text(Kind.MEMORY, 1536 * MIB) == "1.5"
    assert amount_text(Kind.MEMORY, 4096 * GIB) == "4096"


@pytest.mark.parametrize("width", [40, 50, 60, 79])
def test_a_narrow_terminal_gets_fewer_columns_and_whole_words(width: int) -> None:
    guest = replace(GUEST, name="a-very-long-name-of-a-guest-that-goes-on", degraded="its QMP socket " + "is " * 30)
    text = shown(guest, GUEST, width=width)
    lines = text.splitlines()
    assert max(len(line) for line in lines) <= width
    assert any(line.startswith("a-very-long") for line in lines)
    assert {"GUEST", "NEEDS", "PLUGGED"} <= set(text.split())
    assert "running" in text.split()
    assert text.split().count("is") == 30


def test_a_pipe_has_no_width() -> None:
    text = shown(replace(GUEST, degraded="x" * 300), width=None)
    assert "x" * 300 in text


def test_what_is_longer_than_the_screen_says_how_much_is_missing() -> None:
    lines = render(HOST, [GUEST] * 50, 80)
    cut = fitted(lines, 20)
    assert len(cut) == 20
    assert cut[-1][0][0] == f"… {len(lines) - 19} more lines"
    assert fitted(lines, len(lines)) == lines
