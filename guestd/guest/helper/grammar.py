"""What the root helper accepts and answers; nothing else is ever done.

    request = ID " " DEADLINE_MS ("\\n" operation)+        one SOCK_SEQPACKET message
    operation = "cpu" N "online"|"offline"
              | "block" N "online"|"online_movable"|"online_kernel"|"offline"
              | "reclaim" BYTES                           the kernel gives up so much cold memory
              | "hook" EVENT KIND BEFORE AFTER SECONDS    run the administrator's hooks (`hooks.py`)
              | "dial" PORT                               a stream to the host (CID 2), from a port below 1024
              | "psi" "cpu"|"memory"|"io"                 a PSI trigger (`psi.TRIGGERS`)
    cancel = ID " cancel"                                 the deadline of that request is now

EVENT is before-shrink, after-grow or burst-ending, KIND is cpu or memory; BEFORE and AFTER are whole amounts,
in millicores or bytes.

Answers, each one message of words:

    ID "result" INDEX STATUS ERRNO MICROSECONDS STATE    one operation is over; dial and psi carry the descriptor
    ID "end" "ok"|"timeout"|"stuck"|"died"               the last word: operations without a result share its fate
    ID "refused" "grammar"|"busy"|"duplicate"            nothing was done; ID is 0 when it could not be read
"""

from guestd.guest import psi

MAX_MESSAGE = 16 << 10
MAX_OPERATIONS = 256
MAX_HOOK_SECONDS = 600
MAX_DEADLINE_MS = (MAX_HOOK_SECONDS + 60) * 1000

BLOCK_TARGETS = ("online", "online_movable", "online_kernel", "offline")
OPENING = ("dial", "psi")  # switches nothing
HOOK_EVENTS = ("before-shrink", "after-grow", "burst-ending")

_MAX_ID = (1 << 32) - 1
_MAX_CPU = (1 << 16) - 1
_MAX_BLOCK = (1 << 24) - 1
_MAX_PORT = (1 << 32) - 2  # the last one means "any"
_MAX_BYTES = 1 << 50
_MAX_AMOUNTS = {"cpu": _MAX_CPU * 1000, "memory": _MAX_BYTES}

Operation = tuple[str, ...]
Result = tuple[str, int, str]  # status, errno, one word: the state read back


class BadRequest(Exception):
    """A message that is not a request; `request_id` is 0 when not even that could be read."""

    def __init__(self, request_id: int) -> None:
        self.request_id = request_id
        super().__init__(f"request {request_id} breaks the grammar")


def number(word: str, largest: int) -> int | None:
    """A plain decimal number up to `largest`, without sign, leading zeros or anything else; else None."""
    if not word.isascii() or not word.isdigit() or len(word) > 20 or (word[0] == "0" and word != "0"):
        return None
    value = int(word)
    return value if value <= largest else None


def parse_request(message: bytes) -> tuple[int, int, list[Operation]]:
    """Request id, deadline in ms, and operations.

    :raise BadRequest: When the message is anything but a request.
    """
    request_id = 0
    try:
        head, *lines = message.decode("ascii").split("\n")
    except UnicodeDecodeError:
        raise BadRequest(0) from None
    words = head.split(" ")
    request_id = number(words[0], _MAX_ID) or 0
    deadline_ms = number(words[1], MAX_DEADLINE_MS) if len(words) == 2 else None
    operations = [parse_operation(line) for line in lines[: MAX_OPERATIONS + 1]]
    if not request_id or not deadline_ms or not operations or len(operations) > MAX_OPERATIONS:
        raise BadRequest(request_id)
    good = [operation for operation in operations if operation is not None]
    if len(message) > MAX_MESSAGE or len(good) != len(operations):
        raise BadRequest(request_id)
    return request_id, deadline_ms, good


def parse_cancel(message: bytes) -> int | None:
    """The request that is to be cancelled, when the message says so."""
    head, _, rest = message.partition(b" ")
    return number(head.decode("ascii", "replace"), _MAX_ID) if rest == b"cancel" else None


def parse_operation(line: str) -> Operation | None:
    """One line of a request, or None when it is not in the grammar."""
    match line.split(" "):
        case ["cpu", n, "online" | "offline" as target] if number(n, _MAX_CPU) is not None:
            return "cpu", n, target
        case ["block", n, target] if target in BLOCK_TARGETS and number(n, _MAX_BLOCK) is not None:
            return "block", n, target
        case ["reclaim", size] if number(size, _MAX_BYTES):
            return "reclaim", size
        case ["hook", event, kind, before, after, seconds] if event in HOOK_EVENTS and kind in _MAX_AMOUNTS:
            amounts = [number(one, _MAX_AMOUNTS[kind]) for one in (before, after)]
            if None not in amounts and number(seconds, MAX_HOOK_SECONDS):
                return "hook", event, kind, before, after, seconds
        case ["dial", port] if number(port, _MAX_PORT):
            return "dial", port
        case ["psi", kind] if kind in psi.TRIGGERS:
            return "psi", kind
    return None


def subject(operation: Operation) -> Operation:
    """What an operation works on: what is refused while an earlier worker is stuck with it in the kernel."""
    return operation[:1] if operation[0] == "reclaim" else operation[:2]
