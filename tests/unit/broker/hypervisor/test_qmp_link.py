"""The reconnecting QMP connection: what each kind of silence means, and that nothing else leaks."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from scripted_qmp import CUT, GREETING, HANG, Raw, Refuse, ScriptedQmp, serving

from guestd.broker.hypervisor.process import ProcessWatch
from guestd.broker.hypervisor.qmp_link import LinkState, LinkTiming, QmpLink, QmpRefused
from guestd.model.errors import HypervisorGone, HypervisorUnreachable, OutcomeUnknown

QUICK = LinkTiming(
    greeting_seconds=0.2,
    answer_seconds=0.5,
    retry_min_seconds=0.01,
    retry_max_seconds=0.05,
    first_attempt_seconds=1.0,
)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[ScriptedQmp]:
    async with serving(tmp_path / "qmp") as server:
        yield server


@contextlib.asynccontextmanager
async def link_to(path: Path) -> AsyncIterator[QmpLink]:
    link = QmpLink(path, on_event=lambda _: None, on_change=lambda: None, timing=QUICK, jitter=lambda: 1.0)
    await link.open()
    try:
        yield link
    finally:
        await link.close()


async def reaches(link: QmpLink, state: LinkState) -> None:
    for _ in range(600):
        if link.state is state:
            return
        await asyncio.sleep(0.005)
    pytest.fail(f"still {link.state}")


def no_pid(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in another pid namespace."""
    monkeypatch.setattr(ProcessWatch, "of_peer", lambda *_: None)


async def test_connects_at_once_and_runs_commands(server: ScriptedQmp) -> None:
    server.answers["give"] = [1]
    async with link_to(server.path) as link:
        assert link.state is LinkState.CONNECTED
        assert await link.execute("give", {"a-b": 2}) == [1]
    assert server.commands[-1] == ("give", {"a-b": 2})


async def test_an_error_reply_carries_qemus_own_words(server: ScriptedQmp) -> None:
    server.answers["do"] = Refuse("the moon is wrong", "DeviceNotFound")
    async with link_to(server.path) as link:
        with pytest.raises(QmpRefused, match="QEMU refused do: the moon is wrong") as caught:
            await link.execute("do")
        assert caught.value.error_class == "DeviceNotFound"
        assert link.state is LinkState.CONNECTED


@pytest.mark.parametrize(
    "babble",
    [
        pytest.param(HANG, id="nothing"),
        pytest.param(CUT, id="cut"),
        pytest.param(Raw(b'{"return": [1, ', cut=True), id="cut in the middle"),
        pytest.param(Raw(b"\xff\xfe garbage\n"), id="no text"),
        pytest.param(Raw(b"[1, 2]\n"), id="no object"),
        pytest.param(Raw(b'{"id": ["__qmp#00001"]}\n'), id="an id of another type"),
        pytest.param(Raw(b'{"error": {"class": "GenericError", "desc": "?"}}\n'), id="an error for nobody"),
        pytest.param(Raw(b"[" * 100_000 + b"\n"), id="too deep"),
        pytest.param(Raw(b"x" * (5 << 20)), id="endless line"),
    ],
)
async def test_whatever_comes_instead_of_an_answer_is_an_unknown_outcome(server: ScriptedQmp, babble: Raw) -> None:
    server.answers["do"] = babble
    async with link_to(server.path) as link:
        with pytest.raises(OutcomeUnknown, match="do"):
            await link.execute("do")
        await reaches(link, LinkState.CONNECTED)
        assert await link.execute("other") == {}


@pytest.mark.parametrize("body", [b'"error": 5', b'"error": {"class": 1}', b'"nothing": 1'])
async def test_an_answer_that_is_no_answer_is_an_unknown_outcome(server: ScriptedQmp, body: bytes) -> None:
    async with link_to(server.path) as link:
        server.answers["do"] = Raw(b'{"id": "__qmp#00000", ' + body + b"}\n")
        with pytest.raises(OutcomeUnknown):
            await link.execute("do")


async def test_an_unanswered_command_costs_the_connection(server: ScriptedQmp) -> None:
    server.answers["do"] = HANG
    async with link_to(server.path) as link:
        with pytest.raises(OutcomeUnknown):
            await link.execute("do")
        with pytest.raises(HypervisorUnreachable):
            await link.execute("do")
        await reaches(link, LinkState.CONNECTED)
        assert server.accepted == 2


