"""Bugs that were seeded on purpose, a patch each in `bugs/`: the fire finds every one.

Each patch is applied to a copy of the package, and the state machine is run on that in a process of its own until the
first broken promise. A patch that no longer applies is mended by hand: the bug in its first line, in today's code.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PACKAGE = HERE.parents[1] / "guestd"
PATCHES = sorted((HERE / "bugs").glob("*.patch"))
EXAMPLES = 60
"""At most; most bugs were found within 10."""

_HUNK = re.compile(r"@@ -(\d+)(?:,\d+)? \+\d+(?:,\d+)? @@")


def apply(patch: str, root: Path) -> None:
    """Apply a unified diff of one file, exactly where it says or, when lines moved, at the only place that fits.

    :raise ValueError: When a hunk does not fit, or in more than one place.
    """
    head, *hunks = re.split(r"^(?=@@ )", patch, flags=re.MULTILINE)
    path = root / re.findall(r"^\+\+\+ b/(\S+)", head, flags=re.MULTILINE)[0]
    text = path.read_text()
    for hunk in hunks:
        assert _HUNK.match(hunk)
        lines = hunk.splitlines(keepends=True)[1:]
        old = "".join(line[1:] for line in lines if line[0] in " -")
        new = "".join(line[1:] for line in lines if line[0] in " +")
        if text.count(old) != 1:
            raise ValueError(f"{path.relative_to(root)} has {text.count(old)} places for this:\n{old}")
        text = text.replace(old, new)
    path.write_text(text)


def test_there_are_ten_bugs_at_least() -> None:
    assert len(PATCHES) >= 10


@pytest.mark.timeout(300)
@pytest.mark.parametrize("patch", PATCHES, ids=lambda path: path.stem)
def test_the_fire_finds_the_bug(patch: Path, tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "guestd", ignore=shutil.ignore_patterns("__pycache__"))
    try:
        apply(patch.read_text(), tmp_path)
    except ValueError as error:
        pytest.fail(f"{patch.name} no longer applies, seed its bug anew in today's code: {error}")
    run = subprocess.run(
        [sys.executable, str(HERE / "fire.py"), str(EXAMPLES)],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    broken = re.search(r"^AssertionError: (\(\d+(?:, \d+)*\) .*)$", run.stderr, flags=re.MULTILINE)
    assert run.returncode == 1, f"{patch.name} was not found in {EXAMPLES} examples: {run.stdout}"
    assert broken is not None, f"{patch.name} broke no promise but this: {run.stderr[-2000:]}"
    assert str(tmp_path / "guestd") in run.stderr, "another guestd was tried than the one with the bug"
    print(f"{patch.stem}: {broken[1]}")
