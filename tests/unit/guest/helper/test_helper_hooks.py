"""Which hooks are run and what their answers mean, with a stand-in for systemd-run."""

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helper_rig import Rig

from guestd.guest.helper import hooks
from guestd.guest.helper.hooks import Occasion

SYSTEMD_RUN = """\
#!/bin/sh
printf '%s\\n' "$@" > {root}/asked
while :; do
    case "$1" in
        -E) set -- "$@"; variables="$variables $2"; shift 2 ;;
        -p) case "$2" in RuntimeMaxSec=*ms) ms="${{2#*=}}"; ms="${{ms%ms}}" ;; esac; shift 2 ;;
        --*) shift ;;
        *) break ;;
    esac
done
env -i PATH="$PATH" $variables timeout -k 1 "$((ms / 1000)).$(printf %03d $((ms % 1000)))" "$@"
code=$?
case "$code" in 124|137) exit 1 ;; esac
exit "$code"
"""
"""Takes the same options, runs the program here, and kills it at its time."""

ME = os.getuid()
SHRINK = Occasion("before-shrink", "memory", 3 << 30, 1 << 30)
GROW = Occasion("after-grow", "cpu", 1000, 2500)


def hooks_directory(root: Path) -> Path:
    return root / hooks.DIRECTORY


def hook(root: Path, name: str, body: str, mode: int = 0o755) -> Path:
    path = hooks_directory(root) / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(mode)
    return path


@pytest.fixture
def root(root: Path) -> Path:
    """The fake tree with a hooks directory and systemd-run."""
    root.chmod(0o755)
    (root / "usr/bin").mkdir(parents=True)
    program = root / "usr/bin/systemd-run"
    program.write_text(SYSTEMD_RUN.format(root=root))
    program.chmod(0o755)
    hooks_directory(root).mkdir(parents=True)
    for path in (hooks_directory(root), *hooks_directory(root).parents[:2]):
        path.chmod(0o755)
    return root


def run(root: Path, occasion: Occasion = SHRINK, seconds: float = 20.0) -> tuple[str, int, str]:
    return hooks.run(str(root), ME, occasion, time.monotonic() + seconds)


# --- what is run --------------------------------------------------------------------------------------


def test_without_hooks_nothing_is_started(root: Path) -> None:
    assert run(root) == ("ok", 0, "none")
    hook(root, "20-off", "exit 1", mode=0o644)
    (hooks_directory(root) / "30-directory").mkdir()
    assert run(root) == ("ok", 0, "none")
    hooks_directory(root).rename(root / "elsewhere")
    assert run(root) == ("ok", 0, "none")
    assert not (root / "asked").exists()


def test_hooks_run_in_the_order_of_their_names_each_in_a_unit_of_its_own(root: Path) -> None:
    for name in ("30-c", "10-a", "A", "20_b.sh", "x y", "n" * 65, "ü", "40-off"):
        hook(root, name, f"echo '{name}' $1 >> {root}/order", mode=0o644 if name == "40-off" else 0o700)
    assert run(root) == ("ok", 0, "done")
    assert (root / "order").read_text().split() == (
        ["10-a", "before-shrink", "20_b.sh", "before-shrink", "30-c", "before-shrink", "A", "before-shrink"]
    )
    asked = (root / "asked").read_text().splitlines()
    assert {"--wait", "--pipe", "--collect", "--quiet"} <= set(asked)
    (unit,) = [one for one in asked if one.startswith("--unit=")]
    assert unit.startswith("--unit=guestd-hook-before-shrink-A-")
    assert unit.removeprefix("--unit=guestd-hook-before-shrink-A-").removesuffix(".service").isdigit()
    assert "TimeoutStopSec=1s" in asked
    (limit,) = [one for one in asked if one.startswith("RuntimeMaxSec=")]
    assert 15_000 < int(limit.removeprefix("RuntimeMaxSec=").removesuffix("ms")) <= 20_000
    assert asked[-2:] == [f"{hooks_directory(root)}/A", "before-shrink"]


