"""What all messages are made of: kinds, amounts, limits, reasons, times; and the checks of each."""

from typing import TypeVar

from google.protobuf.duration_pb2 import Duration

from guestd.model.errors import ProtocolError
from guestd.model.reason import Reason
from guestd.model.resources import Kind, Limits, Resources
from guestd.v1 import common_pb2

T = TypeVar("T")
MAX_MESSAGE_BYTES = 64 * 1024
MAX_CPU_MILLICORES = 1 << 31
MAX_MEMORY_BYTES = 1 << 56
MAX_VCPUS = 8192
MAX_REASONS = 8
MAX_TEXT = 512
MAX_WORD = 64
_MAX_SECONDS = 365 * 86400
KIND = {Kind.CPU: common_pb2.RESOURCE_KIND_CPU, Kind.MEMORY: common_pb2.RESOURCE_KIND_MEMORY}
KIND_BACK = {number: kind for kind, number in KIND.items()}


def clean(text: str, most: int) -> str:
    """A peer's text made fit for logs and terminals: no control characters, at most `most` characters."""
    text = text[:most]
    return text if text.isprintable() else "".join(char if char.isprintable() else "�" for char in text)


def resources_to_wire(resources: Resources) -> common_pb2.Resources:
    return common_pb2.Resources(cpu_millicores=resources.cpu_millicores, memory_bytes=resources.memory_bytes)


def resources_from_wire(name: str, resources: common_pb2.Resources) -> Resources:
    """:raise ProtocolError: When an amount is beyond any machine."""
    cpu, memory = resources.cpu_millicores, resources.memory_bytes
    if cpu > MAX_CPU_MILLICORES or memory > MAX_MEMORY_BYTES:
        within(f"{name}.cpu_millicores", cpu, MAX_CPU_MILLICORES)
        within(f"{name}.memory_bytes", memory, MAX_MEMORY_BYTES)
    return Resources(cpu, memory)


def limits_to_wire(limits: Limits) -> common_pb2.Limits:
    return common_pb2.Limits(
        min=resources_to_wire(limits.min),
        max=resources_to_wire(limits.max),
        weight=resources_to_wire(limits.weight),
        burst=resources_to_wire(limits.burst),
        burst_credit=resources_to_wire(limits.burst_credit),
        burst_refill=resources_to_wire(limits.burst_refill),
    )


def limits_from_wire(limits: common_pb2.Limits) -> Limits:
    """An unset weight is 100.

    :raise ProtocolError: When an amount is beyond any machine.
    """
    weight = resources_from_wire("limits.weight", limits.weight) if limits.HasField("weight") else Resources(100, 100)
    return Limits(
        resources_from_wire("limits.min", limits.min),
        resources_from_wire("limits.max", limits.max),
        weight,
        resources_from_wire("limits.burst", limits.burst),
        resources_from_wire("limits.burst_credit", limits.burst_credit),
        resources_from_wire("limits.burst_refill", limits.burst_refill),
    )


def reason_to_wire(reason: Reason) -> common_pb2.Reason:
    return common_pb2.Reason(code=reason.code[:MAX_WORD], text=reason.text[:MAX_TEXT])


def reason_from_wire(reason: common_pb2.Reason) -> Reason:
    return Reason(clean(reason.code, MAX_WORD), clean(reason.text, MAX_TEXT))


def most(kind: Kind) -> int:
    return MAX_CPU_MILLICORES if kind is Kind.CPU else MAX_MEMORY_BYTES


def within(name: str, value: int, most: int) -> int:
    if value > most:
        raise ProtocolError(f"{name} is {value}, more than {most}")
    return value


def known(name: str, value: T | None) -> T:
    if value is None:
        raise ProtocolError(f"{name} is missing or not known")
    return value


def duration(seconds: float) -> Duration:
    whole = int(seconds)
    return Duration(seconds=whole, nanos=int((seconds - whole) * 1e9))


def seconds(name: str, duration: Duration) -> float:
    seconds = duration.seconds + duration.nanos / 1e9
    if not 0 <= seconds <= _MAX_SECONDS:
        raise ProtocolError(f"{name} is {seconds:g} s, must be within 0 s and a year")
    return seconds


def check_amounts(fields: dict[str, int]) -> None:
    """Check the amounts of a change of limits, by the names of their fields.

    :raise ProtocolError: When one is beyond any machine.
    """
    for name, value in fields.items():
        within(name, value, MAX_CPU_MILLICORES if name.startswith("cpu_") else MAX_MEMORY_BYTES)
