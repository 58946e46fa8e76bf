"""Fractions of a CPU on cgroups of version 2, which a guest has: busy threads in it, bound as QEMU's would be."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from guestd.lab.image import GuestImage
from guestd.lab.machine import Machine
from guestd.lab.qemu import MachineConfig

pytestmark = [pytest.mark.vm, pytest.mark.timeout(480), pytest.mark.asyncio(loop_scope="module")]

UNIT = Path(__file__).parents[2] / "systemd" / "guestd-broker.service"
SANDBOX = re.compile(
    r"(User|Capability|Ambient|NoNew|Protect|Private|Device|ReadWrite|Restrict[A-Z]|IP|Lock|MemoryDeny|SystemCall)"
)
TOLERANCE = 0.15

VICTIM = '''
"""A process with busy threads: two like vCPUs, one like an emulator's; one more like a vCPU at SIGUSR1."""
import hashlib, json, os, signal, threading

def busy(kind):  # without the interpreter's lock: a thread that waits for its turn must not hold up the others
    seen[kind].append(threading.get_native_id())
    while True:
        hashlib.pbkdf2_hmac("sha256", b"a", b"b", 10**9)

def start(kind):
    known = len(seen[kind])
    threading.Thread(target=busy, args=(kind,), daemon=True).start()
    while len(seen[kind]) == known:
        pass
    with open("/run/victim.new", "w") as file:
        json.dump({"pid": os.getpid(), **seen}, file)
    os.rename("/run/victim.new", "/run/victim")

seen = {"vcpus": [], "emulator": []}
signal.signal(signal.SIGUSR1, lambda *_: start("vcpus"))
for kind in ("emulator", "vcpus", "vcpus"):
    start(kind)
while True:
    signal.pause()
'''

BROKER = '''
"""What a broker does with a VM's group, and what came of it as JSON: STEPS..."""
import json, logging, os, signal, sys, time
from pathlib import Path
from guestd.broker.cgroup.cpu_group import CpuGroup
from guestd.broker.cgroup.files import CgroupError

def victim():
    return json.loads(Path("/run/victim").read_text())

def ran(thread):
    return int(Path(f"/proc/{pid}/task/{thread}/schedstat").read_text().split()[0]) / 1e9

def measure(seconds):
    """Millicores of the threads like vCPUs, all together, and of the one like an emulator's; permille throttled."""
    vcpus, (other,) = victim()["vcpus"], victim()["emulator"]
    before, other_before, begun = sum(map(ran, vcpus)), ran(other), time.monotonic()
    while time.monotonic() - begun < seconds:
        time.sleep(0.5)
        seen = group.read()
    passed = time.monotonic() - begun
    used, other_used = sum(map(ran, vcpus)) - before, ran(other) - other_before
    return {"used": round(1000 * used / passed), "emulator": round(1000 * other_used / passed),
            "throttled": seen.throttled_permille, "quota": seen.quota_millicores, "last": round(1000 * ran(vcpus[-1]))}

def bound(millicores):
    """Measured again when others on the machine below had the CPU meanwhile."""
    begun = time.monotonic()
    group.set_quota(millicores)
    took = time.monotonic() - begun
    time.sleep(0.3)
    for _ in range(3):
        found = measure(4.0)
        if abs(found["used"] - millicores) <= 0.1 * millicores:
            break
    return {**found, "set_quota_ms": round(1000 * took, 2)}

def add():
    known = victim()["vcpus"]
    os.kill(pid, signal.SIGUSR1)
    while victim()["vcpus"] == known:
        time.sleep(0.01)
    group.settle(set(victim()["vcpus"]))

def step(name):
    if name == "settle":
        begun = time.monotonic()
        group.settle(set(victim()["vcpus"]))
        return {"path": str(group.path), "settle_ms": round(1000 * (time.monotonic() - begun), 2)}
    if name == "add":
        add()
        return sorted(group.read().threads) == sorted(victim()["vcpus"])
    if name == "read":
        seen = group.read()
        return [seen.quota_millicores, sorted(seen.threads) == sorted(victim()["vcpus"])]
    if name == "vanish":
        for thread in group.read().threads:
            (group.path.parent / "cgroup.threads").write_text(str(thread))
        os.rmdir(group.path)
        return group.read() is None
    if name == "controller":  # as systemd does at a change of a unit that it was not asked to delegate
        (group.path.parent / "cgroup.subtree_control").write_text("-cpu")
        return group.read() is None
    if name == "end":
        path = group.path
        os.kill(pid, signal.SIGKILL)
        begun = time.monotonic()
        while not group.remove():
            assert time.monotonic() - begun < 10
            time.sleep(0.02)
        return path.exists()
    return bound(int(name))

logging.basicConfig(level=logging.WARNING)
pid = victim()["pid"]
group = CpuGroup("one", pid)
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = step(name)
    except CgroupError as error:
        found[name] = {"error": str(error)}
