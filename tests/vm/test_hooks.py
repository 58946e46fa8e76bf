"""Hooks in a real VM: the root helper under the unit's own sandbox first, then what hooks do to real resizes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import loads
import pytest
import pytest_asyncio
from host import BLOCK_BYTES, GuestSpec, Host, Look, converges, rests

from guestd.lab.image import GuestImage
from guestd.lab.qemu import MIB
from guestd.model.resources import Kind

pytestmark = [pytest.mark.vm, pytest.mark.timeout(480), pytest.mark.asyncio(loop_scope="module")]

VM = "hooked"
HOOKS = "/etc/guestd/hooks.d"
SEEN = "/run/vm-test/seen"
MINIMUM = 512 * MIB

PROBE = """\
import json, os, socket, sys
from guestd.guest import helper

ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
child = os.fork()
if child:
    theirs.close()
    sys.exit(helper.run(ours, child))
ours.close()
helper.drop_privileges("guestd")
theirs.send("\\n".join(["1 60000", *sys.argv[1:]]).encode())
answers = []
while not answers or answers[-1][1] == "result":
    answers.append(theirs.recv(4096).decode().split(" "))
print(json.dumps(answers))
"""
"""The helper, and a daemon that asks it once: its arguments are operations."""

UNIT = "guestd-probe.service"
PROBE_UNIT = r"""
sed -e '/^ExecStart=/d; /^ExecReload=/d; /^Restart/d; /^Watchdog/d; s/^Type=.*/Type=oneshot/' \
    -e 's#^\[Service\]#&\nExecStart={command}\nStandardOutput=truncate:/run/vm-test/answers\nStandardError=journal#' \
    /usr/lib/systemd/system/guestd.service > /run/systemd/system/{unit}
systemctl daemon-reload
systemctl start {options} {unit}
"""
"""The unit as it is installed, for another program."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(guest_image: GuestImage) -> AsyncIterator[Host]:
    async with Host(guest_image, {VM: GuestSpec()}) as host:
        print(f"booted in {host.machines[VM].boot_seconds:.1f} s")
        yield host


@pytest_asyncio.fixture(loop_scope="module")
async def alone(shared: Host) -> Host:
    """The VM without hooks and without guestd, which would run those of a test as well. It stays as it is: under
    emulation memory in which programs ran is taken back very slowly (ARCHITECTURE, "The lab").
    """
    await shared.guestctl("pause", VM)
    await shared.shell(VM, f"systemctl stop guestd; rm -rf {HOOKS}/* {SEEN}*; mkdir -p /run/vm-test")
    await shared.shell(VM, "systemctl stop 'guestd-hook-*'; systemctl reset-failed")
    return shared


@pytest_asyncio.fixture(loop_scope="module")
async def host(alone: Host) -> Host:
    """The host at rest, without hooks."""
    await alone.shell(VM, "systemctl start guestd")
    await alone.guestctl("resume", VM)
    await rests(alone, 60)
    return alone


async def hook(host: Host, name: str, body: str, mode: str = "755") -> None:
    """Put a shell script there, as its owner would."""
    path = f"{HOOKS}/{name}"
    await host.put(VM, path, f"#!/bin/sh\n{body}")
    await host.shell(VM, f"chmod {mode} {path}")


async def ask(host: Host, *operations: str, options: str = "") -> list[list[str]]:
    """What a helper answers in the sandbox of the real unit, without the times."""
    await host.put(VM, "/run/vm-test/probe.py", PROBE)
    quoted = " ".join(f'"{one}"' for one in operations)
    command = f"/opt/guestd/bin/python3 /run/vm-test/probe.py {quoted}"
    await host.shell(VM, PROBE_UNIT.format(command=command, unit=UNIT, options=options), 90)
    if options:
        return []
    answers: list[list[str]] = json.loads(await host.shell(VM, "cat /run/vm-test/answers"))
    print(answers)
    return [words[:5] + words[6:] if words[1] == "result" else words for words in answers]


