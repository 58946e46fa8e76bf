"""What a guest looks like from inside when a test has waited in vain: who runs, who is stuck, what guestd said."""

from __future__ import annotations

from collections.abc import Mapping

from guestd.lab.errors import ConsoleError
from guestd.lab.machine import Machine

_LOOK = r"""
for p in /proc/[0-9]*; do read -r x < $p/stat && echo "$x"; done 2> /dev/null > /run/autopsy-1; sleep 2
for p in /proc/[0-9]*; do read -r x < $p/stat && echo "$x"; done 2> /dev/null |
  awk 'NR == FNR { was[$1] = $14 + $15; next }
  { d = ($14 + $15 - was[$1]) / 2; if (d > 2) print $2, d "% of a CPU,", $3 }' /run/autopsy-1 -
for p in /proc/[0-9]*; do grep -q '^State:.D' $p/status && { cat $p/comm; cat $p/stack; }; done 2> /dev/null
grep -E '^(MemTotal|MemFree|MemAvailable)' /proc/meminfo; head -n 1 /proc/pressure/cpu /proc/pressure/memory
journalctl -u guestd -o short-monotonic -n 25 --no-pager -q; dmesg | tail -n 40
"""
_SECONDS = 30.0


async def autopsy(machines: Mapping[str, Machine]) -> str:
    """All guests, in words; one that does not answer either is said so."""
    texts = []
    for name, machine in machines.items():
        try:
            text = (await machine.console.run(_LOOK, _SECONDS, check=False)).stdout
        except ConsoleError as error:
            text = f"does not answer: {error}"
        texts.append(f"inside {name}:\n{text}")
    return "\n".join(texts)
