"""Which broker a command talks to: the one of this machine by its sockets, or another one by mutual TLS.

grpc is imported with the first call.
"""

import asyncio
import contextlib
import inspect
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import typer

from guestd.model.errors import ConfigError, DeniedError, GuestdError, NotFoundError, UnreachableError

if TYPE_CHECKING:
    from guestd.wire.client import BrokerClient

_T = TypeVar("_T")

DEFAULT_RUN_DIR: Final = Path("/run/guestd-broker")
_COMPLETION_SECONDS: Final = 1.0
_INTERRUPTED: Final = 130


@dataclass(frozen=True, slots=True)
class Target:
    """A broker. The three files belong to `host`, the address of one on another machine."""

    run_dir: Path = DEFAULT_RUN_DIR
    host: str = ""
    cert: Path | None = None
    key: Path | None = None
    ca: Path | None = None

    def client(self) -> "BrokerClient":
        """A client of it; nothing is sent before its first call.

        :raise ConfigError: When one of the files for mutual TLS is not named, or cannot be used.
        """
        from guestd.wire.client import BrokerClient

        if not self.host:
            return BrokerClient(self.run_dir)
        for name in ("cert", "key", "ca"):
            if getattr(self, name) is None:
                raise ConfigError("--host", "", None, f"needs --{name} (or GUESTD_{name.upper()}), a PEM file")
        assert self.cert is not None and self.key is not None and self.ca is not None
        return BrokerClient.remote(self.host, self.cert, self.key, self.ca)

    def need_local(self) -> None:
        """Refuse a change on another machine.

        :raise DeniedError: When this is no broker of this machine.
        """
        if self.host:
            raise DeniedError(f"{self.host}: changes are only possible on the host itself; run guestctl there")

    def run(self, work: "Callable[[BrokerClient], Coroutine[Any, Any, _T]]") -> _T:
        """Do the work with a client. Ctrl-C ends it without a word.

        :raise GuestdError: With what to do about it.
        """

        async def with_client() -> _T:
            async with self.client() as client:
                return await work(client)

        try:
            return asyncio.run(with_client())
        except KeyboardInterrupt:
            raise typer.Exit(_INTERRUPTED) from None
        except UnreachableError as error:
            raise UnreachableError(f"{error}; {self._advice()}") from error
        except NotFoundError as error:
            raise NotFoundError(f"{error}; guestctl status lists those that there are") from error

    def _advice(self) -> str:
        if self.host:
            return "does that broker listen there? See [monitor] in its configuration"
        return "is guestd-broker running? See: systemctl status guestd-broker"


def with_target(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameter `target` comes from the options that name a broker."""
    own = inspect.signature(command, eval_str=True)
    kept = [one for one in own.parameters.values() if one.name != "target"]

    @wraps(command)
    def run(**given: Any) -> None:
        named = {one.name: given.pop(one.name) for one in _OPTIONS}
        command(target=Target(**named), **given)

    run.__signature__ = own.replace(parameters=[*kept, *_OPTIONS])  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in (*kept, *_OPTIONS)}
    return run


def guest_names(context: typer.Context, incomplete: str) -> list[str]:
    """Names that a guest's name may become, for the shell. Without a broker there are none, and no word of it."""
    given = {one.name: context.params.get(one.name) or one.default for one in _OPTIONS}
    paths = {name: Path(value) for name, value in given.items() if name != "host" and value is not None}

    async def ask() -> list[str]:
        async with asyncio.timeout(_COMPLETION_SECONDS), Target(**{**given, **paths}).client() as client:
            return [guest.name for guest in await client.guests()]

    with contextlib.suppress(GuestdError, OSError, ValueError):
        return [name for name in asyncio.run(ask()) if name.startswith(incomplete)]
    return []


GuestName = Annotated[
    str, typer.Argument(metavar="GUEST", help="Name of the guest.", show_default=False, autocompletion=guest_names)
]


def _option(name: str, default: Any, kind: Any, **more: Any) -> inspect.Parameter:
    flag = f"--{name.replace('_', '-')}"
    option = typer.Option(flag, envvar=f"GUESTD_{name.upper()}", **more)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


_OPTIONS: Final = (
    _option("run_dir", DEFAULT_RUN_DIR, Path, help="Directory of the broker's sockets.", metavar="DIR"),
    _option("host", "", str, help="Ask a broker elsewhere, by mutual TLS.", metavar="ADDRESS:PORT", show_default=False),
    _option("cert", None, Path | None, help="Certificate for --host, PEM.", metavar="FILE", show_default=False),
    _option("key", None, Path | None, help="Its key, PEM.", metavar="FILE", show_default=False),
    _option(
        "ca",
        None,
        Path | None,
        help="What the broker's certificate is signed by, PEM.",
        metavar="FILE",
        show_default=False,
    ),
)
