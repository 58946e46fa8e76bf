"""PostgreSQL and a JVM with ZGC in one VM, told of each resize by the hooks that guestd ships: neither is restarted.

One boot for all. A client holds one connection through everything and commits once a second: not one query of its
may fail, and each shows what its session's settings are by then.
"""

from __future__ import annotations

import asyncio
import re
import shlex
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import loads
import pytest
import pytest_asyncio
from host import BLOCK_BYTES, GuestSpec, Host, Look

from guestd.lab.image import GuestImage
from guestd.lab.qemu import GIB, MIB
from guestd.model.resources import Kind
from guestd.model.view import ResizePhase

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600), pytest.mark.asyncio(loop_scope="module")]

VM = "apps"
MIN_BYTES = 1024 * MIB
SHARED_BUFFERS_BYTES = 128 * MIB
MAX_CONNECTIONS = 100
HEAP_MAX_BYTES = 1024 * MIB
HOOKS = "/etc/guestd/hooks.d"
RUNNING_HOOKS = "systemctl list-units --no-legend 'guestd-hook-*'"
APPS_SECONDS = 60.0
GROW_SECONDS = 120.0
SHRINK_SECONDS = 240.0
CONFIG = "grow_hook_seconds = 150\nshrink_hook_seconds = 90\n"
"""jcmd, a JVM itself, takes from 4 to 20 s under emulation, and a hook starts it once or twice."""
HOOK_SECONDS = 180.0
ASK_SECONDS = 2.0
"""Questions are a load of their own: journalctl, or a shell, on the one emulated CPU that the hooks run on."""

MAIN_JAVA = """
import java.nio.file.*;

public class Main {
    static byte[][] kept = new byte[0][];

    public static void main(String[] directory) throws Exception {
        Path wanted = Path.of(directory[0], "wanted-mib"), has = Path.of(directory[0], "has-mib");
        while (true) {
            int mib = Files.exists(wanted) ? Integer.parseInt("0" + Files.readString(wanted).trim()) : 0;
            byte[][] next = new byte[mib][];
            for (int i = 0; i < mib; i++) {
                next[i] = i < kept.length ? kept[i] : new byte[1 << 20];
                next[i][i] = 1;
            }
            kept = next;
            Files.writeString(has, mib + "\\n");
            Thread.sleep(200);
        }
    }
}
"""

CLIENT = (
    "UPDATE counter SET n = n + 1 RETURNING n, pg_backend_pid(),"
    " pg_size_bytes(current_setting('effective_cache_size')), pg_size_bytes(current_setting('work_mem')),"
    " current_setting('max_parallel_workers') \\watch 1"
)
AS_POSTGRES = "setpriv --reuid=postgres --regid=postgres --clear-groups psql -XAtq -F ' ' -d postgres"
AS_NOBODY = "setpriv --reuid=nobody --regid=nogroup --clear-groups"
JCMD = "jcmd -J-Xint -J-XX:+UseSerialGC -J-Xmx32m"
IDENTITY = (
    "head -1 /var/lib/postgresql/15/main/postmaster.pid; systemctl show -P NRestarts -P MainPID jvm postgresql@15-main;"
    f" {AS_POSTGRES} -c 'SELECT pg_postmaster_start_time()'"
)


def grown(look: Look) -> bool:
    """Twice the minimum has arrived."""
    return _idle(look, Kind.MEMORY) and look.memory(VM) >= 2 * MIN_BYTES


def at_minimum(look: Look) -> bool:
    """Memory is, to less than a block. Not the CPUs: under emulation a hook may be work enough for a second one."""
    return _idle(look, Kind.MEMORY) and MIN_BYTES <= look.memory(VM) < MIN_BYTES + BLOCK_BYTES


def _idle(look: Look, kind: Kind) -> bool:
    return look.views[VM].connected and look.views[VM].resource(kind).phase is ResizePhase.IDLE


@dataclass(frozen=True, slots=True)
class Session:
    """What the client's session saw last; amounts in bytes."""

    commits: int
    backend: int
    cache: int
    work_mem: int
    parallel_workers: int