async def journal(host: Host, unit: str) -> list[str]:
    text = await host.shell(VM, f"journalctl --sync; journalctl -u {unit} -b -q -o cat --no-pager")
    return text.splitlines()


async def hook_units(host: Host) -> list[str]:
    text = await host.shell(VM, "systemctl list-units --all --plain --no-legend 'guestd-hook-*'")
    return [line.split()[0] for line in text.splitlines()]


async def gone(host: Host) -> bool:
    """No unit of a hook is left, a moment after its process has ended."""
    for _ in range(50):
        if await hook_units(host) == []:
            return True
        await asyncio.sleep(0.2)
    return False


# ---- the helper alone --------------------------------------------------------------------------------


async def test_reclaim_works_in_the_sandbox(alone: Host) -> None:
    await alone.shell(VM, "find /usr/lib -type f -exec cat {} + > /dev/null")  # a page cache that is worth something
    reclaimed, hooked, end = await ask(alone, f"reclaim {32 * MIB}", "hook after-grow cpu 1000 2000 5")
    assert reclaimed[:5] == ["1", "result", "0", "ok", "0"]
    assert int(reclaimed[5]) > 8 * MIB
    assert hooked == ["1", "result", "1", "ok", "0", "none"]
    assert end == ["1", "end", "ok"]


async def test_a_reclaim_of_everything_leaves_the_daemon_its_memory(alone: Host) -> None:
    await alone.shell(VM, "systemctl start guestd")
    await alone.until("guestd is served", lambda look: look.views[VM].connected)
    slice_ = "/sys/fs/cgroup/guestd.slice"
    minimums = await alone.shell(VM, f"cat {slice_}/memory.min {slice_}/guestd.service/memory.min")
    assert minimums.split() == [str(64 * MIB)] * 2, "protected only where each level of the tree says so"
    await alone.shell(VM, "find /usr/lib -type f -exec cat {} + > /dev/null")
    before = int(await alone.shell(VM, f"cat {slice_}/guestd.service/memory.current"))
    reclaim = f"echo 400M > /sys/fs/cgroup/memory.reclaim; cat {slice_}/guestd.service/memory.current"
    protected = int(await alone.shell(VM, f"{reclaim} 2> /dev/null"))
    print(f"guestd.service: {before // MIB} MiB, {protected // MIB} MiB after a reclaim of all that there was")
    assert before < 64 * MIB
    assert protected > 0.9 * before


async def test_a_hook_is_outside_the_sandbox(alone: Host) -> None:
    look = f"cat /proc/self/cgroup /proc/self/status > {SEEN}; env | grep ^GUESTD_ | sort > {SEEN}.env; echo said $1"
    await hook(alone, "10-look", look)
    answers = await ask(alone, "hook before-shrink cpu 2500 1000 20")
    assert answers == [["1", "result", "0", "ok", "0", "done"], ["1", "end", "ok"]]
    cgroup, *status = (await alone.shell(VM, f"cat {SEEN}")).splitlines()
    assert cgroup.startswith("0::/system.slice/guestd-hook-before-shrink-10-look-")
    fields = {line.partition(":")[0]: line.partition(":")[2].split() for line in status}
    assert fields["Uid"] == ["0"] * 4
    assert fields["NoNewPrivs"] == fields["Seccomp"] == ["0"]
    assert fields["CapEff"] == (await alone.shell(VM, "grep CapEff /proc/1/status")).split()[1:]
    deadline, *environment = sorted(
        (await alone.shell(VM, f"cat {SEEN}.env")).split(), key=lambda line: "DEADLINE" not in line
    )
    assert deadline in [f"GUESTD_DEADLINE_SECONDS={seconds}" for seconds in range(12, 21)]
    assert environment == [
        "GUESTD_AFTER=1000",
        "GUESTD_BEFORE=2500",
        "GUESTD_EVENT=before-shrink",
        "GUESTD_KIND=cpu",
        "GUESTD_VCPUS_AFTER=1",
        "GUESTD_VCPUS_BEFORE=3",
    ]
    assert "helper: hook 10-look: said before-shrink" in await journal(alone, UNIT)
    assert await hook_units(alone) == []