@pytest.mark.parametrize(
    ("occasion", "variables"),
    [
        (
            GROW,
            {
                "GUESTD_EVENT": "after-grow",
                "GUESTD_KIND": "cpu",
                "GUESTD_BEFORE": "1000",
                "GUESTD_AFTER": "2500",
                "GUESTD_VCPUS_BEFORE": "1",
                "GUESTD_VCPUS_AFTER": "3",
            },
        ),
        (
            SHRINK,
            {
                "GUESTD_EVENT": "before-shrink",
                "GUESTD_KIND": "memory",
                "GUESTD_BEFORE": str(3 << 30),
                "GUESTD_AFTER": str(1 << 30),
            },
        ),
    ],
)
def test_the_environment_says_what_and_how_much(root: Path, occasion: Occasion, variables: dict[str, str]) -> None:
    hook(root, "10-a", f"env | grep ^GUESTD > {root}/seen")
    assert run(root, occasion) == ("ok", 0, "done")
    seen = dict(line.split("=", 1) for line in (root / "seen").read_text().splitlines())
    assert 15 <= int(seen.pop("GUESTD_DEADLINE_SECONDS")) <= 20
    assert seen == variables


# --- trust --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777])
def test_a_hook_that_others_may_write_is_not_run(root: Path, mode: int, capfd: pytest.CaptureFixture[str]) -> None:
    hook(root, "10-bad", f"touch {root}/ran", mode=mode)
    hook(root, "20-good", f"touch {root}/good")
    assert run(root) == ("failed", errno.EPERM, "failed:10-bad")
    assert not (root / "ran").exists() and (root / "good").exists()
    assert "<3>helper: hook 10-bad is not run: " in (said := capfd.readouterr().err)
    assert "may be written by others than its owner: chmod go-w it" in said


