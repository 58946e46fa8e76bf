"""Which commands there are. Imports nothing: who only wants to know their names waits for no library."""

from typing import Final

COMMANDS: Final = {
    "status": "look",
    "top": "look",
    "get": "look",
    "explain": "past",
    "events": "past",
    "history": "past",
    "set-limits": "limits",
    "pause": "steer",
    "resume": "steer",
    "reclaim": "steer",
    "config": "configuration",
    "demo": "measure",
    "bench-guest": "measure",
    "bench-broker": "measure",
    "bench-monitor": "measure",
    "replay": "replay",
    "simulate": "simulate",
    "scoreboard": "scoreboard",
    "estimators": "measure",
}
"""In which module of this package each one is, in the order in which they are shown."""

QUESTIONS: Final = frozenset(name for name, module in COMMANDS.items() if module in ("look", "past", "limits", "steer"))
"""Those that ask a broker, print what it says, and leave nothing behind."""
