"""One VM, one broker, one boot for all: each test begins and ends with the VM at its minimum."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import loads
import pytest
import pytest_asyncio
from host import BLOCK_BYTES, BUSY, GuestSpec, Host, Look, audit, converges, rests

from guestd.guest.core.actions import Settings
from guestd.lab.image import GuestImage
from guestd.lab.qemu import MIB
from guestd.model.resources import Kind
from guestd.model.view import LimitsOrigin, ResizePhase
from guestd.model.vm import VmStatus

pytestmark = [pytest.mark.vm, pytest.mark.timeout(480), pytest.mark.asyncio(loop_scope="module")]

VM = "one"
SERVICE_PIDS = "systemctl show -P MainPID guestd; pgrep -P $(systemctl show -P MainPID guestd) -u guestd"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(guest_image: GuestImage) -> AsyncIterator[Host]:
    async with Host(guest_image, {VM: GuestSpec()}) as host:
        print(f"booted in {host.machines[VM].boot_seconds:.1f} s")
        yield host
        counts = {text: host.broker_log.count(text) for text in ("ended short", "must not shrink now", "overdue")}
        print(f"in all: {counts}")


@pytest_asyncio.fixture(loop_scope="module")
async def host(shared: Host) -> AsyncIterator[Host]:
    """The host at rest."""
    waited = await rests(shared, 60)
    print(f"at rest after {waited:.1f} s")
    kills = await shared.machines[VM].oom_kills()
    yield shared
    assert await shared.machines[VM].oom_kills() in (kills, 0)  # 0 after a reset


async def service_pids(host: Host) -> tuple[int, int]:
    """The root helper, which is the unit's main process, and the daemon, its child without root."""
    while True:
        pids = (await host.shell(VM, SERVICE_PIDS, check=False)).split()
        if len(pids) == 2:
            return int(pids[0]), int(pids[1])
        await asyncio.sleep(0.3)  # systemd is just starting it again


def unplugging(look: Look) -> bool:
    return any(one.phase is ResizePhase.UNPLUGGING for one in look.views[VM].resources)


def served_with(*cpus: int) -> Callable[[Look], bool]:
    return lambda look: look.views[VM].connected and look.cpus(VM) in cpus


# ---- 1 -------------------------------------------------------------------------------------------


async def test_cpus_follow_four_busy_processes(host: Host) -> None:
    begun = time.monotonic()
    async with host.busy(VM, 4):
        await host.until("a second vCPU is reserved", lambda look: look.cpus(VM) >= 2)
        first = time.monotonic() - begun
        await converges(host, "4 CPUs online", lambda look: look.cpus(VM) == 4)
        peak = time.monotonic() - begun
        look = await host.look(inside=True)
        assert look.held[VM].vcpus == 4
        assert look.facts[VM].cpus_online == {0, 1, 2, 3}
    back = await rests(host)  # one vCPU, in the book, the hypervisor and the guest
    print(f"CPUs: second after {first:.1f} s, all four online after {peak:.1f} s, back to one after {back:.1f} s")


async def test_tasks_that_begin_to_wait_are_seen_from_deep_rest(host: Host) -> None:
    """Busy loops in a shell that was there take no memory that could be noticed: only PSI tells."""
    async with host.load(VM, f"kill -STOP $$; {BUSY.format(count=4)}") as pid:
        await asyncio.sleep(Settings().calm_for_seconds + 6)
        assert (await host.look()).cpus(VM) == 1
        await host.shell(VM, f"kill -CONT {pid}")
        seen = await host.until("more CPUs", lambda look: look.cpus(VM) >= 2, Settings().deep_rest_seconds / 3)
    await rests(host)
    print(f"a second vCPU {seen:.1f} s after the load went on")


# ---- 2 -------------------------------------------------------------------------------------------


async def test_memory_arrives_ahead_of_a_growing_process(host: Host) -> None:
    before = await host.look()
    grow = await host.python(VM, loads.GROW, 1536, 100, 2, "/run/vm-test/grown")
    begun = time.monotonic()
    async with host.load(VM, grow):
        await host.until("memory is plugged", lambda look: look.held[VM].plugged_bytes > 512 * MIB)
        first = time.monotonic() - begun
        await host.machines[VM].console.wait_path("/run/vm-test/grown", 60)
        peak = await host.look()
    result = json.loads(await host.shell(VM, "cat /run/vm-test/grown; rm /run/vm-test/grown"))
    back = await rests(host)
    after = await host.look()
    print(f"memory: first plugged after {first:.1f} s, released after {back:.1f} s, {result}")
    assert result["mib"] >= 1530
    assert peak.held[VM].plugged_bytes >= (1536 + 64) * MIB
    assert result["least_available_mib"] >= 16
    assert await host.machines[VM].oom_kills() == 0
    assert after.held[VM].held_bytes < 512 * MIB + BLOCK_BYTES
    assert after.host.free.memory_bytes > before.host.free.memory_bytes - BLOCK_BYTES


