"""What is exposed: every number in base units, in both formats, as the library's own parsers read it."""

import asyncio
import time

import pytest
from metrics_source import BURSTING, FakeSource, guest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_plain

from guestd.broker import config as configuration
from guestd.broker.config import GuestConfig
from guestd.broker.metrics.exposition import Exposition
from guestd.broker.metrics.guests import ANY_GUEST
from guestd.model.event import EventCode
from guestd.model.units import GIB, MIB

OPENMETRICS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"


def samples(text: bytes) -> dict[str, float]:
    """Every line of plain text, as `name{label="value",...}`."""
    found = {}
    for family in parse_plain(text.decode()):
        for one in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(one.labels.items()))
            key = f"{one.name}{{{labels}}}" if labels else one.name
            assert key not in found
            found[key] = one.value
    return found


async def plain(source: FakeSource) -> dict[str, float]:
    text, content_type = await Exposition(source).render("")
    assert content_type.startswith("text/plain")
    return samples(text)


async def test_a_guests_numbers_are_in_cpus_bytes_and_ratios() -> None:
    found = await plain(FakeSource(guest("a", quota=2500)))
    expected = {
        "demand_cpus": 1.5, "target_cpus": 2, "reserved_cpus": 2, "plugged_cpus": 3, "usable_cpus": 2,
        "used_cpus": 1.25, "burst_cpus": 0, "min_cpus": 0.5, "max_cpus": 4, "quota_cpus": 2.5, "throttled_ratio": 0.25,
        "demand_memory_bytes": GIB, "target_memory_bytes": 2 * GIB, "reserved_memory_bytes": 2 * GIB,
        "plugged_memory_bytes": GIB, "usable_memory_bytes": 900 * MIB, "used_memory_bytes": 700 * MIB,
        "min_memory_bytes": 512 * MIB, "max_memory_bytes": 4 * GIB, "connected": 1, "paused": 0, "observed": 0,
        "last_seen_seconds": 2.5, "protocol_errors_total": 5,
    }  # fmt: skip
    assert {name: found[f'guestd_guest_{name}{{guest="a"}}'] for name in expected} == expected


async def test_what_is_of_a_fixed_set_is_a_label() -> None:
    found = await plain(FakeSource(guest("a")))
    assert found['guestd_guest_overdue{guest="a",kind="cpu"}'] == 1
    assert found['guestd_guest_overdue{guest="a",kind="memory"}'] == 0
    assert found['guestd_guest_vm_status{guest="a",status="running"}'] == 1
    assert found['guestd_guest_vm_status{guest="a",status="gone"}'] == 0
    assert found['guestd_guest_resizing{guest="a",kind="cpu",phase="unplugging"}'] == 1
    assert found['guestd_guest_resizing{guest="a",kind="memory",phase="unplugging"}'] == 0
    resizes = {key: value for key, value in found.items() if key.startswith("guestd_guest_resizes_total") and value}
    assert resizes == {
        'guestd_guest_resizes_total{guest="a",kind="cpu",outcome="grown"}': 3,
        'guestd_guest_resizes_total{guest="a",kind="cpu",outcome="refused"}': 2,
        'guestd_guest_resizes_total{guest="a",kind="memory",outcome="partial"}': 1,
        'guestd_guest_resizes_total{guest="a",kind="memory",outcome="failed"}': 4,
    }


async def test_what_does_not_exist_is_no_line() -> None:
    found = await plain(FakeSource(guest("a", last_seen_ago_seconds=None), guest("b", limits=BURSTING)))
    of_a = {key.partition("{")[0] for key in found if 'guest="a"' in key}
    of_b = {key.partition("{")[0] for key in found if 'guest="b"' in key}
    assert of_b - of_a == {
        "guestd_guest_last_seen_seconds",
        "guestd_guest_burst_limit_cpus",
        "guestd_guest_burst_credit_cpu_seconds",
    }
    assert found['guestd_guest_burst_limit_cpus{guest="b"}'] == 3
    assert found['guestd_guest_burst_credit_cpu_seconds{guest="b"}'] == 90


