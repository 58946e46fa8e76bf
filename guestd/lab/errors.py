"""What can go wrong in the lab.

LabError
├── LabUnavailable      a tool or a right is missing on this machine
├── ImageError          the guest image could not be built
├── MachineError        QEMU did not start, died, or did not do what it was asked
└── ConsoleError        no usable answer from the agent on the guest's serial port
    ├── ConsoleTimeout  none in time: the command may or may not have run
    └── CommandFailed   the command ran and its exit code was not 0
"""

from __future__ import annotations


class LabError(Exception):
    """Base of all errors of the lab."""


class LabUnavailable(LabError):
    """Something that must be installed, or allowed, is missing on this machine."""

    def __init__(self, missing: list[str], advice: str = "") -> None:
        """
        :param missing: What is missing, one human-readable item each.
        :param advice: What to type to get it.
        """
        self.missing = list(missing)
        self.advice = advice
        text = "no virtual machines here, missing: " + ", ".join(missing)
        super().__init__(f"{text} (try: {advice})" if advice else text)


class ImageError(LabError):
    """The guest image could not be built; the text ends with the last lines of the tool that failed."""


class MachineError(LabError):
    """QEMU did not start, died, or did not do what it was asked."""


class ConsoleError(LabError):
    """No usable answer from the agent on the guest's serial port."""


class ConsoleTimeout(ConsoleError):
    """No answer in time. Whether the command ran is unknown."""


class CommandFailed(ConsoleError):
    """The command ran in the guest and its exit code was not 0."""

    def __init__(self, command: str, exit_code: int, stdout: str, stderr: str) -> None:
        self.command = command
        self.exit_code = exit_code
        self.stdout = stdout
        self.stderr = stderr
        tail = (stderr or stdout).strip()[-800:]
        super().__init__(f"exit code {exit_code} from {command!r}: {tail}")