async def test_a_hook_that_hangs_is_killed_with_all_that_it_started(alone: Host) -> None:
    await hook(alone, "10-hang", "trap '' TERM; sleep 1001 & while :; do sleep 1; done")
    await hook(alone, "20-next", f"touch {SEEN}")
    answers = await ask(alone, "hook before-shrink cpu 2500 1000 5")
    assert answers == [["1", "result", "0", "failed", "110", "failed:10-hang"], ["1", "end", "ok"]]
    said = await journal(alone, UNIT)
    assert "helper: hook 10-hang did not end within 5.0 s and was killed" in said
    assert "helper: hook 20-next is not run: no time is left for it" in said
    assert await hook_units(alone) == []
    left = await alone.machines[VM].console.run(f"pgrep -x sleep; ls {SEEN}", check=False)
    assert left.stdout == ""


async def test_a_hook_ends_at_its_deadline_when_the_helper_is_dead(alone: Host) -> None:
    await hook(alone, "10-hang", f"trap '' TERM; touch {SEEN}; while :; do sleep 1; done")
    await ask(alone, "hook after-grow cpu 1000 2000 10", options="--no-block")
    await alone.machines[VM].console.wait_path(SEEN, 20)
    await alone.shell(VM, f"systemctl kill -s KILL {UNIT}")
    assert len(await hook_units(alone)) == 1
    await alone.shell(VM, "while systemctl is-active -q 'guestd-hook-*'; do sleep 0.3; done", 20)
    assert await gone(alone)


# ---- real resizes ------------------------------------------------------------------------------------


async def runs(host: Host) -> list[dict[str, str]]:
    """The environments that the hook was run with so far, in order."""
    text = await host.shell(VM, f"cat {SEEN} 2> /dev/null; true")
    return [dict(word.split("=", 1) for word in line.split()) for line in text.splitlines()]


async def grown(host: Host) -> int:
    """Have memory plugged by a program that ends then; how much the VM had, bytes."""
    grow = await host.python(VM, loads.GROW, 640, 100, 1000, "/dev/null")
    async with host.load(VM, grow):
        await host.until("memory is plugged", lambda look: look.memory(VM) >= MINIMUM + 2 * BLOCK_BYTES)
        await converges(host, "grown", lambda look: look.memory(VM) >= MINIMUM + 2 * BLOCK_BYTES)
        return (await host.look()).memory(VM)


def at_minimum(look: Look) -> bool:
    return look.memory(VM) < MINIMUM + BLOCK_BYTES


async def refused(host: Host, text: str, since: int) -> int:
    """Wait for a refusal in the broker's log; how many refusals of memory it counts."""
    await host.says(text, since)
    return (await host.look()).views[VM].resource(Kind.MEMORY).refusals