# ---- 5 -------------------------------------------------------------------------------------------


async def test_broker_killed_while_growing_and_while_shrinking(host: Host) -> None:
    epoch = (await host.look()).host.epoch
    # While no broker is there nothing comes: the load finds enough for some seconds in what it has.
    grow = await host.python(VM, loads.GROW, 768, 20, 1000, "/dev/null")
    begun = len(host.broker_log)
    async with host.busy(VM, 4), host.load(VM, grow):
        await host.says("cpu: growing", begun)
        await host.restart_broker()
        await host.says("memory: growing", len(host.broker_log))
        await host.restart_broker()
        up = await converges(
            host, "grown in spite of it", lambda look: look.cpus(VM) == 4 and look.memory(VM) >= 1024 * MIB
        )
        begun = len(host.broker_log)
    await host.says("asking down", begun)
    await host.restart_broker()
    await host.until("something is unplugged", unplugging)
    await host.restart_broker()
    down = await rests(host)
    assert (await host.look()).host.epoch == epoch + 4
    print(f"broker killed 4 times: grown {up:.1f} s, shrunk {down:.1f} s after the last restart")


async def test_daemon_and_helper_killed_in_the_middle(host: Host) -> None:
    helper, daemon = await service_pids(host)
    # The helper goes at the very moment at which it is to bring a new CPU online, the daemon a CPU later.
    watch = "while [ ! -e /sys/devices/system/cpu/cpu{cpu} ]; do :; done; kill -9 {pid}"
    async with host.busy(VM, 2), host.load(VM, watch.format(cpu=1, pid=helper)):
        up = await converges(host, "grown in spite of a killed helper", served_with(2, 3))
        helper2, daemon2 = await service_pids(host)
        assert helper2 != helper
        assert daemon2 != daemon
        async with host.busy(VM, 2), host.load(VM, watch.format(cpu=3, pid=daemon2)):
            again = await converges(host, "4 CPUs in spite of a killed daemon", served_with(4))
        helper3, _ = await service_pids(host)
        assert helper3 != helper2
        begun = len(host.broker_log)
    await host.says("cpu: asking down", begun)
    await host.shell(VM, f"kill -9 {helper3}")
    down = await rests(host)
    helper4, _ = await service_pids(host)
    assert helper4 != helper3
    print(f"helper and daemon killed: grown after {up:.1f} s, 4 after {again:.1f} s, back after {down:.1f} s")


async def test_guest_reset_while_it_is_big(host: Host) -> None:
    grow = await host.python(VM, loads.GROW, 512, 100, 1000, "/dev/null")
    async with host.busy(VM, 4), host.load(VM, grow):
        await converges(host, "big", lambda look: look.cpus(VM) == 4 and look.memory(VM) >= 768 * MIB)
        begun = time.monotonic()
        await host.machines[VM].reset()
    booted = await host.machines[VM].wait_booted()
    back = await rests(host)
    print(f"reset: booted in {booted:.1f} s, at its minimum {time.monotonic() - begun:.1f} s after ({back:.1f} s)")


async def test_qemu_killed_and_started_anew(host: Host) -> None:
    async with host.busy(VM, 4):
        await converges(host, "4 CPUs", lambda look: look.cpus(VM) == 4)
        await host.machines[VM].kill()
    begun = time.monotonic()

    def freed(look: Look) -> bool:
        view = look.views[VM]
        return (
            view.vm_status is VmStatus.GONE
            and not view.connected
            and not any(view.resource(kind).reserved for kind in Kind)
        )

    gone = await converges(host, "the broker knows that the VM is gone", freed)
    committed = (await host.look()).host.committed
    assert (committed.cpu_millicores, committed.memory_bytes) == (0, 0)
    await host.start_vm(VM)
    booted = await host.machines[VM].wait_booted()
    await rests(host)
    assert await audit(host) == []
    print(f"QEMU killed: freed after {gone:.1f} s, booted in {booted:.1f} s, {time.monotonic() - begun:.1f} s in all")


# ---- 8 -------------------------------------------------------------------------------------------


