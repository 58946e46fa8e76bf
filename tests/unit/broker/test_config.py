"""Bad configuration: file, key, value and what was expected."""

from pathlib import Path

import pytest

from guestd.broker import config
from guestd.model.errors import ConfigError
from guestd.model.resources import Resources
from guestd.model.units import GIB, MIB

GOOD = """
[host]
cpus = "8"
memory = "8GiB"
reserve_memory = "1GiB"
overhead_memory_per_guest = "64MiB"
[guests.a]
cpu = { min = "250m", max = 4, weight = 300 }
memory = { min = "512MiB", max = "3GiB" }
qmp_socket = "/run/a/qmp"
cid = 5
[guests.b]
cpu = { min = 1, max = 4 }
memory = { min = "512MiB", max = "3GiB" }
qmp_socket = "/run/b/qmp"
vsock_path = "/run/b/vsock"
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "broker.toml"
    path.write_text(text)
    return path


def test_a_good_file(tmp_path: Path) -> None:
    loaded = config.load(written(tmp_path, GOOD))
    assert loaded.host.capacity == Resources(8000, 8 * GIB)
    assert loaded.host.reserve == Resources(0, GIB)
    a = loaded.guests["a"]
    assert (a.limits.min, a.limits.max) == (Resources(250, 512 * MIB), Resources(4000, 3 * GIB))
    assert a.limits.weight == Resources(300, 100)
    assert (a.cid, loaded.guests["b"].vsock_path) == (5, "/run/b/vsock")
    assert a.origin == str(tmp_path / "broker.toml")


def test_drop_ins_win_key_by_key_and_are_named(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD)
    drop_ins = tmp_path / "broker.toml.d"
    drop_ins.mkdir()
    (drop_ins / "10-more.toml").write_text('[guests.a]\ncpu = { max = 6 }\n[host]\ncpus = "16"')
    (drop_ins / "20-bad.toml").write_text("[guests.a]\ncpu = { max = 0 }\n")
    with pytest.raises(ConfigError, match=r"20-bad.toml: guests.a: cpu: min 0.25 CPU is above max 0 CPU"):
        config.load(path)
    (drop_ins / "20-bad.toml").unlink()
    loaded = config.load(path)
    assert loaded.guests["a"].limits.max.cpu_millicores == 6000
    assert loaded.guests["a"].limits.min.cpu_millicores == 250
    assert loaded.host.capacity.cpu_millicores == 16_000
    assert loaded.guests["a"].origin.endswith("10-more.toml")
    assert not loaded.guests["b"].origin.endswith("10-more.toml")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('cpus = "8"', 'cpu = "8"', r"host: has no key 'cpu'"),
        ('cpus = "8"', "cpus = -1", r"host.cpus = -1: must be a number, 0 or above"),
        ('cpus = "8"', "cpus = nan", r"host.cpus = nan: must be a number, 0 or above"),
        ('cpus = "8"', 'cpus = "many"', r"host.cpus = 'many': 'many' is not a number of CPUs"),
        ('memory = "8GiB"', "memory = true", r"host.memory = True"),
        ('memory = "8GiB"', 'memory = "8 parsecs"', r"host.memory.*is not a size; write for example 512MiB"),
        ("max = 4, weight = 300", 'max = "100m", weight = 300', r"guests.a: cpu: min 0.25 CPU is above max 0.1 CPU"),
        ("weight = 300", "weight = 0", r"guests.a: cpu: weight is 0, must be within 1..10000"),
        ("weight = 300", "weight = 1.5", r"guests.a.cpu.weight = 1.5: expected `int`, got `float`"),
        ("cid = 5", "cid = 2", r"guests.a: cid 2: must be within 3"),
        ("cid = 5", "", r"guests.a: needs either cid .AF_VSOCK. or vsock_path"),
        ("cid = 5", 'vsock_path = "/run/b/vsock"', r"guests.b.vsock_path = '/run/b/vsock': is a's already"),
        ('"/run/b/qmp"', '"/run/a/qmp"', r"guests.b.qmp_socket = '/run/a/qmp': is a's already"),
        ("[guests.b]", '[guests."b b"]', r"guests.b b: name 'b b': letters, digits"),
        ('reserve_memory = "1GiB"', 'reserve_memory = "7.5GiB"', r"minimums of 2 guests add up to 1 GiB.*per guest"),
        ("[host]", "[host", r"broker.toml: is not TOML: .*line 2"),
        ("weight = 300", "burst = 3", r"guests.a: cpu: burst 3 CPU is not above max 4 CPU"),
        ("weight = 300", "burst_credit = 10", r"guests.a.cpu.burst_credit = 10: needs a burst beside it"),
        ("weight = 300", "burst = 8, burst_credit = 3", r"credit of 3 CPU x seconds does not last for one second"),
        ("weight = 300", "burst = 8, burst_refill = 5", r"refill of 5 CPU per second is more than the burst takes, 4"),
        ("[host]", "[host]\nmemory_idle_tax = 1.0", r"host.memory_idle_tax = 1.0: must be within 0..0.99"),
        ("[host]", '[host]\ncpu_bandwidth = "on"', r"host.cpu_bandwidth"),
        ('qmp_socket = "/run/a/qmp"', "", r"guests.a: needs a key 'qmp_socket'"),
        ('qmp_socket = "/run/a/qmp"', f'qmp_socket = "/{"x" * 120}"', r"guests.a: .* longer than the 107 bytes"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(ConfigError, match=message):
        config.load(written(tmp_path, GOOD.replace(old, new, 1)))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.toml: cannot be read"):
        config.load(tmp_path / "nowhere.toml")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('memory = "8GiB"', "memory = 1e30", r"host.memory = 1e\+30: must be at most 65536 TiB"),
        ('memory = "8GiB"', 'memory = "99999999TiB"', r"host.memory = '99999999TiB': must be at most"),
        ('cpus = "8"', "cpus = 1e15", r"host.cpus = 1000000000000000.0: must be at most"),
        ("max = 4,", "max = 3000000,", r"guests.a.cpu.max = 3000000: must be at most"),
        ("[host]", "[host]\nmemory_overcommit = 1e9", r"host.memory_overcommit = 1000000000.0: must be above 0"),
        ("[host]", '[broker]\nstate_dir = ""\n[host]', r"broker.state_dir = '': must be an absolute path"),
        ("[host]", '[broker]\nrun_dir = "run"\n[host]', r"broker.run_dir = 'run': must be an absolute path"),
        ("[host]", f'[broker]\nrun_dir = "/{"x" * 88}"\n[host]', r"broker.run_dir = .*: must have at most 88 bytes"),
    ],
)
def test_what_no_machine_has_and_no_path_is_refused(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in GOOD
    with pytest.raises(ConfigError, match=said):
        config.load(written(tmp_path, GOOD.replace(old, new, 1)))


def test_a_burst_lasts_for_five_minutes_when_nobody_says_otherwise(tmp_path: Path) -> None:
    text = GOOD.replace("max = 4, weight = 300", "max = 4, burst = 8", 1)
    limits = config.load(written(tmp_path, text)).guests["a"].limits
    assert limits.burst == Resources(8000, 0)
    assert limits.burst_credit == Resources(4000 * 300, 0)
    assert limits.burst_refill == Resources(400, 0)


def test_credit_and_refill_of_a_burst_can_be_chosen(tmp_path: Path) -> None:
    text = GOOD.replace("max = 4, weight = 300", 'max = 4, burst = 8, burst_credit = 10, burst_refill = "250m"', 1)
    limits = config.load(written(tmp_path, text)).guests["a"].limits
    assert (limits.burst_credit.cpu_millicores, limits.burst_refill.cpu_millicores) == (10_000, 250)


def test_overcommit_is_told_from_what_is_there(tmp_path: Path) -> None:
    text = GOOD.replace("[host]", "[host]\nmemory_overcommit = 2.0\nmemory_idle_tax = 0.5", 1)
    host = config.load(written(tmp_path, text)).host
    assert host.physical is not None
    assert host.capacity.memory_bytes == 2 * host.physical.memory_bytes
    assert host.idle_tax == 0.5