async def test_hooks_hear_of_grows_and_shrinks(host: Host) -> None:
    await hook(host, "10-see", f"env | grep ^GUESTD_ | tr '\\n' ' ' >> {SEEN}; echo >> {SEEN}")
    async with host.busy(VM, 3):
        await converges(host, "3 CPUs", lambda look: look.cpus(VM) >= 3)
    peak = await grown(host)
    await rests(host, 60)
    seen = await runs(host)
    for one in seen:
        print(one)
    by = {
        (event, kind): [one for one in seen if (one["GUESTD_EVENT"], one["GUESTD_KIND"]) == (event, kind)]
        for event in ("after-grow", "before-shrink")
        for kind in ("cpu", "memory")
    }
    assert any(int(one["GUESTD_VCPUS_AFTER"]) >= 3 for one in by["after-grow", "cpu"])
    assert by["before-shrink", "cpu"][-1]["GUESTD_AFTER"] == "1000"
    assert by["before-shrink", "cpu"][-1]["GUESTD_VCPUS_AFTER"] == "1"
    assert any(MINIMUM < int(one["GUESTD_AFTER"]) <= peak for one in by["after-grow", "memory"])
    assert int(by["before-shrink", "memory"][-1]["GUESTD_AFTER"]) < MINIMUM + BLOCK_BYTES
    for event, sign in (("after-grow", 1), ("before-shrink", -1)):
        for one in by[event, "cpu"] + by[event, "memory"]:
            assert (int(one["GUESTD_AFTER"]) - int(one["GUESTD_BEFORE"])) * sign > 0
            assert 1 <= int(one["GUESTD_DEADLINE_SECONDS"]) <= (30 if event == "before-shrink" else 60)


async def test_a_veto_stops_a_shrink_until_it_is_lifted(host: Host) -> None:
    await hook(host, "10-no", '[ "$GUESTD_EVENT $GUESTD_KIND" != "before-shrink memory" ] || exit 77')
    peak = await grown(host)
    since = len(host.broker_log)
    refusals = (await host.look()).views[VM].resource(Kind.MEMORY).refusals
    assert await refused(host, "veto hook 10-no says no", since) > refusals
    await asyncio.sleep(6)
    assert (await host.look()).memory(VM) == peak
    await host.shell(VM, f"rm {HOOKS}/10-no")
    waited = await converges(host, "shrunk after the veto", at_minimum, 90)
    print(f"{peak // MIB} MiB kept under the veto, at the minimum {waited:.1f} s after it was lifted")


async def test_later_means_later(host: Host) -> None:
    body = f"""\
[ "$GUESTD_EVENT $GUESTD_KIND" = "before-shrink memory" ] || exit 0
cut -d' ' -f1 /proc/uptime >> {SEEN}
[ $(wc -l < {SEEN}) -ge 2 ] || {{ echo retry-after 12; exit 75; }}"""
    await hook(host, "10-later", body)
    await grown(host)
    await refused(host, "veto hook 10-later asks for 12 s", len(host.broker_log))
    await rests(host, 90)
    first, second, *_ = [float(word) for word in (await host.shell(VM, f"cat {SEEN}")).split()]
    print(f"asked again after {second - first:.1f} s")
    assert second - first >= 11


async def test_a_hanging_hook_delays_a_shrink_but_does_not_stop_it(host: Host) -> None:
    await hook(host, "10-hang", '[ "$GUESTD_EVENT $GUESTD_KIND" != "before-shrink memory" ] || sleep 1002')
    await grown(host)
    waited = await rests(host, 120)
    print(f"at rest after {waited:.1f} s")
    said = [line for line in await journal(host, "guestd") if "10-hang" in line]
    print(said)
    assert any("hook 10-hang did not end within" in line for line in said)
    assert any(
        one.code == "hook-failed" and "10-hang" in one.text for one in (await host.look()).views[VM].demand_reasons
    )


async def test_a_hook_that_anybody_may_write_is_not_run_and_reported(host: Host) -> None:
    await hook(host, "10-bad", f"touch {SEEN}", mode="777")
    async with host.busy(VM, 4):  # more than a start of guestd may have brought by itself
        await host.until(
            "the failure is reported",
            lambda look: any("10-bad" in reason.text for reason in look.views[VM].demand_reasons),
        )
        await converges(host, "4 CPUs", lambda look: look.cpus(VM) >= 4)
    await rests(host, 60)
    assert (await host.machines[VM].console.run(f"ls {SEEN}", check=False)).stdout == ""
    said = await journal(host, "guestd")
    assert (
        f"helper: hook 10-bad is not run: {HOOKS}/10-bad may be written by others than its owner: chmod go-w it" in said
    )