class Apps:
    """The applications of one VM, from outside."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.identity = ""

    async def shell(self, command: str, timeout_seconds: float = 60.0) -> str:
        return await self.host.shell(VM, f"cd /; {command}", timeout_seconds)

    async def start(self) -> None:
        """Start everything; it is up when this returns."""
        await self.shell(f"install -m 755 /usr/share/guestd/hooks/50-* {HOOKS}/ && systemctl start postgresql")
        await self.host.put(VM, "/run/vm-test/Main.java", MAIN_JAVA)
        java = "java -XX:+UseZGC -Xms32m -Xmx1g -XX:ZUncommitDelay=5 /run/vm-test/Main.java /run/jvm"
        await self.shell(f"systemd-run -q --unit=jvm --uid=nobody -p RuntimeDirectory=jvm {java}")
        await self.shell(f"{AS_POSTGRES} -c 'CREATE TABLE counter AS SELECT 0 AS n'")
        client = f"cd /; printf '%s\\n' {shlex.quote(CLIENT)} | {AS_POSTGRES}"
        client += " > /run/vm-test/client 2> /run/vm-test/client.err"
        await self.host.machines[VM].console.spawn(client)
        await self.host.machines[VM].console.wait_path("/run/jvm/has-mib", APPS_SECONDS)
        await self.shell("until grep -q . /run/vm-test/client; do sleep 0.3; done")
        self.identity = await self.shell(IDENTITY)

    async def session(self) -> Session:
        """The client's last line."""
        words = (await self.shell("grep . /run/vm-test/client | tail -1")).split()
        return Session(*map(int, words))

    async def show(self, setting: str) -> str:
        """What `SHOW` says in a session of its own."""
        return (await self.shell(f"{AS_POSTGRES} -c 'SHOW {setting}'")).strip()

    async def jcmd(self, command: str) -> str:
        """Ask the JVM, as its user."""
        return await self.shell(f"{AS_NOBODY} {JCMD} $(systemctl show -P MainPID jvm) {command}")

    async def soft_max(self) -> int:
        """SoftMaxHeapSize, bytes."""
        return int(re.findall(r"SoftMaxHeapSize=(\d+)", await self.jcmd("VM.flags"))[0])

    async def heap_committed(self) -> int:
        """What of its heap the JVM has from the kernel, bytes."""
        return int(re.findall(r"capacity (\d+)M", await self.jcmd("GC.heap_info"))[0]) * MIB

    async def keep(self, mib: int) -> None:
        """Have the Java program keep so much of its heap, and wait until it does."""
        await self.shell(
            f"echo {mib} > /run/jvm/wanted-mib; until [ $(cat /run/jvm/has-mib) = {mib} ]; do sleep 0.3; done"
        )

    async def said(self, text: str, count: int = 1) -> str:
        """Wait until the hooks' output in guestd's journal has a line that matches so often; the last of them."""
        deadline = time.monotonic() + HOOK_SECONDS
        while True:
            found = await self.shell(f"journalctl -u guestd -o cat --no-pager -g {shlex.quote(text)} || true")
            if len(found.splitlines()) >= count:
                return found.splitlines()[-1]
            assert time.monotonic() < deadline, f"not said {count} times: {text}\n{await self.journal()}"
            await asyncio.sleep(ASK_SECONDS)

    async def journal(self) -> str:
        return await self.shell("journalctl -u guestd -o short-monotonic --no-pager -n 60")

    async def until_session(self, what: str) -> Session:
        """Wait until the client's session plans with three quarters of the VM's memory, to a memory block."""
        deadline = time.monotonic() + HOOK_SECONDS
        while True:
            session, memory = await self.session(), (await self.host.look()).memory(VM)
            if abs(session.cache - memory * 3 // 4) <= BLOCK_BYTES:
                return session
            assert time.monotonic() < deadline, f"{what}: {session}, the VM has {memory}\n{await self.journal()}"
            await asyncio.sleep(ASK_SECONDS)

    async def check_unharmed(self) -> None:
        """Same server since the same time, same JVM, same connection, each commit there, no hook failed."""
        assert await self.shell(IDENTITY) == self.identity
        assert await self.shell("cat /run/vm-test/client.err /run/vm-test/errors 2>/dev/null || true") == ""
        lines = [line.split() for line in (await self.shell("grep . /run/vm-test/client")).splitlines()]
        assert [int(line[0]) for line in lines] == list(range(1, len(lines) + 1))
        assert len({line[1] for line in lines}) == 1
        assert await self.host.machines[VM].oom_kills() == 0
        journal = await self.journal()
        assert "failed at" not in journal, journal
        assert "did not end within" not in journal, journal


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(apps_image: GuestImage) -> AsyncIterator[Apps]:
    # One CPU: emulated, a machine with a JVM in it was reset by a vCPU that was plugged again.
    spec = GuestSpec(cpu_max=1, memory_min_bytes=MIN_BYTES, boot_memory_bytes=MIN_BYTES, memory_max_bytes=3 * GIB)
    async with Host(apps_image, {VM: spec}) as host:
        apps = Apps(host)
        begun = time.monotonic()
        await apps.start()
        print(
            f"booted in {host.machines[VM].boot_seconds:.1f} s, applications up {time.monotonic() - begun:.1f} s later"
        )
        await host.put(VM, "/etc/guestd/guestd.toml", CONFIG)
        # Hooks are told once what there is when guestd starts, and only now they are there.
        await apps.shell("systemctl restart guestd")
        yield apps


@pytest_asyncio.fixture(loop_scope="module")
async def apps(shared: Apps) -> AsyncIterator[Apps]:
    print(f"at rest after {await shared.host.until('at rest', at_minimum, SHRINK_SECONDS):.1f} s")
    await shared.until_session("at rest")
    yield shared
    await shared.check_unharmed()


async def test_settings_and_heap_follow_memory_up_and_down(apps: Apps) -> None:
    host = apps.host
    await apps.said("SoftMaxHeapSize 614 MiB")
    low = await apps.session()
    assert await apps.soft_max() == 614 * MIB
    assert low.work_mem // 1024 == (MIN_BYTES - SHARED_BUFFERS_BYTES) // 1024 // 3 // MAX_CONNECTIONS
    assert await apps.show("work_mem") == f"{low.work_mem // 1024}kB"

    await apps.keep(400)
    grow = await host.python(VM, loads.GROW, 1024, 100, 1000, "/dev/null")
    begun = time.monotonic()
    async with host.load(VM, grow):
        await host.until("grown", grown, GROW_SECONDS)
        grown_after = time.monotonic() - begun
        high = await apps.until_session("grown")
        await apps.said("SoftMaxHeapSize 1024 MiB")
        assert await apps.soft_max() == HEAP_MAX_BYTES  # the JVM's own maximum: 60 % of the memory would be more
        assert high.work_mem > low.work_mem
        assert await apps.show("work_mem") == f"{high.work_mem // 1024}kB"
        committed = await apps.heap_committed()
        assert committed >= 400 * MIB
        await apps.keep(20)  # the rest is garbage now, and stays in use until the JVM looks for some
    begun = time.monotonic()
    await host.until("shrunk", at_minimum, SHRINK_SECONDS)
    shrunk_after = time.monotonic() - begun
    again = await apps.until_session("shrunk")
    assert again.work_mem == low.work_mem
    assert again.backend == low.backend
    assert await apps.soft_max() == 614 * MIB
    left = await apps.heap_committed()
    assert left < committed - 200 * MIB
    print(
        f"memory: grown after {grown_after:.1f} s, shrunk after {shrunk_after:.1f} s; work_mem {low.work_mem >> 10}, "
        f"{high.work_mem >> 10}, {again.work_mem >> 10} KiB; heap {committed // MIB} -> {left // MIB} MiB committed;"
        f" {again.commits} commits of backend {again.backend}"
    )


async def test_a_veto_holds_a_shrink_until_it_is_lifted(apps: Apps) -> None:
    host = apps.host
    # The image's builder says that PostgreSQL shall never be left with less than 1.7 GiB.
    await apps.shell(f"sed -i 's/^SYSTEM_KIB=131072/SYSTEM_KIB=1610612/' {HOOKS}/50-postgresql")
    log_before = len(host.broker_log)
    grow = await host.python(VM, loads.GROW, 1408, 100, 1000, "/dev/null")
    async with host.load(VM, grow):
        await host.until("grown", grown, GROW_SECONDS)
        high = await apps.until_session("grown")
    why = await apps.said("no: .* MiB are needed")
    await host.says("veto hook 50-postgresql says no", log_before)
    kept = await apps.session()
    assert (await host.look()).memory(VM) >= 1738 * MIB
    assert kept.cache >= high.cache and kept.work_mem >= high.work_mem, "nothing was taken; a last block may have come"
    await apps.shell(f"install -m 755 /usr/share/guestd/hooks/50-postgresql {HOOKS}/")
    begun = time.monotonic()
    await host.until("shrunk", at_minimum, SHRINK_SECONDS)
    await apps.until_session("shrunk")
    print(f"veto: {why}; lifted, shrunk {time.monotonic() - begun:.1f} s later")
