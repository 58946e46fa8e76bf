"""The error tree.

::

    GuestdError
    ├── ConfigError            file, key, value and what was expected; exit code 2
    ├── TraceError             file, line and what was expected of a load trace; exit code 2
    ├── RecordError            a record of decisions that cannot be read or replayed; exit code 2
    ├── AdmissionError         a limit or a guest that does not fit, with the numbers
    ├── NotFoundError          no guest of that name
    ├── ProtocolError          a peer's message that makes no sense; the peer's stream ends, nothing else
    │   ├── VersionError       the two ends speak no common protocol
    │   ├── FloodError         more messages, or longer ones, than a peer may send
    │   └── SupersededError    no fault: a newer stream of the same guest has the floor, or the guest was taken out
    ├── JournalError           the broker's database cannot be read or written
    ├── HistoryError           what was cannot be read now; the broker goes on
    ├── UnreachableError       nobody answers at that address; exit code 5
    ├── DeniedError            somebody is there, and does not let us in; exit code 3
    └── HypervisorError        the hypervisor answered with a failure: nothing was done
        ├── HypervisorGone     the VM's process is gone: that is a confirmation
        ├── HypervisorUnreachable   no connection; the VM may or may not run
        └── OutcomeUnknown     a command was sent and its answer was lost: ask before acting again
"""


class GuestdError(Exception):
    """Base of all errors that guestd raises on purpose; the text is meant for people."""


class ConfigError(GuestdError):
    """Configuration that cannot be used. Nothing was started or changed."""

    def __init__(self, source: str, key: str, value: object, expected: str) -> None:
        self.source, self.key, self.value, self.expected = source, key, value, expected
        shown = f" = {value!r}" if value is not None else ""
        super().__init__(f"{source}: {key}{shown}: {expected}" if key else f"{source}: {expected}")


class TraceError(GuestdError):
    """A load trace that is missing or cannot be read. Nothing was computed.

    :param line: line in the file, from 1; 0 when it is the file as a whole.
    """

    def __init__(self, path: str, line: int, problem: str, expected: str) -> None:
        self.path, self.line, self.problem, self.expected = path, line, problem, expected
        where = f"{path}, line {line}" if line else path
        super().__init__(f"{where}: {problem}; expected {expected}")


class RecordError(GuestdError):
    """A record of decisions that is missing, damaged or of another version."""


class AdmissionError(GuestdError):
    """A guest or a limit that does not fit; the text holds the numbers."""


class NotFoundError(GuestdError):
    """No guest of that name."""


class ProtocolError(GuestdError):
    """A message from a peer that makes no sense."""


class VersionError(ProtocolError):
    """The two ends speak no common protocol."""


class FloodError(ProtocolError):
    """More messages, or longer ones, than a peer may send."""


class SupersededError(ProtocolError):
    """A newer stream of the same guest has the floor, or the guest was taken out."""


class JournalError(GuestdError):
    """The journal cannot be read or written; no grant is answered that is not durable."""


class HistoryError(GuestdError):
    """The store of events and history cannot be read; the text says what to do. No decision depends on it."""


class UnreachableError(GuestdError):
    """Nobody answers at that address."""


class DeniedError(GuestdError):
    """Whoever is at that address does not let this user, host or certificate in, or not do that."""


class HypervisorError(GuestdError):
    """The hypervisor refused or failed a command; it did nothing."""


class HypervisorGone(HypervisorError):
    """The VM's process is gone (seen by its pidfd, or its socket refuses)."""


class HypervisorUnreachable(HypervisorError):
    """There is no connection to the hypervisor; the VM may or may not run."""


class OutcomeUnknown(HypervisorError):
    """The answer to a command was lost; only asking the hypervisor tells what happened."""
