"""`guestctl simulate`: the production cores in virtual time over a load, to see what a host would do with it.

The simulator is imported when the command runs: it needs numpy, and matplotlib for pictures (extra ``sim``).
"""

import json
import re
import sys
import time
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from guestd.model.errors import AdmissionError, ConfigError, GuestdError
from guestd.model.resources import Kind, Limits, Resources
from guestd.model.units import GIB, MIB, format_cpus, format_size, parse_cpus, parse_size, round_up

if TYPE_CHECKING:
    from rich.table import Table

    from guestd.sim.load import Profile
    from guestd.sim.run import Behaviour, Run

_DEFAULT_SECONDS = 3600.0
_DEFAULT_VMS = 4
_HOST_SHARE = 0.6
"""Of all maximums together: what a host has when nothing is said. Then something is scarce now and then."""
_BURST_SECONDS = 600
_REFILL_SECONDS = 3600
PLAIN_WIDTH = 130
"""Columns of a table that goes to a file or a pipe."""
_LONGEST_SECONDS = 31 * 86_400.0


class LoadName(StrEnum):
    """Loads that can be made up; `guestd.sim.load` makes them."""

    NOISY = "noisy"
    STEPS = "steps"
    RAMP = "ramp"
    DIURNAL = "diurnal"


_Share = typer.Option(min=0, max=1, metavar="0..1")
_Seconds = typer.Option(min=0, max=600, metavar="SECONDS")


def simulate(
    traces: Annotated[
        list[Path] | None, typer.Option(help="Trace file, or folder of them; again for more.", metavar="PATH")
    ] = None,
    load: Annotated[LoadName | None, typer.Option(help="Make a load up instead.", show_default=False)] = None,
    vms: Annotated[
        int | None, typer.Option(min=1, max=500, help="How many VMs; without it 4, or the measured ones.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="All chance follows from it.")] = 1,
    host_cpus: Annotated[
        str | None, typer.Option(metavar="CPUS", help="CPUs of the host; without it 60 % of all maximums.")
    ] = None,
    host_memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Memory of the host; likewise.")] = None,
    limits: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[VM:]cpu=A..B[..C],memory=A..B[..C],weight=W",
            help="Minimum, maximum and burst of all VMs, or of one; what is not named stays.",
        ),
    ] = None,
    duration: Annotated[
        str | None, typer.Option(metavar="TIME", help="Virtual time such as 90s, 30m or 2h; without it the load's.")
    ] = None,
    plug_seconds: Annotated[float, _Seconds] = 0.1,
    plug_rate: Annotated[str, typer.Option(metavar="SIZE", help="Memory that a guest takes per second.")] = "4GiB",
    unplug_seconds: Annotated[float, _Seconds] = 0.1,
    unplug_rate: Annotated[str, typer.Option(metavar="SIZE", help="Memory that it gives per second.")] = "512MiB",
    cpu_unplug_seconds: Annotated[float, _Seconds] = 0.1,
    refusals: Annotated[float, _Share] = 0.0,
    failures: Annotated[float, _Share] = 0.0,
    lost_answers: Annotated[float, _Share] = 0.0,
    output: Annotated[Path, typer.Option(help="Where simulate.json and pictures go.", metavar="DIR")] = Path(
        "build/simulate"
    ),
) -> None:
    """Runs the broker's and the guests' decisions in virtual time over traces or a load that is made up.

    The load is that of --traces (memory traces, or percent of a VM) or of --load. Latencies and rates say how
    hypervisor and guests behave; --refusals is the share of operations that a guest's kernel refuses, --failures and
    --lost-answers are shares of the requests to the hypervisor.

    A burst's credit lasts for 10 minutes at its highest, and comes back within an hour.
    """
    if (traces is None) == (load is None):
        raise ConfigError("simulate", "--traces/--load", None, "name either trace files or a load to make up")
    seconds = None if duration is None else parse_duration(duration)
    try:
        from guestd.sim.run import Behaviour, Run
    except ModuleNotFoundError as error:
        exit_sim_missing("simulate", error)
    behaviour = Behaviour(
        plug_seconds=plug_seconds,
        plug_rate=_positive("--plug-rate", plug_rate),
        unplug_seconds=unplug_seconds,
        unplug_rate=_positive("--unplug-rate", unplug_rate),
        cpu_unplug_seconds=cpu_unplug_seconds,
        refusals=refusals,
        failures=failures,
        lost_answers=lost_answers,
    )
    if failures + lost_answers > 1:
        raise ConfigError("simulate", "--failures and --lost-answers", failures + lost_answers, "together 1 at most")
    chosen = _choose(traces, load, vms, seed, limits or [], seconds)
    host = _host(chosen, host_cpus, host_memory)
    seconds = seconds or max(profile.seconds for profile, _ in chosen)
    try:
        run = Run(host, chosen, behaviour, seed)
    except AdmissionError as error:
        raise ConfigError("simulate", "--host-cpus, --host-memory, --limits", None, str(error)) from None
    _go(run, behaviour, seed, load.value if load else ", ".join(str(path) for path in traces or []), seconds, output)


