"""Loads for guests, on the standard library of their own Python. They know nothing of guestd."""

GROW = '''
"""Take memory at a steady rate, write to all of it, hold it, and say how it went: TOTAL_MIB MIB_PER_SECOND HOLD OUT."""
import json, sys, time

def available():
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) >> 10 for line in file if line.startswith("MemAvailable"))

total, rate, hold, out = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
step = rate // 10
pieces, least, begun = [], available(), time.monotonic()
due = begun
while len(pieces) * step < total:
    pieces.append(bytearray(b"Z") * (step << 20))
    least = min(least, available())
    due = max(due + 0.1, time.monotonic())
    time.sleep(max(0.0, due - time.monotonic()))
grown = time.monotonic() - begun
time.sleep(hold)
with open(out, "w") as file:
    json.dump({"mib": len(pieces) * step, "seconds": grown, "least_available_mib": least}, file)
'''

FILL = '''
"""Keep so much of the memory that there is in use, however much that is: SHARE LIMIT_MIB. Never gives any back."""
import sys, time

def meminfo():
    with open("/proc/meminfo") as file:
        values = {line.split(":")[0]: int(line.split()[1]) >> 10 for line in file}
    return values["MemTotal"], values["MemTotal"] - values["MemAvailable"]

share, limit = float(sys.argv[1]), int(sys.argv[2])
pieces, filled = [], 0
while True:
    total, used = meminfo()
    step = min(12, int(share * total) - used, limit - filled)
    if step > 0:
        pieces.append(bytearray(b"Z") * (step << 20))
        filled += step
    time.sleep(0.05)
'''

PIN = '''
"""Take TOTAL_MIB, pin one page in each MiB of the last PINNED_MIB, give back all the rest: OUT appears when done.

A page that lies in a pipe (vmsplice) cannot be moved, and so neither its memory block nor its virtio-mem
sub-block can be taken out, whatever zone they are in.
"""
import ctypes, fcntl, mmap, os, sys, time

class iovec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("len", ctypes.c_size_t)]

libc = ctypes.CDLL(None, use_errno=True)
total, pinned, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
NORESERVE = 0x4000  # else the kernel refuses at once what is more than the machine has now
area = mmap.mmap(-1, total << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
area.madvise(mmap.MADV_NOHUGEPAGE)
for start in range(0, total << 20, 10 << 20):
    end = min(start + (10 << 20), total << 20)
    area[start:end] = b"Z" * (end - start)
    time.sleep(0.1)
reader, writer = os.pipe()
fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, pinned * 4096)
base = ctypes.addressof(ctypes.c_char.from_buffer(area))
for offset in range((total - pinned) << 20, total << 20, 1 << 20):
    page = iovec(base + offset, 4096)
    if libc.vmsplice(writer, ctypes.byref(page), 1, 0) != 4096:
        raise OSError(ctypes.get_errno(), "vmsplice")
area.madvise(mmap.MADV_DONTNEED)
open(out, "w").close()
time.sleep(1000)
'''

_CLIENT = '''
import asyncio, socket, sys, time, json
from pathlib import Path
from guestd.model.errors import GuestdError
from guestd.model.guest import Capability, Identity
from guestd.model.messages import Demand, Hello, Urgency, Usable, Welcome
from guestd.model.reason import Reason
from guestd.model.resources import Resources
from guestd.wire.link import converse

USABLE = Usable(1, 1, 1 << 29, 1 << 29, 1 << 27)

def hello(hostname):
    boot_id = bytes.fromhex(Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", ""))
    everything = frozenset({Capability.CPU_ONLINE, Capability.MEMORY_ONLINE, Capability.VIRTIO_MEM})
    born = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    return Hello(1, 1, Identity(boot_id, born, "liar", hostname, "none", everything), USABLE)

async def talk(cid, port, source_port, name, on_open, seconds):
    """One stream to the host at `cid`; how it ended in one word."""
    async def dial():
        sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        try:
            if source_port:
                sock.bind((socket.VMADDR_CID_ANY, source_port))
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, (cid, port))
        except BaseException as error:
            errors.append(type(error).__name__)
            sock.close()
            raise
        return sock
    errors = []
    try:
        async with asyncio.timeout(seconds):
            await converse(dial, hello(name), on_open, lambda message: None)
    except TimeoutError:
        return "served to the end"
    except GuestdError as error:
        return " ".join([type(error).__name__, *errors[:1]])
'''

LIAR = (
    '"""Claim to be another VM and to need everything: NAME SOURCE_PORT SECONDS. Prints what came of it as JSON."""'
    + _CLIENT
    + """
def on_open(stream, welcome):
    seen["served as"] = welcome.guest
    everything = Resources(64_000, 100 << 30)
    reasons = (Reason("lie", "I am " + name),)
    stream.say(Demand(1, everything, everything, 1 << 50, Urgency.NOW, reasons, USABLE))

name, source_port, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
seen = {}
seen["ended"] = asyncio.run(talk(2, 4747, source_port, name, on_open, seconds))
print(json.dumps(seen))
"""
)

LOOPBACK = (
    '"""The broker\'s own listener and server on AF_VSOCK, and guests that dial them over vsock_loopback."""'
    + _CLIENT
    + """
from guestd.wire.relay import IngressRelay, Peers, vsock_listener
from guestd.wire.serve_guests import serve_guests

class Outbox:
    def __init__(self, first):
        self.first = first
    async def next(self):
        if self.first is None:
            await asyncio.Event().wait()
        first, self.first = self.first, None
        return first

class Backend:
    def connect(self, peer, hello):
        connected.append([peer.guest, peer.channel, hello.identity.hostname])
        return len(connected), Outbox(Welcome(1, peer.guest, 1, 10.0, Resources(), Resources()))
    def receive(self, peer, session, message):
        pass
    def disconnect(self, peer, session):
        pass
    def count_protocol_error(self, peer):
        connected.append([peer.guest, "error", ""])

async def main():
    peers, server_path = Peers(), Path("/run/vm-test/server.sock")
    server = await serve_guests(Backend(), peers, server_path)
    relay = IngressRelay(server_path, peers)
    relay.listen_vsock(vsock_listener(5001), guests.get)
    ends = {}
    for case, source_port, known in (("root", 900, True), ("anybody", 0, True), ("stranger", 901, False)):
        guests.clear()
        if known:
            guests[1] = "loop"
        opened = []
        ends[case] = await talk(1, 5001, source_port, "other", lambda stream, welcome: opened.append(welcome.guest), 3)
        ends[case + " served as"] = opened
    await relay.close()
    await server.stop(0)
    print(json.dumps({"ends": ends, "connected": connected}))

guests, connected = {}, []
asyncio.run(main())
"""
)