async def test_limits_set_while_running_survive_a_broker_restart(host: Host) -> None:
    def limited(look: Look) -> bool:
        return look.views[VM].limits.max.cpu_millicores == 2000 and look.cpus(VM) == 2

    async with host.busy(VM, 4):
        await converges(host, "4 CPUs", lambda look: look.cpus(VM) == 4)
        await host.guestctl("set-limits", VM, "--cpu-max", "2")
        assert (await host.look()).views[VM].limits_origin is LimitsOrigin.ADMIN
        down = await converges(host, "2 CPUs under the same load", limited)
        await host.restart_broker()
        await host.until("the guest is back", lambda look: look.views[VM].connected)
        again = await converges(host, "still 2 CPUs", limited)
        assert (await host.look()).views[VM].limits_origin is LimitsOrigin.ADMIN
        await host.guestctl("set-limits", VM, "--reset")
        assert (await host.look()).views[VM].limits_origin is LimitsOrigin.FILE
        up = await converges(host, "4 CPUs again", lambda look: look.cpus(VM) == 4)
    back = await rests(host)
    print(f"limits: 2 CPUs after {down:.1f} s, {again:.1f} s after a restart, 4 after {up:.1f} s, back {back:.1f} s")


# ---- 4 -------------------------------------------------------------------------------------------


async def test_memory_that_cannot_be_moved_ends_a_shrink_in_part(host: Host) -> None:
    def partials(look: Look) -> int:
        return look.views[VM].resource(Kind.MEMORY).partials

    before = partials(await host.look())
    pin = await host.python(VM, loads.PIN, 1024, 256, "/run/vm-test/pinned")
    async with host.load(VM, pin):
        await host.machines[VM].console.wait_path("/run/vm-test/pinned", 60)
        peak = (await host.look()).memory(VM)
        ended = await host.until("a shrink ends in part", lambda look: partials(look) > before, 45)

        def achieved(look: Look) -> bool:
            held = look.held[VM]
            kept = 512 * MIB + 256 * MIB  # what is pinned, and less than a block more
            return (
                held.held_bytes == held.plugged_bytes == look.memory(VM)  # nothing more is asked of the guest
                and kept <= held.plugged_bytes < kept + BLOCK_BYTES
                and not look.views[VM].resource(Kind.MEMORY).overdue
            )

        settled = await converges(host, "what was achieved is in the book, and no more is asked for", achieved)
        kept = (await host.look()).held[VM].plugged_bytes
    back = await rests(host)
    await host.shell(VM, "rm /run/vm-test/pinned")
    assert kept < peak
    print(
        f"pinned memory: {peak // MIB} MiB shrunk to {kept // MIB} MiB, no further, after {ended:.1f} s,"
        f" in the book {settled:.1f} s later, unpinned and back after {back:.1f} s"
    )


# ---- 7, for one VM: who may speak for it ---------------------------------------------------------


async def test_a_process_without_root_cannot_speak_for_the_vm(host: Host) -> None:
    before, refused = await host.look(), host.machines[VM].vsock.mux.refused_connections
    log_before = len(host.broker_log)
    as_nobody = "setpriv --reuid=nobody --regid=nogroup --clear-groups "
    for source_port, expected in ((0, "UnreachableError"), (1000, "UnreachableError PermissionError")):
        command = await host.guestd_python(VM, loads.LIAR, VM, source_port, 10)
        result = json.loads(await host.shell(VM, as_nobody + command))
        assert "served as" not in result
        assert result["ended"].startswith(expected), result
        await host.shell(VM, "rm -f /tmp/one-*.sock")
    assert host.machines[VM].vsock.mux.refused_connections > refused
    await rests(host)
    after = await host.look()
    assert after.views[VM].hostname == before.views[VM].hostname
    assert "connected" not in host.broker_log[log_before:]
    print("without root: refused by the device, and by the kernel below port 1024")


# ---- 10 ------------------------------------------------------------------------------------------

CAPABILITIES = {"CAP_KILL": 5, "CAP_SETGID": 6, "CAP_SETUID": 7, "CAP_NET_BIND_SERVICE": 10, "CAP_SYS_RESOURCE": 24}
UNIT = Path(__file__).parents[2] / "systemd" / "guestd.service"


async def status_of(host: Host, pid: int) -> dict[str, list[str]]:
    text = await host.shell(VM, f"cat /proc/{pid}/status")
    return {line.partition(":")[0]: line.partition(":")[2].split() for line in text.splitlines()}


