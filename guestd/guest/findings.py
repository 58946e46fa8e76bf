"""What `guestd check` says: findings, and how they are shown to people and programs."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TextIO


class Verdict(StrEnum):
    """How a finding is meant."""

    OK = "ok"
    NOTE = "note"  # works, with something to know
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing about this machine; `advice` is the way out."""

    name: str
    verdict: Verdict
    value: str
    advice: str = ""


def print_findings(findings: Iterable[Finding], output: str, stream: TextIO) -> None:
    """Write the findings for people (``text``) or programs (``json``)."""
    findings = list(findings)
    missing = sum(finding.verdict is Verdict.MISSING for finding in findings)
    if output == "json":
        rows = [{"name": f.name, "verdict": f.verdict.value, "value": f.value, "advice": f.advice} for f in findings]
        json.dump({"complete": not missing, "findings": rows}, stream, indent=2)
        stream.write("\n")
        return
    width = max((len(finding.name) for finding in findings), default=0)
    for finding in findings:
        stream.write(f"{finding.verdict:<8} {finding.name:<{width}}  {finding.value}\n")
        if finding.advice:
            stream.write(f"{'':<8} {'':<{width}}  -> {finding.advice}\n")
    stream.write(f"{missing} missing\n" if missing else "nothing is missing\n")


def read_text(path: Path) -> str | None:
    """A small text file, stripped; None when it is not there or not for us to read."""
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:
        return None
