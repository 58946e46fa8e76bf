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
area = mmap.mmap(-1, total << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
area.madvise(mmap.MADV_NOHUGEPAGE)
for start in range(0, total << 20, 10 << 20):
    end = min(start + (10 << 20), total << 20)
    area[start:end] = b"Z" * (end - start)
    time.sleep(0.1)
reader, writer = os.pipe()
fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096 * 4096)
base = ctypes.addressof(ctypes.c_char.from_buffer(area))
for offset in range((total - pinned) << 20, total << 20, 1 << 20):
    page = iovec(base + offset, 4096)
    if libc.vmsplice(writer, ctypes.byref(page), 1, 0) != 4096:
        raise OSError(ctypes.get_errno(), "vmsplice")
area.madvise(mmap.MADV_DONTNEED)
open(out, "w").close()
time.sleep(1000)
'''
