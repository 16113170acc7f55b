"""What the rows say: ratios to the best peer, tables and regressions; bars.py judges them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from rich.table import Table
from rich.text import Text

from .cases import Case
from .layer import VARIANTS, LayerRow
from .network import KINDS, NetworkRow
from .peers import RELEASED
from .price import PriceRow, price, prices
from .rows import Row

_NOTHING = "-"
FALL = 0.8  # a ratio below this part of its former value is a regression, once it is seen twice


@dataclass(frozen=True)
class Cell:
    """One case done by one of our backends, beside everybody else."""

    case: Case
    ours: Row
    others: tuple[Row, ...]

    @property
    def key(self) -> tuple[Case, str]:
        return self.case, self.ours.backend

    def peers(self, only: Callable[[Row], bool] = lambda row: True) -> list[Row]:
        return [row for row in self.others if row.role == "peer" and row.ok and only(row)]

    def best(self, only: Callable[[Row], bool] = lambda row: True) -> Row | None:
        return min(self.peers(only), key=_time, default=None)

    def ratio(self, only: Callable[[Row], bool] = lambda row: True) -> float | None:
        """How many times faster than the best of the peers that count."""
        best = self.best(only)
        return _time(best) / _time(self.ours) if best and self.ours.ok else None


def _time(row: Row) -> float:
    assert row.min_us is not None
    return row.min_us


def eager(row: Row) -> bool:
    return row.contender == "pad+conv"


def compiled(row: Row) -> bool:
    return row.compiled


def released(row: Row) -> bool:
    return row.contender == RELEASED.name


def cells(rows: Iterable[Row]) -> list[Cell]:
    """Group rows by case, in the order in which the cases were measured."""
    by_case: dict[Case, list[Row]] = {}
    for row in rows:
        by_case.setdefault(row.case, []).append(row)
    return [
        Cell(case, ours, tuple(row for row in group if row.role != "ours"))
        for case, group in by_case.items()
        for ours in group
        if ours.role == "ours"
    ]


def number(value: float | None, form: str = ".2f") -> str:
    return _NOTHING if value is None else format(value, form)


def _us(row: Row | None) -> str:
    return _NOTHING if row is None else number(row.min_us, ".1f")


def megabytes(value: float | None) -> str:
    return _NOTHING if value is None else f"{value / 1e6:.1f} MB" if value else "0"


def _heads(table: Table, left: Iterable[str], right: Iterable[str]) -> None:
    for heading in left:
        table.add_column(heading)
    for heading in right:
        table.add_column(heading, justify="right")


def results_table(measured: Sequence[Cell], default: Sequence[Cell] = ()) -> Table:
    """A line for each cell. A peer whose work differs from ours is named with what differs."""
    table = Table(title="aliasfused against the best peer (µs, smallest of many calls)", caption_justify="left")
    table.caption = (
        "ratio: best peer's time / ours.  share: of the speed of a plain copy.  kept: for backward, ours / best peer.\n"
        "*: torch.compile of pad+conv and of shifted slices took part."
    )
    several = len({cell.ours.backend for cell in measured}) > 1
    allocators = {cell.key: cell.ours for cell in default}
    headings = ["op", "site", "batch", "layout", "dtype", "k", "direction", *(["backend"] if several else [])]
    numbers = ("ours", "best peer's", "ratio", "share", "kept", *(["ours, default malloc"] if allocators else []))
    _heads(table, (*headings, "best peer"), numbers)
    for cell in measured:
        case, ours, best = cell.case, cell.ours, cell.best()
        what = [case.op, case.site, case.batch, case.layout, case.dtype, case.k, case.direction]
        what += [ours.backend] if several else []
        if not ours.ok:
            table.add_row(*map(str, what), Text(ours.status, style="red"))
            continue
        name, kept = _NOTHING, megabytes(ours.kept_bytes)
        if best:
            name = (
                best.contender + (f" ({best.semantics})" if best.semantics else "") + " *" * bool(cell.peers(compiled))
            )
            kept += f" / {megabytes(best.kept_bytes)}"
        values = [_us(ours), _us(best), number(cell.ratio()), number(ours.share)]
        values += [kept if case.direction == "backward" else _NOTHING]
        values += [_us(allocators.get(cell.key))] if allocators else []
        table.add_row(*map(str, what), name, *values)
    return table


def absent_table(rows: Iterable[Row]) -> Table | None:
    """Who did not take part, and why: once for each reason."""
    reasons: dict[tuple[str, str], int] = {}
    for row in rows:
        if row.status != "ok":
            who = f"{row.contender} {row.backend}".strip()
            reasons[who, row.status] = reasons.get((who, row.status), 0) + 1
    if not reasons:
        return None
    table = Table("contender", "why it has no time", "cases", title="Not measured")
    for (who, status), count in reasons.items():
        table.add_row(who, Text(status), str(count))
    return table


def geometric_mean(values: Iterable[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return statistics.geometric_mean(numbers) if numbers else None


def summary_table(measured: Sequence[Cell]) -> Table:
    """Geometric means over the cells, for each backend, op and direction."""
    table = Table(title="Geometric means")
    numbers = ("cells", "best peer", "pad+conv", "compiled", "released", "lowest", "share", "lowest share")
    _heads(table, ("backend", "op", "direction"), numbers)
    measured = [cell for cell in measured if cell.case.purpose != "call"]
    groups = dict.fromkeys((c.ours.backend, c.case.op, c.case.direction) for c in measured)
    for group in groups:
        some = [c for c in measured if c.ours.ok and (c.ours.backend, c.case.op, c.case.direction) == group]
        ratios = [c for c in some if c.case.purpose == "ratio"]
        shares = [c.ours.share for c in some if c.ours.share is not None]
        means = [geometric_mean(c.ratio(only) for c in ratios) for only in (_any, eager, compiled, released)]
        lowest = min((ratio for c in ratios if (ratio := c.ratio()) is not None), default=None)
        table.add_row(
            *group,
            str(len(some)),
            *(number(mean) for mean in means),
            number(lowest),
            number(geometric_mean(shares)),
            number(min(shares, default=None)),
        )
    return table


def _any(row: Row) -> bool:
    return True


def network_table(rows: Sequence[NetworkRow]) -> Table:
    table = Table(title=f"Networks on {rows[0].photographs} photographs, {rows[0].dtype}")
    table.caption = (
        "kept: for backward, parameters excluded.  difference: largest, of the outputs from the unfused eager ones, relative "
        "to the largest."
    )
    right = ("images/s", "training step", "kept, an image", "peak of a step", "difference")
    _heads(table, ("network", "mode", "variant"), right)
    for row in rows:
        if row.status != "ok":
            table.add_row(row.model, row.mode, row.variant, Text(row.status, style="red"))
            continue
        kept = None if row.kept_bytes is None else row.kept_bytes / row.photographs
        values = [number(row.images_per_s, ".1f"), f"{number(row.step_ms, '.1f')} ms", megabytes(kept)]
        values += [megabytes(row.peak_bytes), number(row.difference, ".1e")]
        table.add_row(row.model, row.mode, row.variant, *values, end_section=(row.mode, row.variant) == KINDS[-1])
    return table


def layer_table(rows: Sequence[LayerRow]) -> Table:
    """A line for each layer of a case: what it takes to evaluate it and to train it."""
    table = Table(
        title="Predicted filters: given logits applied, and the layer with its predictor (smallest of many calls)"
    )
    table.caption = (
        "x: times as fast as released.  kept and peak: in training, over the bytes of x (x and logits included, parameters "
        "not).\nTraining: forward and backward.  difference: largest, of evaluated outputs from those released, relative."
    )
    right = ("evaluation", "x", "training", "x", "kept", "peak", "difference")
    _heads(table, ("op", "site", "batch", "layout", "dtype", "part", "variant"), right)
    known = by_layer(rows)
    for (case, part, variant), evaluation in known.items():
        if case.direction != "forward":
            continue
        training = known[replace(case, direction="forward+backward"), part, variant]
        values: list[str] = []
        for row in (evaluation, training):
            values += [f"{row.min_us:,.0f} µs", number(times_released(row, known), ".1f")]
        values += [
            number((training.kept_bytes or 0) / case.input_bytes),
            number(training.peak_bytes / case.input_bytes),
        ]
        what = (case.op, case.site, case.batch, case.layout, case.dtype, part, variant)
        last = variant == VARIANTS["layer"][-1]
        table.add_row(*map(str, what), *values, number(evaluation.difference, ".1e"), end_section=last)
    return table


Layer = tuple[Case, str, str]


def by_layer(rows: Iterable[LayerRow]) -> dict[Layer, LayerRow]:
    return {(row.case, row.part, row.variant): row for row in rows}


def times_released(row: LayerRow, known: Mapping[Layer, LayerRow]) -> float:
    """How many times faster than the released layer."""
    return known[row.case, row.part, "released"].min_us / row.min_us


def price_table(rows: Sequence[PriceRow]) -> Table:
    table = Table(title="The price of anti-aliasing: a ResNet-50's training step, convolutions excluded")
    table.caption = (
        "price: batch norm, ReLU (maximum) and blur, less batch norm, ReLU (maximum) of the strided net, all sites, forward and "
        f"backward, batch {rows[0].batch}."
    )
    _heads(table, ("sites", "layout", "dtype"), ("unfused", "fused", "fused / unfused"))
    for (stem, layout, dtype), some in prices(rows):
        unfused, fused = (price(some, variant, stem) for variant in ("unfused", "fused"))
        sites = "the stem" if stem else "three stages"
        table.add_row(sites, layout, dtype, f"{unfused:,.0f} µs", f"{fused:,.0f} µs", f"{fused / unfused:.2f}")
    return table


@dataclass(frozen=True)
class Fall:
    """A cell whose ratio to the best peer fell."""

    cell: Cell
    before: float
    now: float


def falls(now: Sequence[Cell], before: Sequence[Cell]) -> list[Fall]:
    """The cells whose ratio fell by more than a fifth, over the peers both runs have: a new peer is no fall."""
    former = {cell.key: cell for cell in before}
    found = []
    for cell in now:
        old = former.get(cell.key)
        if old is None:
            continue
        common = {row.contender for row in cell.peers()} & {row.contender for row in old.peers()}
        ratio, was = (
            replace(c, others=tuple(r for r in c.others if r.contender in common)).ratio() for c in (cell, old)
        )
        if ratio is not None and was is not None and ratio < FALL * was:
            found.append(Fall(cell, was, ratio))
    return found


def falls_table(found: Sequence[Fall], title: str) -> Table:
    table = Table("case", "backend", "ratio before", "now", title=title)
    for fall in found:
        table.add_row(str(fall.cell.case), fall.cell.ours.backend, number(fall.before), number(fall.now))
    return table
