"""Text that others wrote, made safe for a terminal.

A guest chooses its host name and its reasons. Shown as they are, they could move the cursor, change
colours or turn the reading direction, so everything that is not printable is shown as an escape. Markup of
rich is no danger as long as such text only ever goes into `rich.text.Text`, which never parses any.
"""


def printable(text: str, limit: int = 512) -> str:
    """The text with every control, format and unassigned character escaped, cut to `limit` characters."""
    if text.isprintable() and len(text) <= limit:
        return text
    shown = "".join(_shown(one) for one in text[:limit])
    return shown if len(text) <= limit else f"{shown}…"


def _shown(character: str) -> str:
    if character.isprintable():
        return character
    return character.encode("unicode_escape", "backslashreplace").decode("ascii")