def parse_duration(text: str) -> float:
    """Seconds from ``90``, ``90s``, ``30m`` or ``2h``.

    :raise ConfigError: When it is none of them, or not within 1 s and 31 days.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    seconds = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]] if match else 0.0
    if not 1 <= seconds <= _LONGEST_SECONDS:
        raise ConfigError("simulate", "--duration", text, "a time such as 90s, 30m or 2h, 1 s to 31 days")
    return seconds


def parse_limits(texts: Sequence[str], names: Sequence[str], defaults: Sequence[Limits]) -> list[Limits]:
    """The limits of each VM: its default, changed by the texts that are about it, those about one VM last.

    :raise ConfigError: When a text is no limits, names no VM, or contradicts itself.
    """
    known = dict(zip(names, defaults, strict=True))
    split = [(text.rpartition(":")[0], text.rpartition(":")[2], text) for text in texts]
    for name, changes, text in sorted(split, key=lambda entry: bool(entry[0])):
        if name and name not in known:
            raise ConfigError("simulate", "--limits", text, f"no VM is called {name!r}; there are {_list(names)}")
        for target in [name] if name else names:
            known[target] = _changed(known[target], changes, text)
    for name, limits in known.items():
        problems = limits.problems()
        if problems:
            raise ConfigError("simulate", f"limits of {name}", None, "; ".join(problems))
    return [known[name] for name in names]


def _changed(limits: Limits, changes: str, text: str) -> Limits:
    expected = "for example cpu=1..4,memory=1GiB..8GiB..12GiB,weight=200"
    low, high, weight = limits.min, limits.max, limits.weight
    burst, credit, refill = limits.burst, limits.burst_credit, limits.burst_refill
    for change in changes.split(","):
        key, _, value = change.strip().partition("=")
        try:
            if key == "weight":
                weight = Resources(int(value), int(value))
                continue
            kind = Kind(key)
            parse = parse_cpus if kind is Kind.CPU else parse_size
            amounts = [parse(part) for part in value.split("..")]
        except ValueError as error:
            why = str(error) if key in ("cpu", "memory") else "neither cpu, memory nor a whole weight"
            raise ConfigError("simulate", "--limits", text, f"{change.strip()!r}: {why}; write {expected}") from None
        if not 2 <= len(amounts) <= 3:
            raise ConfigError(
                "simulate", "--limits", text, f"{change.strip()!r} is not MIN..MAX[..BURST]; write {expected}"
            )
        above = max(0, amounts[2] - amounts[1]) if len(amounts) == 3 else 0
        low, high = low.with_(kind, amounts[0]), high.with_(kind, amounts[1])
        burst = burst.with_(kind, amounts[2] if len(amounts) == 3 else 0)
        credit = credit.with_(kind, above * _BURST_SECONDS)
        refill = refill.with_(kind, above * _BURST_SECONDS // _REFILL_SECONDS)
    return Limits(low, high, weight, burst, credit, refill)


def _choose(
    traces: Sequence[Path] | None,
    load: LoadName | None,
    vms: int | None,
    seed: int,
    limits: Sequence[str],
    seconds: float | None,
) -> "list[tuple[Profile, Limits]]":
    """Each VM's load and limits."""
    from guestd.sim import load as loads
    from guestd.sim import sources

    if load is not None:
        names = [f"vm-{number:02}" for number in range(vms or _DEFAULT_VMS)]
        bounds = parse_limits(limits, names, [_default_limits(None)] * len(names))
        return [
            (
                loads.generated(
                    loads.LoadKind(load.value),
                    name,
                    number,
                    seed,
                    seconds or _DEFAULT_SECONDS,
                    one.ceiling(Kind.CPU) / 1000,
                    one.ceiling(Kind.MEMORY),
                ),
                one,
            )
            for number, (name, one) in enumerate(zip(names, bounds, strict=True))
        ]
    found = sources.read(traces or [], vms)
    bounds = parse_limits(
        limits, [source.name for source in found], [_default_limits(source.total_bytes) for source in found]
    )
    return [(source.make(one), one) for source, one in zip(found, bounds, strict=True)]


def _default_limits(measured_bytes: int | None) -> Limits:
    """1..4 CPUs, and 1 GiB..what the measured VM had, or 4 GiB."""
    most = 4 * GIB if measured_bytes is None else max(GIB, round_up(measured_bytes, 128 * MIB))
    return Limits(Resources(1000, GIB), Resources(4000, most))