async def test_processes_are_what_the_unit_promises(host: Host) -> None:
    (promised,) = [line for line in UNIT.read_text().splitlines() if line.startswith("CapabilityBoundingSet=")]
    mask = sum(1 << CAPABILITIES[name] for name in promised.partition("=")[2].split())
    helper_pid, daemon_pid = await service_pids(host)
    uid = (await host.shell(VM, "id -u guestd")).strip()
    assert int(uid) != 0
    helper, daemon = await status_of(host, helper_pid), await status_of(host, daemon_pid)

    assert helper["Uid"] == ["0"] * 4
    assert int(helper["CapEff"][0], 16) == int(helper["CapBnd"][0], 16) == mask
    assert daemon["Uid"] == [uid] * 4
    assert daemon["Groups"] == []
    for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert int(daemon[name][0], 16) == 0, name
    assert int(daemon["CapBnd"][0], 16) == mask
    assert helper["NoNewPrivs"] == daemon["NoNewPrivs"] == ["1"]
    assert helper["Seccomp"] == daemon["Seccomp"] == ["2"]

    # What the helper can write in its view of the file system, the daemon cannot, in the same view.
    async with host.busy(VM, 2):
        await host.until("a second CPU", lambda look: look.cpus(VM) >= 2)
        await host.machines[VM].console.wait_path("/sys/devices/system/cpu/cpu1/online", 20)
        files = "/sys/devices/system/cpu/cpu1/online /sys/devices/system/memory/memory3/state"
        write = f"'for file in {files}; do : > $file; done'"
        await host.shell(VM, f"nsenter -t {helper_pid} -m sh -ec {write}")
        for file in files.split():
            as_daemon = f"nsenter -t {daemon_pid} -m setpriv --reuid=guestd --regid=guestd --clear-groups"
            result = await host.machines[VM].console.run(f"{as_daemon} sh -c 'echo 0 > {file}'", check=False)
            assert result.exit_code != 0
            assert "Permission denied" in result.stderr

    words = (await host.shell(VM, "systemd-analyze security guestd.service --no-pager | tail -1")).split()
    exposure = float(next(word for word in words if word[0].isdigit()))
    print(f"uid {uid}, helper's capabilities {mask:#x}, daemon's none, exposure {exposure}")
    assert exposure <= 2.5


# ---- 9 -------------------------------------------------------------------------------------------


async def test_the_vsock_listener_over_loopback(host: Host) -> None:
    await host.shell(VM, "modprobe vsock_loopback")
    command = await host.guestd_python(VM, loads.LOOPBACK)
    # The broker's server is gRPC's own, which the lab has beside guestd and guestd has not.
    result = json.loads(await host.shell(VM, f"PYTHONPATH=/usr/lib/guestd-lab/python {command}"))
    ends = result["ends"]
    assert ends["root"] == "served to the end"
    assert ends["root served as"] == ["loop"]
    assert result["connected"] == [["loop", "vsock", "other"]]
    for case in ("anybody", "stranger"):
        assert ends[case].startswith("UnreachableError")
        assert ends[f"{case} served as"] == []
    print(f"AF_VSOCK listener over loopback: {ends}")


# ---- 6, last: what a rule onlines for the kernel may stay ----------------------------------------

RULES = """\
SUBSYSTEM=="memory", ACTION=="add", ATTR{state}="online", RUN+="/usr/bin/touch /run/vm-test/rule-memory"
SUBSYSTEM=="cpu", ACTION=="add", ATTR{online}="1", RUN+="/usr/bin/touch /run/vm-test/rule-cpu"
"""


async def test_a_udev_rule_that_onlines_by_itself(host: Host) -> None:
    rules = "/run/udev/rules.d/99-vm-test.rules"
    await host.put(VM, rules, RULES)
    since = (await host.shell(VM, "udevadm control --reload; mkdir -p /run/vm-test; date +%s")).strip()
    log_before = len(host.broker_log)
    grow = await host.python(VM, loads.GROW, 640, 100, 1000, "/dev/null")
    try:
        async with host.busy(VM, 3), host.load(VM, grow):
            up = await converges(host, "grown", lambda look: look.cpus(VM) >= 3 and look.memory(VM) >= 896 * MIB)
            peak = await host.look(inside=True)
            await host.shell(VM, "ls /run/vm-test/rule-memory /run/vm-test/rule-cpu")
        # Such a rule onlines to the kernel's zones, so what of it is free again depends on what the kernel put there.
        down = await converges(
            host, "shrunk", lambda look: look.cpus(VM) == 1 and look.memory(VM) <= peak.memory(VM) - 2 * BLOCK_BYTES
        )
    finally:
        await host.shell(VM, f"rm {rules}; udevadm control --reload")
    end = (await host.look()).memory(VM)
    journal = await host.shell(VM, f"journalctl -u guestd -p warning --since=@{since} -q -o cat --no-pager")
    assert journal == ""
    assert not [line for line in host.broker_log[log_before:].splitlines() if " error: " in line or "warning: " in line]
    assert peak.views[VM].resource(Kind.CPU).failures == peak.views[VM].resource(Kind.MEMORY).failures == 0
    print(
        f"udev rule: grown to {peak.memory(VM) // MIB} MiB after {up:.1f} s, {end // MIB} MiB after {down:.1f} s more,"
        " nothing in the journal"
    )
