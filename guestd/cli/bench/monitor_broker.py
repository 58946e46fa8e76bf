"""The bench's broker: `guestd.sim.broker` that tells what its memory of the past costs, or does without.

``python -m guestd.cli.bench.monitor_broker counted FILE …`` writes to FILE, once a second, the CPU time that went into
record and history so far: what is done for them in the event loop, and their threads. ``forgetful FILE …`` keeps no
history; what keeps no record either says so in its configuration. The rest is `guestd.sim.broker`'s.
"""

import functools
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from guestd.broker.history.store import Store
from guestd.broker.record import machine as record_machine
from guestd.broker.record.recorder import Recorder
from guestd.sim import broker

_COUNTED: Final[tuple[tuple[type | ModuleType, str], ...]] = (
    (record_machine, "named"),
    (Recorder, "note"),
    (Recorder, "may_begin"),
    (Store, "note"),
    (Store, "look"),
    (Store, "_tick"),
)
_THREADS: Final = ("record", "history")
_TELL_SECONDS: Final = 1.0
_TRIES: Final = 20_000


class Spent:
    """CPU seconds by what they were spent for, less what counting them takes. A call within another one counts once."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}
        self._inside = False
        self._own_seconds = self._own()

    def _own(self) -> float:
        """What counting a call adds to what it counts."""
        nothing = self.counting("", lambda: None)
        for _ in range(_TRIES):
            nothing()
        del self.calls[""]
        return self.seconds.pop("") / _TRIES

    def counting(self, what: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call, counted. For one thread."""
        self.seconds[what], self.calls[what] = 0.0, 0

        @functools.wraps(call)
        def counted(*arguments: Any, **words: Any) -> Any:
            if self._inside:
                return call(*arguments, **words)
            self._inside, began = True, time.thread_time()
            try:
                return call(*arguments, **words)
            finally:
                self.seconds[what] += time.thread_time() - began
                self.calls[what] += 1
                self._inside = False

        return counted

    def told(self) -> dict[str, Any]:
        """All of it, the threads' own clocks included."""
        threads = {
            thread.name: time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
            for thread in threading.enumerate()
            if thread.name.startswith(_THREADS) and thread.ident is not None
        }
        calls = dict(self.calls)
        loop = {name: max(0.0, seconds - calls[name] * self._own_seconds) for name, seconds in self.seconds.items()}
        return {"loop": loop, "calls": calls, "threads": threads, "process": time.process_time()}


def _tell(spent: Spent, path: Path) -> None:
    while True:
        time.sleep(_TELL_SECONDS)
        aside = path.with_suffix(".new")
        aside.write_text(json.dumps(spent.told()))
        aside.rename(path)


def main() -> None:
    """See the module."""
    how, path = sys.argv[1], Path(sys.argv[2])
    del sys.argv[1:3]
    if how == "counted":
        spent = Spent()
        for owner, name in _COUNTED:
            counted = spent.counting(f"{owner.__name__.removeprefix('guestd.broker.')}.{name}", getattr(owner, name))
            setattr(owner, name, counted)
        threading.Thread(target=_tell, args=(spent, path), daemon=True).start()
    else:
        Store.note = Store.look = lambda *arguments, **words: None  # type: ignore[method-assign,assignment]
    broker.main()


if __name__ == "__main__":
    main()
