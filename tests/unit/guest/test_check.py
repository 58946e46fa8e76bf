"""`guestd check` on fake machines."""

import io
import json
from pathlib import Path

import pytest

from guestd.guest import check
from guestd.guest.check import examine, kernel_parameters, module_state
from guestd.guest.check_others import onlining_rules
from guestd.guest.findings import Finding, Verdict

RELEASE = "6.1.0-test"


def write(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine on which everything is there."""
    cpu, memory = tmp_path / "sys/devices/system/cpu", tmp_path / "sys/devices/system/memory"
    for name, text in {"possible": "0-3", "present": "0-1", "online": "0", "isolated": ""}.items():
        write(cpu / name, text + "\n")
    (cpu / "cpu0").mkdir()
    write(cpu / "cpu1/online", "0\n")
    write(memory / "block_size_bytes", "8000000\n")
    write(memory / "auto_online_blocks", "offline\n")
    write(memory / "memory0/state", "online\n")
    write(memory / "memory0/valid_zones", "Normal\n")
    write(memory / "memory32/state", "offline\n")
    for driver in ("virtio_mem", "virtio_balloon", "vmw_vsock_virtio_transport"):
        write(tmp_path / f"sys/bus/virtio/drivers/{driver}/virtio1")
        write(tmp_path / f"sys/module/{driver}/refcnt", "1\n")
    write(tmp_path / "proc/pressure/memory", "some avg10=0.00 total=0\n")
    write(tmp_path / "proc/cmdline", "console=ttyS0 root=/dev/vda rw quiet\n")
    write(tmp_path / "proc/sys/kernel/osrelease", RELEASE + "\n")
    write(tmp_path / "dev/vsock")
    return tmp_path


def find(root: Path, name: str) -> Finding:
    return next(finding for finding in examine(root) if finding.name == name)


def test_all_there(root: Path) -> None:
    stream = io.StringIO()
    assert check.run(root=root, stream=stream) == 0
    text = stream.getvalue()
    assert "possible 0-3, present 0-1, online 0, never offlined 0" in text
    assert "128 MiB each: 1 online, 1 offline (0 movable)" in text
    assert text.endswith("nothing is missing\n")
    assert {finding.verdict for finding in examine(root)} == {Verdict.OK}


def test_an_empty_machine_misses_nearly_everything_and_says_what_to_do(tmp_path: Path) -> None:
    stream = io.StringIO()
    assert check.run(root=tmp_path, stream=stream) == 1
    missing = [finding for finding in examine(tmp_path) if finding.verdict is Verdict.MISSING]
    assert {finding.name for finding in missing} >= {"cpu", "memory blocks", "virtio-mem", "psi", "vsock"}
    assert all(finding.advice for finding in missing)
    assert f"{len(missing)} missing\n" in stream.getvalue()


def test_json(root: Path) -> None:
    (root / "dev/vsock").unlink()
    stream = io.StringIO()
    assert check.run("json", root, stream) == 1
    answer = json.loads(stream.getvalue())
    assert answer["complete"] is False
    vsock = next(row for row in answer["findings"] if row["name"] == "vsock")
    assert vsock["verdict"] == "missing" and vsock["value"] == "no /dev/vsock" and vsock["advice"]


def test_it_changes_nothing(root: Path) -> None:
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    check.run(root=root, stream=io.StringIO())
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


def test_one_cpu_for_ever(root: Path) -> None:
    write(root / "sys/devices/system/cpu/possible", "0\n")
    finding = find(root, "cpu")
    assert finding.verdict is Verdict.MISSING and "maxcpus" in finding.advice


def test_a_kernel_that_onlines_by_itself_is_a_note(root: Path) -> None:
    write(root / "sys/devices/system/memory/auto_online_blocks", "online_movable\n")
    assert find(root, "auto_online_blocks").verdict is Verdict.NOTE


@pytest.mark.parametrize(
    ("cmdline", "config", "value"),
    [
        ("quiet psi=0", "", "off: psi=0 on the kernel command line"),
        ("quiet", "CONFIG_PSI=y\nCONFIG_PSI_DEFAULT_DISABLED=y\n", "off: the kernel's default"),
        ("quiet", "# CONFIG_PSI is not set\n", "not in this kernel"),
        ("quiet", "", "off"),
    ],
)
def test_why_there_is_no_psi(root: Path, cmdline: str, config: str, value: str) -> None:
    (root / "proc/pressure/memory").unlink()
    write(root / "proc/cmdline", cmdline)
    write(root / f"boot/config-{RELEASE}", config)
    finding = find(root, "psi")
    assert (finding.verdict, finding.value) == (Verdict.MISSING, value)


def test_vsock_without_a_transport(root: Path) -> None:
    (root / "sys/bus/virtio/drivers/vmw_vsock_virtio_transport/virtio1").unlink()
    assert find(root, "vsock").verdict is Verdict.MISSING
    write(root / "sys/module/hv_sock/refcnt", "1")
    assert find(root, "vsock").verdict is Verdict.OK


def test_module_states(tmp_path: Path) -> None:
    write(tmp_path / "proc/sys/kernel/osrelease", RELEASE)
    modules = tmp_path / "lib/modules" / RELEASE
    assert module_state(tmp_path, "virtio_mem") == ""
    write(modules / "modules.dep", "kernel/drivers/virtio/virtio_mem.ko.xz:\nkernel/a/not_virtio_balloon.ko:\n")
    assert module_state(tmp_path, "virtio_mem") == "available"
    assert module_state(tmp_path, "virtio_balloon") == ""
    write(modules / "modules.builtin", "kernel/drivers/virtio/virtio-balloon.ko\n")
    assert module_state(tmp_path, "virtio_balloon") == "built in"
    write(tmp_path / "sys/module/virtio_mem/refcnt", "0")
    assert module_state(tmp_path, "virtio_mem") == "loaded"


def test_kernel_parameters_that_limit(root: Path) -> None:
    write(root / "proc/cmdline", "quiet maxcpus=1 nosmp psi=1\n")
    assert kernel_parameters(root) == {"quiet": "", "maxcpus": "1", "nosmp": "", "psi": "1"}
    finding = find(root, "kernel parameters")
    assert finding.verdict is Verdict.NOTE and "maxcpus, nosmp may keep" in finding.advice
    assert finding.value == "psi=1 maxcpus=1 nosmp"


UBUNTU = 'SUBSYSTEM=="cpu", ACTION=="add", TEST=="online", ATTR{online}=="0", ATTR{online}="1"\n'
REDHAT = """# Memory hotadd request
SUBSYSTEM!="memory", GOTO="end"
SUBSYSTEM=="memory", ACTION=="add", PROGRAM="/bin/uname -p", RESULT!="s390*", \\
  ATTR{state}=="offline", ATTR{state}="online"
"""


@pytest.mark.parametrize(
    ("text", "onlines"),
    [
        (UBUNTU, True),
        (REDHAT, True),
        ('SUBSYSTEM=="memory", ACTION=="add", ATTR{state}="online_movable"\n', True),
        ('# SUBSYSTEM=="memory", ATTR{state}="online"\n', False),
        ('SUBSYSTEM=="memory", ATTR{state}=="online", RUN+="/bin/true"\n', False),
        ('SUBSYSTEM=="block", ATTR{state}="online"\n', False),
    ],
)
def test_udev_rules(root: Path, text: str, onlines: bool) -> None:
    write(root / "usr/lib/udev/rules.d/40-hotadd.rules", text)
    assert bool(onlining_rules(root)) is onlines
    finding = find(root, "udev rules")
    assert (finding.verdict is Verdict.NOTE) is onlines
    if onlines:
        assert finding.value == "/usr/lib/udev/rules.d/40-hotadd.rules onlines by itself"


def test_a_masked_rule_does_not_count(root: Path) -> None:
    write(root / "usr/lib/udev/rules.d/40-hotadd.rules", UBUNTU)
    mask = root / "etc/udev/rules.d/40-hotadd.rules"
    mask.parent.mkdir(parents=True)
    mask.symlink_to("/dev/null")
    assert onlining_rules(root) == []