def _host(chosen: "Sequence[tuple[Profile, Limits]]", cpus: str | None, memory: str | None) -> Any:
    """The host as said, or with 60 % of all maximums, and never less than the minimums need."""
    from guestd.broker.core.ledger import HostCapacity

    def usual(kind: Kind, unit: int) -> int:
        share = sum(limits.max.get(kind) for _, limits in chosen) * _HOST_SHARE
        return round_up(max(round(share), sum(limits.min.get(kind) for _, limits in chosen)), unit)

    return HostCapacity(
        Resources(
            usual(Kind.CPU, 1000) if cpus is None else _positive("--host-cpus", cpus),
            usual(Kind.MEMORY, GIB) if memory is None else _positive("--host-memory", memory),
        )
    )


def _positive(option: str, text: str) -> int:
    try:
        amount = parse_cpus(text) if option == "--host-cpus" else parse_size(text)
    except ValueError as error:
        raise ConfigError("simulate", option, None, str(error)) from None
    if amount <= 0:
        raise ConfigError("simulate", option, text, "must be above 0")
    return amount


def _go(run: "Run", behaviour: "Behaviour", seed: int, load: str, seconds: float, output: Path) -> None:
    """Run it, write everything, print the table."""
    from rich.console import Console
    from rich.progress import Progress

    try:
        from guestd.sim import pictures, result

        with pictures.canvas(1, 1):
            pass
    except ModuleNotFoundError as error:
        exit_sim_missing("simulate", error)
    begun = time.monotonic()
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("simulating", total=1.0)
        try:
            run.record(seconds, max(1.0, seconds / 600), lambda share: bar.update(task, completed=share))
        except AssertionError as error:
            raise GuestdError(f"a rule was broken at {run.seconds:.1f} s, which is a bug of guestd: {error}") from error
    spent = time.monotonic() - begun
    document = result.as_json(run, behaviour, seed, load)
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / "simulate.json").write_text(json.dumps(document) + "\n")
        for kind in Kind:
            pictures.draw_pool(document, kind.value, output / f"{kind.value}-host.png")
            pictures.draw_vms(document, kind.value, output / f"{kind.value}-vms.png")
    except OSError as error:
        raise ConfigError("simulate", "--output", str(output), f"cannot write there: {error.strerror}") from None
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    for kind in Kind:
        console.print(table(document, kind))
    print(
        f"{seconds:.0f} s of {len(run.vms)} VMs on {format_cpus(run.world.host.capacity.cpu_millicores)} CPUs and "
        f"{format_size(run.world.host.capacity.memory_bytes)} took {spent:.1f} s "
        f"({seconds * len(run.vms) / max(spent, 1e-3):.0f} VM-seconds per second); see {output}"
    )


def table(document: dict[str, Any], kind: Kind) -> "Table":
    """What became of each VM's load, for one kind."""
    from rich.table import Table

    memory = kind is Kind.MEMORY
    unit, per = ("GiB", GIB) if memory else ("CPUs", 1)
    shown = Table(title=f"{'Memory' if memory else 'CPUs'} ({unit})", title_justify="left")
    shown.add_column("VM")
    for heading in (
        "min..max",
        "wanted",
        "usable",
        "slack %",
        "unmet %",
        "short s",
        "worst",
        "resizes/h",
        "not as asked",
    ):
        shown.add_column(heading, justify="right")
    field = "memory_bytes" if memory else "cpus"
    for name, vm in document["vms"].items():
        low, high = vm["limits"]["min"][field] / per, vm["limits"]["max"][field] / per
        ends = vm[kind.value]["ends"]
        odd = ends["partials"] + ends["refusals"] + ends["failures"]
        shown.add_row(name, f"{low:g}..{high:g}", *_figures(vm[kind.value], per), str(odd))
    shown.add_section()
    shown.add_row("all", "", *_figures(document["total"][kind.value], per), "")
    return shown


def _figures(figures: dict[str, float], per: float) -> list[str]:
    return [
        f"{figures['wanted_mean'] / per:.2f}",
        f"{figures['usable_mean'] / per:.2f}",
        f"{figures['slack_share']:.1%}".rstrip("%"),
        f"{figures['unmet_share'] * 100:.3f}",
        f"{figures['short_seconds']:.1f}",
        f"{figures['worst_short'] / per:.2f}",
        f"{figures['resizes_per_hour']:.1f}",
    ]


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def exit_sim_missing(command: str, error: ModuleNotFoundError) -> NoReturn:
    """Say which library is missing, and end with 2."""
    print(f"guestctl {command}: {error.name} is missing; install it with: pip install 'guestd[sim]'", file=sys.stderr)
    raise typer.Exit(2)
