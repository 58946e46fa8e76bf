"""The grammar: what is understood, and that all else is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestd.guest.helper.grammar import (
    MAX_OPERATIONS,
    BadRequest,
    parse_cancel,
    parse_operation,
    parse_request,
    subject,
)


@pytest.mark.parametrize(
    ("line", "operation"),
    [
        ("cpu 3 online", ("cpu", "3", "online")),
        ("cpu 0 offline", ("cpu", "0", "offline")),
        ("block 37 online_movable", ("block", "37", "online_movable")),
        ("block 16777215 offline", ("block", "16777215", "offline")),
        ("dial 7777", ("dial", "7777")),
        ("psi memory", ("psi", "memory")),
        ("reclaim 1125899906842624", ("reclaim", "1125899906842624")),
        ("hook before-shrink cpu 2500 0 1", ("hook", "before-shrink", "cpu", "2500", "0", "1")),
        ("hook after-grow cpu 0 65535000 600", ("hook", "after-grow", "cpu", "0", "65535000", "600")),
        ("hook burst-ending memory 1 1125899906842624 30", ("hook", "burst-ending", "memory", "1", str(1 << 50), "30")),
    ],
)
def test_operations_of_the_grammar(line: str, operation: tuple[str, ...]) -> None:
    assert parse_operation(line) == operation
    assert parse_request(f"7 100\n{line}".encode()) == (7, 100, [operation])


@pytest.mark.parametrize(
    "line",
    [
        "",
        "cpu",
        "cpu 1",
        "cpu 1 on",
        "cpu 01 online",
        "cpu -1 online",
        "cpu +1 online",
        "cpu 1 online ",
        "cpu  1 online",
        "cpu 1\tonline",
        "cpu 65536 online",
        "cpu 99999999999999999999 online",
        "cpu ../1 online",
        "cpu 1/../../x online",
        "CPU 1 online",
        "cpu 1 online_movable",
        "block 1 removable",
        "block 16777216 offline",
        "block 1 online\0",
        "block ١ offline",
        "dial 0",
        "dial 4294967295",
        "dial 1 2",
        "psi irq",
        "psi memory some",
        "reclaim",
        "reclaim 0",
        "reclaim 1125899906842625",
        "reclaim 1M",
        "reclaim 1048576 swappiness=0",
        "compact",
        "hook",
        "hook before-shrink cpu 2000 1000",
        "hook before-shrink cpu 2000 1000 0",
        "hook before-shrink cpu 2000 1000 601",
        "hook before-shrink cpu 65535001 1000 5",
        "hook before-shrink cpu 2000 -1000 5",
        "hook before-shrink memory 1125899906842625 1 5",
        "hook before-shrink io 2000 1000 5",
        "hook after-shrink cpu 2000 1000 5",
        "hook ../x cpu 2000 1000 5",
        "hook before-shrink cpu 2000 1000 5 10-a",
        "exec true",
    ],
)
def test_everything_else_is_refused(line: str) -> None:
    assert parse_operation(line) is None
    with pytest.raises(BadRequest):
        parse_request(f"7 100\n{line}".encode())


@pytest.mark.parametrize(
    "head", ["", "7", "0 100", "7 0", "7 660001", "7 1e3", "4294967296 100", "7 100 1", " 7 100", "7 100 "]
)
def test_bad_heads_are_refused(head: str) -> None:
    with pytest.raises(BadRequest):
        parse_request(f"{head}\ncpu 1 online".encode())


def test_a_request_has_at_least_one_operation_and_at_most_the_bound() -> None:
    with pytest.raises(BadRequest) as caught:
        parse_request(b"7 100")
    assert caught.value.request_id == 7
    line = b"\nblock 1 online"
    assert len(parse_request(b"7 100" + line * MAX_OPERATIONS)[2]) == MAX_OPERATIONS
    with pytest.raises(BadRequest):
        parse_request(b"7 100" + line * (MAX_OPERATIONS + 1))


WORDS = st.sampled_from(
    (
        *(
            "cpu",
            "block",
            "dial",
            "psi",
            "reclaim",
            "compact",
            "hook",
            "before-shrink",
            "5",
            "0",
            "1",
            "00",
            "-1",
            "99999999",
            "online",
            "offline",
            "online_movable",
        ),
        *("memory", "/", "..", "", "\0", "é", "7 100", "\n", " "),
    )
)


@given(st.one_of(st.binary(max_size=200), st.lists(WORDS, max_size=12).map(lambda w: " ".join(w).encode())))
def test_fuzz_a_request_is_understood_exactly_or_refused(message: bytes) -> None:
    parse_cancel(message)
    try:
        request_id, deadline_ms, operations = parse_request(message)
    except BadRequest as error:
        assert 0 <= error.request_id < 1 << 32
        return
    # What was understood says the same again, byte for byte: nothing was skipped or bent.
    again = "\n".join([f"{request_id} {deadline_ms}", *(" ".join(op) for op in operations)])
    assert again.encode() == message
    for op in operations:
        assert "/" not in " ".join(op) and "." not in " ".join(op)


@given(st.text(max_size=30))
def test_fuzz_operations(line: str) -> None:
    operation = parse_operation(line)
    assert operation is None or " ".join(operation) == line


def test_cancel() -> None:
    assert parse_cancel(b"12 cancel") == 12
    assert parse_cancel(b"12 cancel ") is None
    assert parse_cancel(b"x cancel") is None


def test_what_an_operation_is_about() -> None:
    assert subject(("block", "3", "offline")) == subject(("block", "3", "online")) != subject(("block", "4", "online"))
    assert subject(("reclaim", "1000")) == subject(("reclaim", "2000"))
    assert subject(("hook", "after-grow", "cpu", "1", "2", "3")) == ("hook", "after-grow")
