"""Writing a directory tree into an ext4 image with debugfs: no root, no loop device, no mount."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from guestd.lab.errors import ImageError

_EXPECTED = re.compile(
    r"debugfs[ :0-9]|Allocated inode|rm: File not found|\S*mkdir: Ext2 directory already exists|$", re.ASCII
)


def commands(tree: Path) -> str:
    """debugfs commands that put everything under `tree` into the image, owned by root.

    Files and symbolic links replace what is there; directories that are there stay.

    :raise ValueError: When a name cannot be written as a debugfs word.
    """
    lines: list[str] = []
    for directory, names, files in os.walk(tree):
        names.sort()
        at = Path(directory)
        inside = "/" + str(at.relative_to(tree)).removeprefix(".")
        if at != tree:
            lines += [f"mkdir {_word(inside)}"]
        for name in sorted([*files, *(name for name in names if (at / name).is_symlink())]):
            path = at / name
            target = f"{inside.rstrip('/')}/{name}"
            lines.append(f"rm {_word(target)}")
            if path.is_symlink():
                lines.append(f"symlink {_word(target)} {_word(str(path.readlink()))}")
                continue
            mode = stat.S_IMODE(path.stat().st_mode)
            lines.append(f"write {_word(str(path))} {_word(target)}")
            lines.append(f"set_inode_field {_word(target)} mode 0{stat.S_IFREG | mode:o}")
        names[:] = [name for name in names if not (at / name).is_symlink()]
    return "\n".join(lines) + "\n"


def check(output: bytes) -> None:
    """Read what debugfs printed: its exit code is 0 whatever happened.

    :raise ImageError: When a command failed, other than by removing what is not there or making what is.
    """
    for line in output.decode(errors="replace").splitlines():
        if not _EXPECTED.match(line):
            raise ImageError(f"debugfs: {line}")


def _word(text: str) -> str:
    if '"' in text or "\n" in text:
        raise ValueError(f"not a name for debugfs: {text!r}")
    return f'"{text}"'
