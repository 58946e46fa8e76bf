"""`guestctl pause`, `resume`, `reclaim` and `set-limits --wait`: when a VM has settled into what was wanted."""

import json
from dataclasses import replace

import pytest
from fake_client import RECLAIMED, FakeClient
from test_status import GUEST

from guestd.cli.main import main
from guestd.cli.settle import missing_for_pause, missing_for_reclaim, missing_for_rest
from guestd.model.explanation import ReclaimRequest
from guestd.model.reason import Reason
from guestd.model.resources import Kind
from guestd.model.units import GIB
from guestd.model.view import GuestView, ResizePhase, ResourceView
from guestd.model.vm import VmStatus

AT_REST = replace(
    GUEST,
    resources=(
        ResourceView(Kind.CPU, target=2000, reserved=2000, plugged=2000, phase=ResizePhase.IDLE),
        ResourceView(Kind.MEMORY, target=GIB, reserved=GIB, plugged=GIB, phase=ResizePhase.IDLE),
    ),
)


def with_cpu(guest: GuestView = AT_REST, **change: object) -> GuestView:
    return replace(guest, resources=(replace(guest.resources[0], **change), guest.resources[1]))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("guest", "words"),
    [
        (AT_REST, ""),
        (with_cpu(phase=ResizePhase.PLUGGING), "cpu has 2 CPU, plugging"),
        (with_cpu(overdue=True, reason=Reason("refused", "it \x07 refused")), "overdue (it \\x07 refused)"),
        (with_cpu(reserved=4000), "cpu has 4 CPU, is to go down to 2 CPU"),
        (with_cpu(target=3000), "cpu has 2 CPU, is to get 3 CPU"),
        (with_cpu(target=1900, at_rest=True), ""),
        (replace(AT_REST, paused=True), "guestctl resume demo"),
        (replace(AT_REST, observed=True), "observe mode"),
        (replace(AT_REST, vm_status=VmStatus.UNREACHABLE), "VM is unreachable"),
        (replace(AT_REST, vm_status=None), "not known yet"),
    ],
)
def test_what_is_missing_until_a_vm_is_at_rest(guest: GuestView, words: str) -> None:
    assert words in "; ".join(missing_for_rest(guest))
    assert bool(missing_for_rest(guest)) == bool(words)


def test_a_pause_is_there_once_nothing_moves() -> None:
    paused = replace(AT_REST, paused=True)
    assert missing_for_pause(paused) == []
    assert missing_for_pause(AT_REST) == ["it is not paused yet"]
    assert missing_for_pause(with_cpu(paused, phase=ResizePhase.UNPLUGGING)) == ["cpu has 2 CPU, unplugging"]


def test_a_reclaim_is_done_at_its_goal() -> None:
    missing = missing_for_reclaim(RECLAIMED)
    assert missing(AT_REST) == []
    assert missing(with_cpu(reserved=3000)) == ["cpu has 3 CPU, was asked to go down to 2 CPU"]


def test_wait_returns_once_the_vm_has_settled(client: type[FakeClient], capsys: pytest.CaptureFixture[str]) -> None:
    client.views = [with_cpu(phase=ResizePhase.PLUGGING), with_cpu(phase=ResizePhase.PLUGGING), AT_REST]
    assert main(["set-limits", "demo", "--cpu-max", "2", "--wait", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["guest"]["cpu"]["phase"] == "idle"
    assert client.calls.count(("guest", "demo")) == 3


def test_wait_says_what_is_missing(client: type[FakeClient], capsys: pytest.CaptureFixture[str]) -> None:
    client.views = [with_cpu(reserved=4000)]
    assert main(["resume", "demo", "--wait", "--timeout", "0.1s"]) == 1
    assert capsys.readouterr().err == (
        "guestctl: demo: not settled after 0.1 s: cpu has 4 CPU, is to go down to 2 CPU; "
        "guestctl explain demo says why\n"
    )


def test_pause_and_resume(client: type[FakeClient], capsys: pytest.CaptureFixture[str]) -> None:
    client.views = [replace(AT_REST, paused=True)]
    assert main(["pause", "demo", "--wait"]) == 0
    assert main(["resume", "demo"]) == 0
    assert capsys.readouterr().out == "demo: paused; it keeps what it has\ndemo: resumed\n"
    assert {("pause", "demo"), ("resume", "demo")} <= set(client.calls)


@pytest.mark.parametrize(
    ("options", "request_"),
    [
        ([], ReclaimRequest(None, None)),
        (["--memory", "1GiB"], ReclaimRequest(0, GIB)),
        (["--cpu", "1.5", "--dry-run"], ReclaimRequest(1500, 0, dry_run=True)),
    ],
)
def test_reclaim_asks_for_what_is_named(
    client: type[FakeClient], capsys: pytest.CaptureFixture[str], options: list[str], request_: ReclaimRequest
) -> None:
    assert main(["reclaim", "demo", *options]) == 0
    assert ("reclaim", "demo", request_) in client.calls
    asked = "would be asked" if request_.dry_run else "is asked"
    assert capsys.readouterr().out == (
        f"demo  cpu: has 4 CPU, {asked} to go down to 2 CPU; it needs 2 CPU\n"
        "demo  memory: has 1 GiB, keeps all of it; it is at its minimum\n"
    )


def test_a_dry_run_is_not_waited_for(client: type[FakeClient], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reclaim", "demo", "--dry-run", "--wait"]) == 2
    assert "--dry-run" in capsys.readouterr().err
    assert client.calls == []
