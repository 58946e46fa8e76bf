"""What `make install-broker` and `make install-guest` put into a root file system, and what is in `systemd/`.

The packages that they need are left out: nothing is fetched, and the programs find them where the tests do. All is
made in a copy of the sources.
"""

import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

import guestd
from guestd.broker import config as broker_config
from guestd.guest.helper import hooks
from guestd.runtime.toml import read_files

ROOT = Path(__file__).parents[2]


def made_by_tmpfiles(root: Path, name: str) -> list[str]:
    """Make the directories that systemd-tmpfiles would."""
    lines = (ROOT / "systemd" / f"{name}.tmpfiles").read_text().splitlines()
    made = [line.split() for line in lines if not line.startswith("#")]
    for kind, path, mode, *_ in made:
        assert (kind, mode) == ("d", "0755")
        (root / path.lstrip("/")).mkdir()
    return [path for _, path, *_ in made]


def test_the_directory_for_drop_ins_is_the_one_that_is_read(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    *_, drop_ins = made_by_tmpfiles(tmp_path, "guestd-broker")
    one = tmp_path / drop_ins.lstrip("/") / "10-web.toml"
    one.write_text("[host]\ncpus = 8\n")
    file = tmp_path / str(broker_config.DEFAULT_PATH).lstrip("/")
    assert read_files(file, required=False) == [(one, {"host": {"cpus": 8}})]


def test_the_directory_for_hooks_is_the_one_that_is_read(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    assert f"/{hooks.DIRECTORY}" in made_by_tmpfiles(tmp_path, "guestd")


# ---- what make installs --------------------------------------------------------------------------

SOURCES = ("Makefile", "pyproject.toml", "README.md", "LICENSE", "guestd", "systemd")
SITE = "opt/guestd/lib/python3.11/site-packages"
ENTRIES = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
Install = Callable[[str], Path]


@pytest.fixture(scope="module")
def install(tmp_path_factory: pytest.TempPathFactory) -> Install:
    """`make install-WHAT` into a root of its own."""
    top = tmp_path_factory.mktemp("install")
    sources = top / "sources"
    sources.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, sources / name)

    def make(what: str) -> Path:
        root = top / what
        if not root.exists():
            (sources / "build" / f"site-{what}").mkdir(parents=True)
            options = [f"DESTDIR={root}", f"PYTHON={sys.executable}", "-o", f"build/stamps/site-{what}"]
            done = subprocess.run(
                ["make", f"install-{what}", *options],
                cwd=sources,
                env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
                capture_output=True,
                text=True,
                timeout=100,
                check=False,
            )
            assert done.returncode == 0, done.stdout + done.stderr
        return root

    return make


@pytest.mark.parametrize(
    ("what", "program"), [("broker", "guestctl"), ("broker", "guestd-broker"), ("guest", "guestd")]
)
def test_an_installed_program_starts_and_enters_where_the_package_says(
    install: Install, what: str, program: str
) -> None:
    root = install(what)
    file = root / "opt/guestd/bin" / program
    assert (root / "usr/bin" / program).readlink() == Path("/opt/guestd/bin") / program
    assert file.stat().st_mode & 0o777 == 0o755
    lines = file.read_text().splitlines()
    module, function = ENTRIES[program].split(":")
    assert lines[0] == "#!/opt/guestd/bin/python3"
    assert f"from {module} import {function}" in lines
    done = subprocess.run(
        [sys.executable, file, "--version"],
        env={"PYTHONPATH": str(root / SITE)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert guestd.__version__ in done.stdout


@pytest.mark.parametrize(("what", "unit"), [("broker", "guestd-broker"), ("guest", "guestd")])
def test_units_users_and_directories_are_installed_and_the_service_is_enabled(
    install: Install, what: str, unit: str
) -> None:
    root, lib = install(what), install(what) / "usr/lib"
    service = lib / f"systemd/system/{unit}.service"
    assert service.read_text() == (ROOT / f"systemd/{unit}.service").read_text()
    (started,) = (line for line in service.read_text().splitlines() if line.startswith("ExecStart="))
    assert (root / started.removeprefix("ExecStart=").split()[0].lstrip("/")).is_symlink()
    wanted = root / f"etc/systemd/system/multi-user.target.wants/{unit}.service"
    assert wanted.readlink() == Path(f"/usr/lib/systemd/system/{unit}.service")
    assert (lib / f"systemd/system-preset/90-{unit}.preset").read_text() == f"enable {unit}.service\n"
    for kind in ("sysusers", "tmpfiles"):
        assert (lib / f"{kind}.d/{unit}.conf").read_text() == (ROOT / f"systemd/{unit}.{kind}").read_text()


def test_manual_pages_and_completion_are_installed(install: Install) -> None:
    share = install("broker") / "usr/share"
    pages = {page.name: page.read_text() for page in (share / "man/man1").iterdir()}
    assert {"guestctl.1", "guestctl-status.1", "guestctl-explain.1", "guestctl-set-limits.1"} <= set(pages)
    for text in pages.values():
        assert text.startswith(".TH ")
    for file, says in (
        ("bash-completion/completions/guestctl", "complete "),
        ("zsh/vendor-completions/_guestctl", "#compdef guestctl"),
        ("fish/vendor_completions.d/guestctl.fish", "complete "),
    ):
        assert says in (share / file).read_text()
        assert (share / file).stat().st_mode & 0o777 == 0o644


def test_what_the_page_the_metrics_and_the_schema_are_made_of_is_installed(install: Install) -> None:
    package = install("broker") / SITE / "guestd"
    for file in ("broker/web/static/index.html", "broker/metrics/shipped/alerts.yml", "cli/schema/v1.json"):
        assert (package / file).read_bytes() == (ROOT / "guestd" / file).read_bytes()


def test_without_a_root_nothing_is_installed() -> None:
    done = subprocess.run(
        ["make", "install-broker", f"PYTHON={sys.executable}", "-o", "build/stamps/site-broker"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    assert "DESTDIR= is empty" in done.stderr
