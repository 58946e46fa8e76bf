"""Host and broker as Prometheus metrics, made when somebody asks."""

import time
from collections.abc import Iterator
from itertools import accumulate
from typing import Protocol

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector

from guestd.broker.metrics.tally import ROUND_SECONDS, Tally
from guestd.model.event import DECISIONS
from guestd.model.resources import Resources
from guestd.model.units import MILLICORES_PER_VCPU
from guestd.model.view import GuestView, HostView


class Source(Protocol):
    """What the metrics are made from."""

    tally: Tally

    def host_view(self) -> HostView: ...
    def guest_names(self) -> list[str]: ...
    def guest_numbers(self, name: str) -> GuestView:
        """A guest, but for the reasons of its targets, which may be old.

        :raise NotFoundError: When there is none of that name.
        """
        ...


class HostCollector(Collector):
    """All that is not about a single guest."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def collect(self) -> Iterator[Metric]:
        """See `Collector`."""
        host, tally = self._source.host_view(), self._source.tally
        yield InfoMetricFamily("guestd_build", "The broker's version.", {"version": host.version})
        if host.started_at is not None:
            yield _gauge("guestd_broker_start_time_seconds", "When the broker started.", host.started_at.timestamp())
        yield _gauge("guestd_broker_time_seconds", "What the clock of the broker's host says.", time.time())
        yield _gauge("guestd_broker_epoch", "Number of this start of the broker.", host.epoch)
        yield from _pool("capacity", "What the host has to give, overcommit included", host.capacity)
        yield from _pool("reserve", "What is kept for the host itself", host.reserve)
        yield from _pool("overhead", "What is charged beside the guests for having them", host.overhead)
        yield from _pool("committed", "What is reserved for all guests together", host.committed)
        yield from _pool("minimums", "The minimums of all guests together", host.minimums)
        yield from _pool("free", "What can be granted above minimums now", host.free)
        yield _gauge("guestd_guests", "Guests that the broker serves.", host.guests)
        yield _gauge("guestd_guests_connected", "Guests whose daemon is there.", host.guests_connected)
        decisions = CounterMetricFamily(
            "guestd_decisions", "Decisions about guests, by what they were.", None, ["code"]
        )
        for code in DECISIONS:
            decisions.add_metric((code,), tally.decisions[code])
        yield decisions
        text = "Writes to the journal that failed; while they fail nothing is decided."
        yield CounterMetricFamily("guestd_journal_write_failures", text, tally.journal_failures)
        text = "Events that were not kept: of a guest with too many at once, or could not be written."
        events = CounterMetricFamily("guestd_events_dropped", text, None, ["cause"])
        events.add_metric(("flood",), tally.events_left_out)
        events.add_metric(("unwritten",), tally.events_lost)
        yield events
        text = "Samples of the history that could not be written."
        yield CounterMetricFamily("guestd_history_samples_dropped", text, tally.samples_lost)
        text = "How often decisions could not be recorded for replay, each failed try to go on among them."
        yield CounterMetricFamily("guestd_record_interruptions", text, tally.record_interruptions)
        counts = accumulate(tally.rounds)
        text = "How long rounds of decisions took, with their journal record."
        yield HistogramMetricFamily(
            "guestd_round_duration_seconds",
            text,
            [(str(bound), count) for bound, count in zip((*ROUND_SECONDS, "+Inf"), counts, strict=True)],
            tally.rounds_seconds,
        )


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value)


def _pool(name: str, text: str, amount: Resources) -> Iterator[Metric]:
    cpus = amount.cpu_millicores / MILLICORES_PER_VCPU
    yield _gauge(f"guestd_host_{name}_cpus", f"{text}: CPUs.", cpus)
    yield _gauge(f"guestd_host_{name}_memory_bytes", f"{text}: memory.", amount.memory_bytes)
