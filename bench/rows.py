"""Results as rows of a CSV file: what was measured, on what machine, from which commit."""

from __future__ import annotations

import csv
import datetime
import functools
import importlib.metadata
import os
import platform
import re
import subprocess
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch

from .cases import Case
from .timing import Result

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Machine:
    """Where and with what the rows of one run were measured."""

    date: str
    commit: str
    device: str
    name: str
    cores: int
    threads: int
    allocator: str
    busy_percent: float  # of the CPU, just before the run: another process at work spoils the numbers
    python: str
    torch: str
    aliasfused: str
    timm: str
    kornia: str

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", f"{self.name}-{self.cores}c".lower()).strip("-")

    @property
    def same(self) -> tuple[object, ...]:
        """Rows may be taken as one run where this agrees."""
        return (self.commit, self.device, self.name, self.cores, self.threads, self.torch, self.timm, self.kornia)


def this_machine(device: str, threads: int, allocator: str) -> Machine:
    return Machine(
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        commit=commit(),
        device=device,
        name=torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        cores=psutil.cpu_count(logical=True) or 0,
        threads=threads,
        allocator=allocator,
        busy_percent=psutil.cpu_percent(interval=0.5),
        python=platform.python_version(),
        torch=torch.__version__,
        **{name: version(name) for name in ("aliasfused", "timm", "kornia")},
    )


def version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


@functools.cache
def cpu_name() -> str:
    try:
        import cpuinfo  # comes with pytest-benchmark
    except ImportError:
        return platform.processor() or platform.machine()
    return str(cpuinfo.get_cpu_info().get("brand_raw") or platform.machine())


@functools.cache
def commit() -> str:
    """The commit the library stands at, with a + where its sources were changed since.

    A copy without git is told by ``ALIASFUSED_COMMIT``.
    """

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(("git", *arguments), cwd=ROOT, capture_output=True, text=True, check=False)

    if named := os.environ.get("ALIASFUSED_COMMIT"):
        return named
    try:
        head = git("rev-parse", "--short=12", "HEAD")
    except OSError:
        return "unknown"
    if head.returncode:
        return "unknown"
    changed = git("status", "--porcelain", "--", "aliasfused", "csrc", "setup.py").stdout
    return head.stdout.strip() + ("+" if changed else "")


def resumable(machine: Machine) -> bool:
    """Rows of changed sources are not known to come from these very sources."""
    return machine.commit != "unknown" and not machine.commit.endswith("+")


@dataclass(frozen=True)
class Row:
    """One contender at one case."""

    case: Case
    contender: str
    role: str
    backend: str
    compiled: bool
    semantics: str  # how a peer's work differs from the case, empty where it does not
    status: str
    min_us: float | None
    median_us: float | None
    calls: int | None
    share: float | None
    kept_bytes: int | None
    machine: Machine

    @property
    def ok(self) -> bool:
        return self.status == "ok" and self.min_us is not None


def to_rows(case: Case, results: Iterable[Result], machine: Machine) -> list[Row]:
    return [_row(case, result, machine) for result in results]


def _row(case: Case, result: Result, machine: Machine) -> Row:
    who = result.contender
    return Row(
        case=case,
        contender=who.name,
        role=who.role,
        backend=who.backend if who.role == "ours" else "",
        compiled=who.compiled,
        semantics=", ".join(f"{name} {value}" for name, value in who.equal(case).items()),
        status=result.status,
        min_us=result.sample and result.sample.min_us,
        median_us=result.sample and result.sample.median_us,
        calls=result.sample and result.sample.calls,
        share=result.share,
        kept_bytes=result.kept_bytes,
        machine=machine,
    )


T = TypeVar("T")


def _flat(record: Any) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, Machine):
            flat |= {f"machine_{name}": item for name, item in asdict(value).items()}
        elif isinstance(value, Case):
            flat |= asdict(value)
        else:
            flat[field.name] = value
    return {name: "" if value is None else value for name, value in flat.items()}


def _record(kind: type[T], flat: Mapping[str, str], prefix: str = "") -> T:
    values: dict[str, Any] = {}
    for name, annotation in typing.get_type_hints(kind).items():
        if annotation is Machine:
            values[name] = _record(Machine, flat, "machine_")
        elif annotation is Case:
            values[name] = _record(Case, flat)
        else:
            values[name] = _parse(annotation, flat[prefix + name])
    return kind(**values)


def _parse(annotation: Any, text: str) -> Any:
    if isinstance(annotation, types.UnionType):
        if not text:
            return None
        annotation = next(kind for kind in annotation.__args__ if kind is not types.NoneType)
    if annotation is bool:
        return text == "True"
    return annotation(text) if annotation in (int, float) else text


class Store:
    """A CSV file of records of one kind. Rows are written as they come, so that a run may be cut short and taken up."""

    def __init__(self, path: Path, kind: type[Any], fresh: bool = False) -> None:
        self.path, self.kind = path, kind
        path.parent.mkdir(parents=True, exist_ok=True)
        if fresh:
            path.unlink(missing_ok=True)

    def __iter__(self) -> Iterator[Any]:
        if self.path.exists():
            with self.path.open(newline="") as file:
                yield from (_record(self.kind, flat) for flat in csv.DictReader(file))

    def add(self, records: Iterable[Any]) -> None:
        flats = [_flat(record) for record in records]
        if not flats:
            return
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, flats[0])
            if new:
                writer.writeheader()
            writer.writerows(flats)


def identity(row: Row) -> tuple[object, ...]:
    """What a row is about, whenever and wherever it was measured."""
    return (*astuple(row.case), row.contender, row.backend, row.machine.allocator)


def latest(rows: Iterable[Row]) -> list[Row]:
    """Of rows about the same thing the last."""
    return list({identity(row): row for row in rows}.values())
