"""The contract is clean, and the generated code is what it generates."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_buf_finds_nothing_to_say() -> None:
    buf = Path(sys.executable).parent / "buf"
    done = subprocess.run([buf, "lint", "proto"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_generated_code_is_fresh(tmp_path: Path) -> None:
    command = ["make", "--no-print-directory", "generate-proto", f"OUT={tmp_path}", f"PYTHON={sys.executable}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    fresh = {path.name: path.read_bytes() for path in (tmp_path / "guestd" / "v1").iterdir()}
    kept = {path.name: path.read_bytes() for path in (ROOT / "guestd" / "v1").iterdir() if path.is_file()}
    del kept["__init__.py"]
    assert sorted(fresh) == sorted(kept), "run `make proto`"
    changed = sorted(name for name in fresh if fresh[name] != kept[name])
    assert changed == [], "run `make proto`"