def test_a_link_is_not_followed(root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    target = hook(root, "10-a", f"touch {root}/ran").rename(root / "elsewhere")
    (hooks_directory(root) / "10-link").symlink_to(target)
    (hooks_directory(root) / "20-off").symlink_to("/dev/null")
    (hooks_directory(root) / "30-nowhere").symlink_to(tmp_path / "nowhere")
    assert run(root) == ("failed", errno.EPERM, "failed:10-link")
    assert not (root / "ran").exists()
    said = capfd.readouterr().err
    assert "10-link is a symbolic link, put the regular file itself there" in said
    assert "20-off" not in said and "30-nowhere" not in said


@pytest.mark.parametrize("which", ["", "etc", "etc/guestd", "etc/guestd/hooks.d"])
def test_a_directory_that_others_may_write_ends_all_trust(
    root: Path, which: str, capfd: pytest.CaptureFixture[str]
) -> None:
    hook(root, "10-a", f"touch {root}/ran")
    (root / which).chmod(0o1777)
    assert run(root) == ("failed", errno.EPERM, "failed:hooks.d")
    assert not (root / "ran").exists()
    assert f"<3>helper: hook hooks.d is not run: {root / which} may be written" in capfd.readouterr().err


@pytest.mark.parametrize("which", ["etc", "etc/guestd", "etc/guestd/hooks.d"])
def test_a_directory_behind_a_link_is_not_trusted(root: Path, which: str) -> None:
    hook(root, "10-a", f"touch {root}/ran")
    (root / which).rename(root / "moved")
    (root / which).symlink_to(root / "moved")
    assert run(root) == ("failed", errno.EPERM, "failed:hooks.d")
    assert not (root / "ran").exists()


@pytest.mark.skipif(ME != 0, reason="only root can give files away")
def test_what_belongs_to_somebody_else_is_not_trusted(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    os.chown(hook(root, "10-a", f"touch {root}/ran"), 12345, 0)
    assert run(root) == ("failed", errno.EPERM, "failed:10-a")
    os.chown(hooks_directory(root), 12345, 0)
    assert run(root) == ("failed", errno.EPERM, "failed:hooks.d")
    assert not (root / "ran").exists()
    assert "belongs to user 12345, not to 0: chown it" in capfd.readouterr().err


def test_a_hooks_directory_that_is_a_file(root: Path) -> None:
    hooks_directory(root).rmdir()
    hooks_directory(root).touch()
    assert run(root) == ("failed", errno.EPERM, "failed:hooks.d")


# --- what its answer means ----------------------------------------------------------------------------


def test_a_veto_ends_it(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    hook(root, "10-fails", "exit 3")
    hook(root, "20-no", "exit 77")
    hook(root, "30-after", f"touch {root}/ran")
    assert run(root) == ("ok", 0, "veto:20-no")
    assert not (root / "ran").exists()
    said = capfd.readouterr().err
    assert "<3>helper: hook 10-fails failed at before-shrink with exit code 3\n" in said
    assert "<5>helper: hook 20-no says no to a shrink of memory\n" in said


@pytest.mark.parametrize(
    ("body", "seconds"),
    [
        ("exit 75", 30),
        ("echo retry-after 12; exit 75", 12),
        ("seq 50; echo retry-after 7; echo done; exit 75", 7),
        ("printf 'retry-after 9'; exit 75", 9),
        ("echo retry-after soon; echo retry-after -5; echo retry-after; echo say retry-after 3; exit 75", 30),
        ("echo retry-after 0; exit 75", 1),
        ("echo retry-after 99999999999999999999; exit 75", 86_400),
    ],
)
def test_later_with_the_seconds_it_says(root: Path, body: str, seconds: int) -> None:
    hook(root, "10-later", body)
    assert run(root) == ("ok", 0, f"wait:{seconds}:10-later")


@pytest.mark.parametrize("code", [77, 75])
def test_nobody_is_asked_after_a_grow(root: Path, code: int) -> None:
    hook(root, "10-no", f"exit {code}")
    hook(root, "20-next", f"touch {root}/ran")
    assert run(root, GROW) == ("failed", 0, "failed:10-no")
    assert (root / "ran").exists()


def test_a_hook_that_hangs_is_ended_and_leaves_no_time_for_the_next(
    root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hook(root, "10-hang", f"trap '' TERM; touch {root}/begun; while :; do sleep 0.1; done")
    hook(root, "20-next", f"touch {root}/ran")
    begun = time.monotonic()
    assert run(root, seconds=0.6) == ("failed", errno.ETIMEDOUT, "failed:10-hang")
    assert 0.6 <= time.monotonic() - begun < 10
    assert (root / "begun").exists() and not (root / "ran").exists()
    said = capfd.readouterr().err
    assert "<3>helper: hook 10-hang did not end within 0.6 s and was killed\n" in said
    assert "<3>helper: hook 20-next is not run: no time is left for it\n" in said


def test_a_systemd_run_that_never_ends_is_given_up(root: Path) -> None:
    (root / "usr/bin/systemd-run").write_text("#!/bin/sh\nexec sleep 60\n")
    hook(root, "10-a", "true")
    begun = time.monotonic()
    assert run(root, seconds=0.3) == ("failed", errno.ETIMEDOUT, "failed:10-a")
    assert 2 <= time.monotonic() - begun < 20


def test_what_is_left_behind_with_the_output_open_is_not_waited_for(root: Path) -> None:
    hook(root, "10-a", f"sleep 60 & echo $! > {root}/pid; echo out")
    begun = time.monotonic()
    assert run(root) == ("ok", 0, "done")
    assert time.monotonic() - begun < 15
    os.kill(int((root / "pid").read_text()), 9)


def test_without_systemd_run_each_hook_fails(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (root / "usr/bin/systemd-run").unlink()
    hook(root, "10-a", "true")
    assert run(root) == ("failed", errno.ENOENT, "failed:10-a")
    assert f"hook 10-a is not run: {root}/usr/bin/systemd-run: No such file" in capfd.readouterr().err


def test_output_is_bounded_and_cannot_forge_a_line(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    hook(
        root,
        "10-loud",
        "printf '<0>\\033[31mred\\rx\\n\\n'; head -c 1000 /dev/zero | tr '\\0' é >&2; echo; seq 1000000",
    )
    assert run(root) == ("ok", 0, "done")
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "<6>helper: hook 10-loud: <0>?[31mred?x"
    assert len(lines[1]) <= len("<6>helper: hook 10-loud: ") + 200
    assert len(lines) == 21
    assert lines[-1] == "<5>helper: hook 10-loud prints more than 20 lines, ignoring the rest"


# --- in the helper ------------------------------------------------------------------------------------


def test_a_request_runs_hooks(root: Path, start: Callable[..., Rig]) -> None:
    hook(root, "10-later", "echo retry-after 5; exit 75")
    rig = start(hook_owner=ME)
    rig.ask("1 60000\nhook after-grow cpu 1000 2500 20\nhook before-shrink memory 3 1 20")
    assert rig.answers() == [
        ["1", "result", "0", "failed", "0", "failed:10-later"],
        ["1", "result", "1", "ok", "0", "wait:5:10-later"],
        ["1", "end", "ok"],
    ]


def test_hooks_end_before_the_request_does(root: Path, start: Callable[..., Rig]) -> None:
    hook(root, "10-hang", "sleep 60")
    rig = start(hook_owner=ME)
    rig.ask("1 4000\nhook after-grow cpu 1000 2500 600")
    assert rig.answers() == [
        ["1", "result", "0", "failed", str(errno.ETIMEDOUT), "failed:10-hang"],
        ["1", "end", "ok"],
    ]
