"""What the helper's tests share: a fake tree, and a helper process for real."""

import contextlib
import os
import signal
import socket
from pathlib import Path

from guestd.guest import helper


def make_tree(root: Path, cpus: int = 4, blocks: int = 8) -> Path:
    for n in range(cpus):
        directory = root / f"sys/devices/system/cpu/cpu{n}"
        directory.mkdir(parents=True)
        if n:
            (directory / "online").write_text("0\n")
    for n in range(blocks):
        directory = root / f"sys/devices/system/memory/memory{n}"
        directory.mkdir(parents=True)
        (directory / "state").write_text("offline\n")
    return root


def cpu_file(root: Path, n: int) -> Path:
    return root / f"sys/devices/system/cpu/cpu{n}/online"


def block_file(root: Path, n: int) -> Path:
    return root / f"sys/devices/system/memory/memory{n}/state"


def make_endless(path: Path) -> None:
    """A FIFO nobody reads is the write that never returns."""
    path.unlink()
    os.mkfifo(path)


class Rig:
    """A helper process with a daemon process below it; the test holds the daemon's end of the socket."""

    def __init__(self, root: Path, **options: object) -> None:
        self.sock, helpers_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(10)
        told, tell = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            self.sock.close()
            status = 99
            with contextlib.suppress(BaseException):
                waited_for = {signal.SIGHUP, signal.SIGTERM}
                signal.pthread_sigmask(signal.SIG_BLOCK, waited_for)  # before there is anybody to be hit by one
                daemon = os.fork()
                if daemon == 0:
                    helpers_end.close()
                    signal.alarm(60)  # no orphan, whatever the test does
                    os._exit(40 + signal.sigwait(waited_for))
                signal.pthread_sigmask(signal.SIG_UNBLOCK, waited_for)
                os.write(tell, f"{daemon}\n".encode())
                status = helper.Helper(helpers_end, daemon, str(root), **options).run()  # type: ignore[arg-type]
            os._exit(status)
        helpers_end.close()
        os.close(tell)
        with os.fdopen(told) as pipe:
            self.daemon = int(pipe.readline())
        self.ask("x")
        assert self.read() == "0 refused grammar"  # it serves: its signals are caught
        self.status: int | None = None

    def ask(self, text: str) -> None:
        self.sock.send(text.encode())

    def read(self) -> str:
        return self.sock.recv(4096).decode()

    def answers(self) -> list[list[str]]:
        """All messages up to and with the one that ends a request, as words, without the time."""
        found = []
        while True:
            words = self.read().split(" ")
            if words[1] == "result":
                assert int(words.pop(5)) >= 0
            found.append(words)
            if words[1] != "result":
                return found

    def wait(self) -> int:
        if self.status is None:
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.status

    def close(self) -> None:
        if self.status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.daemon, signal.SIGKILL)
            self.wait()
        self.sock.close()