async def test_all_commands_under_way_end_with_the_connection(server: ScriptedQmp) -> None:
    server.answers["do"] = HANG
    async with link_to(server.path) as link:
        waiting = [asyncio.create_task(link.execute("do")) for _ in range(5)]
        await asyncio.sleep(0.02)
        server.cut()
        ended = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(each) for each in ended] == [OutcomeUnknown] * 5


@pytest.mark.parametrize("greeting", [None, b"SSH-2.0\n", b"{}\n", b'{"QMP": 7}\n', GREETING + b'{"error": 1}\n'])
async def test_without_a_proper_greeting_it_is_unreachable_and_heals(
    server: ScriptedQmp, greeting: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    server.greeting = greeting
    async with link_to(server.path) as link:
        await asyncio.sleep(0.8)
        assert link.state is LinkState.UNREACHABLE
        assert 2 <= server.accepted < 40
        assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1
        server.greeting = GREETING
        await reaches(link, LinkState.CONNECTED)


async def test_no_socket_file_is_unreachable(tmp_path: Path) -> None:
    async with link_to(tmp_path / "qmp") as link:
        assert link.state is LinkState.UNREACHABLE
        with pytest.raises(HypervisorUnreachable):
            await link.execute("do")


async def test_a_refusing_socket_is_gone_when_no_process_is_known(server: ScriptedQmp) -> None:
    await server.stop()
    async with link_to(server.path) as link:
        assert link.state is LinkState.GONE
        with pytest.raises(HypervisorGone):
            await link.execute("do")
        server.path.unlink()
        await server.start()
        await reaches(link, LinkState.CONNECTED)


async def test_gone_by_refusal_where_the_pid_cannot_be_known(
    server: ScriptedQmp, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_pid(monkeypatch)
    async with link_to(server.path) as link:
        assert link.state is LinkState.CONNECTED
        await server.stop()
        await reaches(link, LinkState.GONE)


async def test_a_deleted_socket_is_not_gone_where_the_pid_cannot_be_known(
    server: ScriptedQmp, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_pid(monkeypatch)
    async with link_to(server.path) as link:
        server.path.unlink()
        await server.stop()
        await asyncio.sleep(0.1)
        assert link.state is LinkState.UNREACHABLE


async def test_a_running_process_outranks_a_refusal(server: ScriptedQmp) -> None:
    async with link_to(server.path) as link:  # the server's process is this one
        await server.stop()
        await asyncio.sleep(0.1)
        assert link.state is LinkState.UNREACHABLE


async def test_a_plain_file_is_not_a_dead_vm(tmp_path: Path) -> None:
    (tmp_path / "qmp").write_text("hello")
    async with link_to(tmp_path / "qmp") as link:
        assert link.state is LinkState.UNREACHABLE


async def test_a_path_that_is_too_long_is_unreachable(tmp_path: Path) -> None:
    async with link_to(tmp_path / ("x" * 200)) as link:
        assert link.state is LinkState.UNREACHABLE


async def test_an_answer_outranks_the_end_of_whoever_listened(server: ScriptedQmp) -> None:
    async with link_to(server.path) as link:
        assert link._process is not None
        link._process.exited = True
        assert await link.execute("do") == {}
        assert link._process is None


async def test_events_are_passed_on_and_not_kept(server: ScriptedQmp) -> None:
    seen: list[object] = []
    link = QmpLink(server.path, lambda event: seen.append(event["event"]), lambda: None, QUICK)
    await link.open()
    server.emit("STOP")
    server.emit({"no": "name"})
    await link.execute("do")
    assert seen == ["STOP", {"no": "name"}]
    assert link._client is not None
    assert link._client.events.history == ()
    await link.close()
    await link.close()


async def test_each_change_of_state_is_told_and_logged_once(
    server: ScriptedQmp, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    told: list[LinkState] = []
    link = QmpLink(server.path, lambda _: None, lambda: told.append(link.state), QUICK)
    await link.open()
    await server.stop()
    await asyncio.sleep(0.3)
    server.path.unlink()
    await server.start()
    await reaches(link, LinkState.CONNECTED)
    await link.close()
    assert told == [LinkState.CONNECTED, LinkState.UNREACHABLE, LinkState.CONNECTED]
    assert len([record for record in caplog.records if record.name.startswith("guestd")]) == 3