async def test_host_and_broker_are_told_too() -> None:
    source = FakeSource()
    source.tally.decisions[EventCode.GROWN] += 2
    source.tally.journal_failures = 3
    source.tally.events_left_out, source.tally.events_lost, source.tally.samples_lost = 4, 5, 6
    source.tally.record_interruptions = 7
    for seconds in (0.0001, 0.0005, 0.02, 7.0):
        source.tally.count_round(seconds)
    found = await plain(source)
    assert found['guestd_build_info{version="1.2.3"}'] == 1
    assert found["guestd_broker_start_time_seconds"] == 1767312000
    assert abs(found["guestd_broker_time_seconds"] - time.time()) < 60
    assert (found["guestd_broker_epoch"], found["guestd_guests"], found["guestd_guests_connected"]) == (7, 1, 0)
    assert (found["guestd_host_capacity_cpus"], found["guestd_host_free_cpus"]) == (8, 7.5)
    assert found["guestd_host_capacity_memory_bytes"] == 16 * GIB
    assert found['guestd_decisions_total{code="grown"}'] == 2
    assert found['guestd_decisions_total{code="ended-short"}'] == 0
    assert found["guestd_journal_write_failures_total"] == 3
    assert found['guestd_events_dropped_total{cause="flood"}'] == 4
    assert found['guestd_events_dropped_total{cause="unwritten"}'] == 5
    assert found["guestd_history_samples_dropped_total"] == 6
    assert found["guestd_record_interruptions_total"] == 7
    buckets = {le: found[f'guestd_round_duration_seconds_bucket{{le="{le}"}}'] for le in ("0.0005", "0.025", "1.0")}
    assert buckets == {"0.0005": 2, "0.025": 3, "1.0": 3}
    assert found['guestd_round_duration_seconds_bucket{le="+Inf"}'] == found["guestd_round_duration_seconds_count"] == 4
    assert found["guestd_round_duration_seconds_sum"] == pytest.approx(7.0206)
    assert found["process_cpu_seconds_total"] > 0


async def test_both_formats_say_the_same() -> None:
    exposition = Exposition(FakeSource(guest("a"), guest("b", limits=BURSTING, quota=1000)))
    plain_text, _ = await exposition.render("")
    text, content_type = await exposition.render(OPENMETRICS)
    assert content_type.startswith("application/openmetrics-text; version=1.0.0")
    assert text.endswith(b"# EOF\n") and text.count(b"# EOF\n") == 1
    found = {
        (one.name, *sorted(one.labels.items())): one.value
        for family in parse_openmetrics(text.decode())
        for one in family.samples
    }
    told = {
        (one.name, *sorted(one.labels.items())): one.value
        for family in parse_plain(plain_text.decode())
        for one in family.samples
    }
    assert found.keys() == told.keys()
    same = {key for key in found if "guest" in dict(key[1:])}
    assert same and all(found[key] == told[key] for key in same)


@pytest.mark.parametrize(
    "accept",
    [
        "application/openmetrics-text;version=x",
        "application/openmetrics-text;version=1.0.0;escaping=?",
        "text/plain;version=999999999;escaping=\u20ac",
        "*/*",
        ",;=,",
    ],
)
async def test_an_odd_wish_is_answered_all_the_same(accept: str) -> None:
    text, _ = await Exposition(FakeSource(guest("a"))).render(accept)
    assert b'guestd_guest_connected{guest="a"} 1.0\n' in text


async def test_each_metric_is_described_once_and_has_its_lines_together() -> None:
    text, _ = await Exposition(FakeSource(guest("a"), guest("b"))).render("")
    seen: list[str] = []
    for line in text.decode().splitlines():
        name = line.split()[2] if line.startswith("#") else line.partition("{")[0].partition(" ")[0]
        name = name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count")
        if not seen or seen[-1] != name:
            seen.append(name)
    assert len(seen) == len(set(seen))


async def test_no_label_needs_an_escape() -> None:
    """The lines are put together without one, so no name may need it, and none is that of the template."""
    limits = guest("a").limits
    for letter in ('"', "\\", "\n", ANY_GUEST, " ", "{", "\u202e"):
        name = f"a{letter}b"
        assert any("name" in problem for problem in configuration.problems(GuestConfig(name, limits, "/q", 3)))


async def test_a_guest_that_goes_meanwhile_is_left_out() -> None:
    source = FakeSource(guest("a"), guest("b"))
    source.guest_names = lambda: ["a", "b", "gone"]  # type: ignore[method-assign]
    found = await plain(source)
    assert {key for key in found if "gone" in key} == {
        f'guestd_guest_vm_status{{guest="{name}",status="gone"}}' for name in "ab"
    }


async def test_others_have_their_turn_while_thousands_of_guests_are_rendered() -> None:
    exposition = Exposition(FakeSource(*(guest(f"g{number:04d}") for number in range(2000))))
    rendering = asyncio.create_task(exposition.render(""))
    turns = 0
    while not rendering.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns > 5
    assert (await rendering)[0].count(b"guestd_guest_connected{") == 2000


async def test_counters_never_go_back() -> None:
    source = FakeSource(guest("a"))
    exposition = Exposition(source)
    before = samples((await exposition.render(""))[0])
    for code in EventCode:
        source.tally.decisions[code] += 1
    source.tally.count_round(0.5)
    after = samples((await exposition.render(""))[0])
    for key, value in before.items():
        if key.partition("{")[0].endswith(("_total", "_bucket", "_count", "_sum")):
            assert after[key] >= value, key
