"""The pure parts of the image: apt's words, the initrd's archive, debugfs commands, the agent's script."""

from __future__ import annotations

import ast
import stat
import subprocess
from pathlib import Path

import pytest

import guestd.lab
from guestd.lab import debian, image, initrd, inject, tools
from guestd.lab.errors import ImageError, LabUnavailable
from guestd.lab.machine import parse_cpu_list


async def test_sources_and_options_come_from_this_machines_apt(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {
        "indextargets": b"http://a/debian bookworm main\nhttp://a/debian bookworm-updates main\n"
        b"http://a/debian bookworm main\nhttp://b/other stable main\nhttp://a/debian bookworm-backports main\n",
        "dump": b'Acquire::http::Proxy "http://p:3142";\nAcquire::Check-Valid-Until "false";\n'
        b'Acquire::https "";\nAcquire::Languages "none";\nAcquire::http::Proxy-Auto-Detect "/usr/bin/x";\n',
    }

    async def run(command: list[str]) -> bytes:
        return answers[command[1]]

    monkeypatch.setattr(tools, "run", run)
    assert await debian.apt_sources() == (
        "deb http://a/debian bookworm main\ndeb http://a/debian bookworm-updates main\n"
    )
    options = await debian.apt_options()
    assert 'Acquire::http::Proxy "http://p:3142";' in options
    assert 'Acquire::Check-Valid-Until "false";' in options
    assert not [option for option in options if "Languages" in option]
    answers["indextargets"] = b"http://b/other trixie main\n"
    assert await debian.apt_sources() is None


def test_no_mirror_is_named_anywhere_in_the_lab() -> None:
    for path in Path(guestd.lab.__file__).parent.rglob("*.py"):
        assert "http://" not in path.read_text(), path


def test_the_configuration_script_is_a_shell_script() -> None:
    script = debian.configure_script(Path("/nowhere at all"))
    assert subprocess.run(["sh", "-n"], input=script.encode(), check=False).returncode == 0
    assert "cd '/nowhere at all'" in script


def test_applications_come_only_where_they_are_wanted_and_are_not_started() -> None:
    plain, apps = (debian.bootstrap_command(Path("/r"), None, [], extra) for extra in ((), debian.APPS))
    included = [{*word.removeprefix("--include=").split(",")} for word in (plain[4], apps[4])]
    assert included[0] == set(debian.PACKAGES)
    assert included[1] == {*debian.PACKAGES, *debian.APPS}
    script = debian.configure_script(Path("/r"), apps=True)
    assert subprocess.run(["sh", "-n"], input=script.encode(), check=False).returncode == 0
    assert "disable" not in debian.configure_script(Path("/r"))
    for package in ("postgresql", "qemu-guest-agent", "systemd-oomd", "tuned"):
        assert f" {package}.service" in script


async def test_each_sort_of_image_is_built_once_and_forgotten_among_its_like(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, bases = iter("abcdefgh"), []

    async def fill_base(work: Path, progress: image.Progress, *, apps: bool) -> None:
        bases.append(apps)

    async def fill_image(work: Path, base: Path, root: Path, progress: image.Progress) -> None:
        (work / "disk.ext4").write_text(base.name)

    monkeypatch.setenv("GUESTD_LAB_DIR", str(tmp_path))
    monkeypatch.setattr(tools, "require", lambda wanted: None)
    monkeypatch.setattr(image, "_build_base", fill_base)
    monkeypatch.setattr(image, "_build_image", fill_image)
    monkeypatch.setattr(image, "_base_key", lambda: "0")
    first = await image.build(apps=True)
    monkeypatch.setattr(image, "_project_key", lambda root, base: next(key))
    for _ in range(4):
        plain = await image.build()
        assert plain.disk.read_text() == "base-0"
    again = await image.build(apps=True)
    assert again.disk.read_text() == "apps-base-0"
    assert again.initrd.parent != plain.initrd.parent
    assert bases == [True, False]
    assert first.disk.exists()
    assert len([*tmp_path.glob("image-*")]) == 3
    assert len([*tmp_path.glob("apps-image-*")]) == 2


def test_an_initrd_is_a_cpio_archive() -> None:
    data = initrd.archive([("bin", stat.S_IFDIR | 0o755, b""), ("bin/x", stat.S_IFREG | 0o755, b"12345")])
    assert data.startswith(b"070701")
    assert data.count(b"070701") == 3
    assert len(data) % 4 == 0
    assert b"bin/x\0" in data
    assert b"TRAILER!!!\0" in data


def test_a_tree_becomes_debugfs_commands(tmp_path: Path) -> None:
    (tmp_path / "usr/bin").mkdir(parents=True)
    (tmp_path / "usr/bin/a").write_text("a")
    (tmp_path / "usr/bin/a").chmod(0o755)
    (tmp_path / "usr/bin/b").symlink_to("/opt/b c")
    (tmp_path / "link").symlink_to("usr")
    assert inject.commands(tmp_path).splitlines() == [
        'rm "/link"',
        'symlink "/link" "usr"',
        'mkdir "/usr"',
        'mkdir "/usr/bin"',
        'rm "/usr/bin/a"',
        f'write "{tmp_path}/usr/bin/a" "/usr/bin/a"',
        'set_inode_field "/usr/bin/a" mode 0100755',
        'rm "/usr/bin/b"',
        'symlink "/usr/bin/b" "/opt/b c"',
    ]
    (tmp_path / 'bad"name').write_text("")
    with pytest.raises(ValueError, match="bad"):
        inject.commands(tmp_path)


def test_what_debugfs_could_not_do_is_an_error() -> None:
    inject.check(b'debugfs: rm "/a"\nAllocated inode: 7\nrm: File not found by ext2_lookup while trying\n')
    with pytest.raises(ImageError, match="Could not allocate"):
        inject.check(b'debugfs: write "/x" "/y"\n/y: Could not allocate block in ext2 filesystem\n')


def test_what_is_missing_is_named_with_the_command_that_gets_it() -> None:
    with pytest.raises(LabUnavailable, match="apt-get install") as caught:
        tools.require({"no-such-program-here": "package-a", "sh": "dash"})
    assert caught.value.missing == ["no-such-program-here"]
    assert "package-a" in caught.value.advice


def test_the_guests_agent_is_python_that_imports_only_builtins() -> None:
    agent = Path(guestd.lab.__file__).parent / "guest" / "lab-agent"
    tree = ast.parse(agent.read_text(), feature_version=(3, 11))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert imported == {"_thread", "binascii", "posix", "time"}


@pytest.mark.parametrize(
    ("words", "numbers"), [("0\n", {0}), ("0-2,5\n", {0, 1, 2, 5}), ("", set()), ("3,7-8", {3, 7, 8})]
)
def test_cpu_lists(words: str, numbers: set[int]) -> None:
    assert parse_cpu_list(words) == numbers