print(json.dumps(found))
'''


class Guest:
    """A machine, the victim in it, and brokers that come and go."""

    def __init__(self, machine: Machine) -> None:
        self.console = machine.console

    async def run(self, command: str) -> str:
        return (await self.console.run(command, 100)).stdout

    async def victim(self, *properties: str) -> None:
        """Start one in a unit of its own; one that is there ends."""
        await self.run(
            "systemctl stop victim 2>/dev/null; systemctl reset-failed victim 2>/dev/null; rm -f /run/victim"
        )
        options = " ".join(f"-p {one}" for one in properties)
        await self.run(f"systemd-run -q --unit=victim {options} python3 -S /run/victim.py")
        await self.console.run("until grep -q 'vcpus.*,.*]' /run/victim; do sleep 0.1; done", 30)

    async def broker(self, *steps: object, sandbox: bool = True) -> dict[str, Any]:
        """Go through the steps in a new process, in the sandbox of the broker's unit."""
        options = "".join(f" -p {shlex.quote(line)}" for line in sandbox_lines()) if sandbox else ""
        words = shlex.join(str(step) for step in steps)
        output = await self.run(
            f"systemd-run -q --wait --pipe --collect{options} /opt/guestd/bin/python3 /run/broker.py {words}"
        )
        found: dict[str, Any] = json.loads(output)
        for step, result in found.items():
            print(f"{step}: {result}")
        return found


def sandbox_lines() -> list[str]:
    return [line for line in UNIT.read_text().splitlines() if SANDBOX.match(line)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def guest(guest_image: GuestImage) -> AsyncIterator[Guest]:
    async with Machine(guest_image, MachineConfig(name="v2", cpus=2)) as machine:
        await machine.wait_booted()
        print(f"booted in {machine.boot_seconds:.1f} s")
        guest = Guest(machine)
        await guest.run("systemctl stop guestd")
        for name, text in (("victim", VICTIM), ("broker", BROKER)):
            await guest.run(f"cat > /run/{name}.py <<'END'\n{text}\nEND")
        yield guest


def close(found: dict[str, Any], millicores: int) -> None:
    assert abs(found["used"] - millicores) <= TOLERANCE * millicores, found
    assert found["quota"] == millicores
    assert found["throttled"] >= 500
    assert found["emulator"] >= 500  # it has a whole CPU but for what the bound threads may take


async def test_threads_are_bound_in_the_sandbox_of_the_brokers_unit(guest: Guest) -> None:
    assert len(sandbox_lines()) > 20
    await guest.victim("Delegate=yes")
    found = await guest.broker("settle", 250, "add", 500)
    assert found["settle"]["path"] == "/sys/fs/cgroup/system.slice/victim.service/guestd-one"
    close(found["250"], 250)
    assert found["add"] is True
    close(found["500"], 500)
    assert found["500"]["last"] >= 100  # the thread that was added runs, and within the same bound

    # The next broker finds it all, and mends what somebody breaks.
    found = await guest.broker("settle", "read")
    assert found["read"] == [500, True]
    found = await guest.broker("settle", "vanish", "settle", "controller", "settle", "read", sandbox=False)
    assert found["vanish"] is True
    assert found["controller"] is True
    assert found["read"] == [500, True]
    assert (await guest.broker("settle", "end"))["end"] is False


async def test_a_unit_that_has_no_cpu_controller_is_told_and_the_advice_helps(guest: Guest) -> None:
    await guest.victim("Slice=plain.slice")
    error = (await guest.broker("settle"))["settle"]["error"]
    assert "/plain.slice/victim.service/cgroup.controllers has no cpu" in error
    assert "Delegate=yes, or any CPUWeight=" in error
    await guest.run("systemctl set-property --runtime victim CPUWeight=100")
    found = await guest.broker("settle", 250)
    close(found["250"], 250)


async def test_a_group_with_other_groups_beside_cannot_be_threaded_and_says_why(guest: Guest) -> None:
    await guest.victim("Delegate=yes")
    path = "/sys/fs/cgroup/system.slice/victim.service"
    await guest.run(f"mkdir {path}/other; sleep 1000 > /dev/null 2>&1 & echo $! > {path}/other/cgroup.procs")
    error = (await guest.broker("settle"))["settle"]["error"]
    assert f"{path}/guestd-one/cgroup.type: cannot be threaded: {path} has" in error
    assert "a group of its own" in error
    assert await guest.run(f"ls -d {path}/guestd-one 2>/dev/null; true") == ""


async def test_qemu_in_the_root_group(guest: Guest) -> None:
    await guest.victim()
    await guest.run("systemctl show -P MainPID victim > /sys/fs/cgroup/cgroup.procs")
    found = await guest.broker("settle", 250, "end")
    assert found["settle"]["path"] == "/sys/fs/cgroup/guestd-one"
    close(found["250"], 250)
    assert found["end"] is False
