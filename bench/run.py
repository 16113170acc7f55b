"""``python -m bench.run``: is it fast, on this machine, at real sites and in real networks?"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import itertools
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import bars as judge
from . import cases, layer, network, peers, price, report, timing
from .cases import Case
from .layer import LayerRow
from .network import NETWORKS, NetworkRow
from .plot import plot
from .price import PriceRow
from .rows import Machine, Row, Store, latest, resumable, this_machine, to_rows

# Kept from returning memory to the system, malloc hands out warm pages, to every contender alike. Else a fresh output
# of many megabytes is mapped anew at every call, and what is measured is the kernel clearing pages.
WARM = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
OUT = Path(__file__).parent / "out"
BUSY_PERCENT = 10


Device = Literal["cpu", "cuda"]
Allocator = Literal["warm", "default"]


def with_allocator(allocator: Allocator) -> None:
    """malloc reads its settings when a process starts, so this one starts again where they are not as wanted."""
    environment = {name: value for name, value in os.environ.items() if name not in WARM}
    if allocator == "warm":
        environment |= WARM
    # The profiler, used to find peaks of memory, reports its start and end otherwise.
    environment.setdefault("KINETO_LOG_LEVEL", "99")
    if environment != dict(os.environ):
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, "-m", "bench.run", *sys.argv[1:]], environment)


class Bench:
    """One run: what it is measured on, by whom, and where its rows go."""

    def __init__(
        self, machine: Machine, store: Store, backends: list[str], bars: bool, only: list[str], console: Console
    ) -> None:
        self.machine, self.store, self.backends, self.console = machine, store, backends, console
        self.device, self.seconds = machine.device, 0.2 if bars else 0.05
        self.contenders = functools.partial(
            peers.contenders, device=self.device, backends=backends, bars=bars, only=only
        )

    def measure(self, todo: Iterable[Case], advance: Callable[[str], None] = lambda what: None) -> list[Row]:
        rows = []
        for case in todo:
            advance(str(case))
            results = timing.measure(case, self.contenders(case), self.device, self.seconds)
            rows += to_rows(case, results, self.machine)
            self.store.add(rows[-len(results) :])
        return rows

    def compilations(self, todo: Iterable[Case]) -> list[Callable[[], None]]:
        """Whoever must be compiled for these cases, as jobs for other processes."""
        jobs = ((case, [(c.name, c.backend) for c in self.contenders(case) if c.waits]) for case in todo)
        threads = self.machine.threads
        return [functools.partial(timing.warm, case, names, self.device, threads) for case, names in jobs if names]

    def pending(self, wanted: Iterable[Case]) -> list[Case]:
        """The cases of which the file lacks somebody; all, where its rows may be of other sources."""
        if not resumable(self.machine):
            return list(wanted)
        there = {(row.case, row.contender, row.backend) for row in self.rows(self.machine.allocator)}
        return [
            case
            for case in wanted
            if not all((case, c.name, c.backend if c.role == "ours" else "") in there for c in self.contenders(case))
        ]

    def rows(self, allocator: str) -> list[Row]:
        """Every row in the file that belongs to this run, or to one that it takes up."""
        return latest(
            row for row in self.store if row.machine.same == self.machine.same and row.machine.allocator == allocator
        )


def compile_ahead(jobs: list[Callable[[], None]], workers: int, advance: Callable[[], None]) -> None:
    """Fill the compiler's cache on disk by several processes: compiling is one thread's work, and takes longest of all.

    What fails here fails again when it is measured, and is reported there.
    """
    if not jobs:
        return
    context = multiprocessing.get_context("spawn")
    with (
        _environment(TORCHINDUCTOR_COMPILE_THREADS="1"),
        concurrent.futures.ProcessPoolExecutor(workers, mp_context=context, initializer=_silence) as pool,
    ):
        for _ in concurrent.futures.as_completed([pool.submit(job) for job in jobs]):
            advance()


def _silence() -> None:
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (for as long as the process lives)


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def main(
    bars: Annotated[bool, typer.Option("--bars/--quick", help="The whole grid (an hour), or a first look.")] = False,
    device: Annotated[Device, typer.Option(help="Where to measure.")] = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads; 0 for as many as PyTorch takes.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the rows (CSV) and the plot (PNG).")] = OUT,
    against: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Former rows: exit 1 where a ratio fell by a fifth."),
    ] = None,
    op: Annotated[list[str] | None, typer.Option(help="Only these ops.")] = None,
    backend: Annotated[list[str] | None, typer.Option(help="Only these backends: native, triton, reference.")] = None,
    site: Annotated[list[str] | None, typer.Option(help="Only these sites, as 64@112.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Only fp32, bf16, fp16.")] = None,
    layout: Annotated[list[str] | None, typer.Option(help="Only NCHW, NHWC.")] = None,
    k: Annotated[list[int] | None, typer.Option(help="Only filters of so many taps.")] = None,
    direction: Annotated[list[str] | None, typer.Option(help="Only forward, backward, forward+backward.")] = None,
    purpose: Annotated[list[str] | None, typer.Option(help="Only ratio, share, call.")] = None,
    peer: Annotated[list[str] | None, typer.Option(help="Only these peers, named as in the rows.")] = None,
    with_network: Annotated[
        bool, typer.Option("--network/--no-network", help="Measure networks, adaptive layers and the price too.")
    ] = True,
    model: Annotated[list[str] | None, typer.Option(help="Only these networks: " + ", ".join(NETWORKS) + ".")] = None,
    allocator: Annotated[Allocator, typer.Option(help="Keep malloc's pages warm, or leave it alone.")] = "warm",
    tables: Annotated[bool, typer.Option(hidden=True)] = True,
) -> None:
    """Time aliasfused against what people run without it, at the sites of real networks and inside one."""
    with_allocator(allocator)
    torch.set_num_threads(threads or torch.get_num_threads())
    console = Console(width=None if sys.stdout.isatty() else 160)
    if device == "cuda" and not torch.cuda.is_available():
        console.print(
            "[red]--device cuda: PyTorch sees no CUDA device here.[/] Install its CUDA build, or take the CPU."
        )
        raise typer.Exit(2)
    machine = this_machine(device, torch.get_num_threads(), allocator)
    if machine.busy_percent > BUSY_PERCENT:
        console.print(f"[yellow]The CPU is {machine.busy_percent:.0f} % busy with other work: times will be off.[/]")

    wanted = cases.select(
        cases.barred(device) if bars else cases.quick(device),
        op=op, site=site, dtype=dtype, layout=layout, k=k, direction=direction, purpose=purpose,
    )  # fmt: skip
    if not wanted:
        console.print("[red]No case is left by these filters.[/] The sites are " + ", ".join(_sites()) + ".")
        raise typer.Exit(2)
    if unknown := set(model or ()) - NETWORKS.keys():
        console.print(f"[red]No network is called {', '.join(sorted(unknown))}.[/] There are {', '.join(NETWORKS)}.")
        raise typer.Exit(2)
    networks = (model or (NETWORKS if bars else network.QUICK)) if with_network else ()
    kinds = network.KINDS if bars else network.QUICK_KINDS
    layers = cases.select(layer.grid(device, bars), op=op, site=site, dtype=dtype, layout=layout, k=k)
    stem = machine.slug + ("-bars" if bars else "")
    # A former run of the barred grid is taken up where it stopped; a first look starts anew.
    store = Store(out / f"{stem}.csv", Row, fresh=not bars)
    bench = Bench(machine, store, backend or peers.default_backends(device), bars, peer or [], console)
    todo = bench.pending(wanted) if bars else wanted
    if len(todo) < len(wanted):
        console.print(f"{len(wanted) - len(todo)} of {len(wanted)} cases are in {store.path} already.")

    network_rows: list[NetworkRow] = []
    layer_rows: list[LayerRow] = []
    price_rows: list[PriceRow] = []
    with _progress(console) as progress:
        jobs = bench.compilations(todo) + network.compilations(networks, device, machine.threads, kinds)
        workers = min(8, machine.cores)
        bar = progress.add_task(f"compiling ahead, by {workers} processes", total=len(jobs), what="")
        compile_ahead(jobs, workers, lambda: progress.advance(bar))
        with _steps(progress, "sites", len(todo)) as step:
            rows = bench.measure(todo, step)
        if with_network:
            with _steps(progress, "networks", 3 * len(networks)) as step:
                seconds = 4.0 if bars else 1.0
                network_rows = network.measure(networks, device, machine, bench.backends[0], seconds, step, kinds)
            Store(out / f"{stem}-network.csv", NetworkRow, fresh=not bars).add(network_rows)
            with _steps(progress, "layers with predicted filters", len(layers)) as step:
                layer_rows = layer.measure(layers, device, machine, bench.seconds, step)
            Store(out / f"{stem}-layer.csv", LayerRow, fresh=not bars).add(layer_rows)
            with _steps(progress, "price of anti-aliasing", 4) as step:
                price_rows = price.measure(device, machine, bench.seconds, step)
            Store(out / f"{stem}-price.csv", PriceRow, fresh=not bars).add(price_rows)
    if not tables:
        return

    if bars and allocator == "warm" and device == "cpu" and cases.select(wanted, k=[4], purpose=["ratio"]):
        console.print("Once more with malloc left alone, k = 4 against pad+conv:")
        _default_allocator(out, machine.threads, op, backend, site, dtype, layout)
    asked = set(wanted)
    rows = [row for row in (bench.rows(allocator) if bars else rows) if row.case in asked]
    cells = report.cells(rows)
    default = report.cells(bench.rows("default")) if bars else []
    console.print(report.results_table(cells, default))
    if (summary := report.summary_table(cells)).row_count:
        console.print(summary)
    if missing := report.absent_table(rows):
        console.print(missing)
    if network_rows:
        console.print(report.network_table(network_rows))
    if layer_rows:
        console.print(report.layer_table(layer_rows))
    if price_rows:
        console.print(report.price_table(price_rows))
    if bars:
        for name in dict.fromkeys(cell.ours.backend for cell in cells):
            found = judge.verdicts([cell for cell in cells if cell.ours.backend == name], device)
            console.print(judge.verdict_table(found, f"Bars: {name} on {device}"))
        found = (
            judge.network_verdicts(network_rows) + judge.layer_verdicts(layer_rows) + judge.price_verdicts(price_rows)
        )
        if with_network:
            console.print(judge.verdict_table(found, f"Bars: networks and layers on {device}"))
    plot(cells, machine, out / f"{stem}.png")
    console.print(f"Rows and plot: {store.path}, {out / f'{stem}.png'}")

    failed = [cell for cell in cells if not cell.ours.ok]
    if failed:
        console.print(f"[red]aliasfused itself was not measured in {len(failed)} of {len(cells)} cells.[/]")
    fell = against is not None and _regressed(bench, cells, against)
    raise typer.Exit(1 if failed or fell else 0)


def _regressed(bench: Bench, cells: list[report.Cell], against: Path) -> bool:
    """Whether a ratio fell, and fell again when it was measured once more."""
    before = [row for row in Store(against, Row) if row.machine.allocator == bench.machine.allocator]
    if other := {row.machine.name for row in before} - {bench.machine.name}:
        bench.console.print(f"[yellow]{against} was measured on another machine: {', '.join(other)}.[/]")
    former = report.cells(latest(before))
    once = report.falls(cells, former)
    again = bench.measure(list(dict.fromkeys(fall.cell.case for fall in once)))
    twice = report.falls(report.cells(again), former)
    suspected = {fall.cell.key for fall in once}
    twice = [fall for fall in twice if fall.cell.key in suspected]
    if twice:
        bench.console.print(report.falls_table(twice, f"Slower than {against}, twice"))
    else:
        bench.console.print(f"Nothing is slower than {against} twice ({len(once)} cells were measured again).")
    return bool(twice)


def _default_allocator(out: Path, threads: int, *filters: list[str] | None) -> None:
    chosen = [
        argument
        for option, values in zip(("--op", "--backend", "--site", "--dtype", "--layout"), filters, strict=True)
        for value in values or ()
        for argument in (option, value)
    ]
    command = [sys.executable, "-m", "bench.run", "--bars", "--allocator", "default", "--k", "4", "--purpose", "ratio"]
    command += ["--peer", "pad+conv", "--no-network", "--no-tables", "--out", str(out), "--threads", str(threads)]
    subprocess.run([*command, *chosen], check=True)


def _progress(console: Console) -> Progress:
    what = TextColumn("{task.description}"), TextColumn("{task.fields[what]}", style="dim")
    return Progress(what[0], BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), what[1], console=console)


@contextlib.contextmanager
def _steps(progress: Progress, name: str, total: int) -> Iterator[Callable[[str], None]]:
    """A bar of so many steps; what is yielded is told as each of them begins."""
    task = progress.add_task(name, total=total, what="")
    begun = itertools.count()
    yield lambda what: progress.update(task, completed=next(begun), what=what)
    progress.update(task, completed=total, what="")


def _sites() -> list[str]:
    return [f"{site.channels}@{site.size}" for site in cases.SITES]


if __name__ == "__main__":
    typer.run(main)
