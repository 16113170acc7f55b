"""What the rows say: ratios to the best peer, tables, the bars and regressions."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from rich.table import Table
from rich.text import Text

from .cases import Case
from .network import NetworkRow
from .price import PriceRow, price
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


def _eager(row: Row) -> bool:
    return row.contender == "pad+conv"


def _compiled(row: Row) -> bool:
    return row.compiled


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


def _number(value: float | None, form: str = ".2f") -> str:
    return _NOTHING if value is None else format(value, form)


def _us(row: Row | None) -> str:
    return _NOTHING if row is None else _number(row.min_us, ".1f")


def _bytes(value: float | None) -> str:
    return _NOTHING if value is None else f"{value / 1e6:.1f} MB" if value else "0"


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
    for heading in (*headings, "best peer"):
        table.add_column(heading)
    for heading in ("ours", "best peer's", "ratio", "share", "kept", *(["ours, default malloc"] if allocators else [])):
        table.add_column(heading, justify="right")
    for cell in measured:
        case, ours, best = cell.case, cell.ours, cell.best()
        what = [case.op, case.site, case.batch, case.layout, case.dtype, case.k, case.direction]
        what += [ours.backend] if several else []
        if not ours.ok:
            table.add_row(*map(str, what), Text(ours.status, style="red"))
            continue
        name, kept = _NOTHING, _bytes(ours.kept_bytes)
        if best:
            name = (
                best.contender + (f" ({best.semantics})" if best.semantics else "") + " *" * bool(cell.peers(_compiled))
            )
            kept += f" / {_bytes(best.kept_bytes)}"
        values = [_us(ours), _us(best), _number(cell.ratio()), _number(ours.share)]
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
    for heading in ("backend", "op", "direction"):
        table.add_column(heading)
    for heading in ("cells", "best peer", "pad+conv", "compiled", "lowest", "share", "lowest share"):
        table.add_column(heading, justify="right")
    measured = [cell for cell in measured if cell.case.purpose != "call"]
    groups = dict.fromkeys((c.ours.backend, c.case.op, c.case.direction) for c in measured)
    for group in groups:
        some = [c for c in measured if c.ours.ok and (c.ours.backend, c.case.op, c.case.direction) == group]
        ratios = [c for c in some if c.case.purpose == "ratio"]
        shares = [c.ours.share for c in some if c.ours.share is not None]
        means = [geometric_mean(c.ratio(only) for c in ratios) for only in (_any, _eager, _compiled)]
        lowest = min((ratio for c in ratios if (ratio := c.ratio()) is not None), default=None)
        table.add_row(
            *group,
            str(len(some)),
            *(_number(mean) for mean in means),
            _number(lowest),
            _number(geometric_mean(shares)),
            _number(min(shares, default=None)),
        )
    return table


def _any(row: Row) -> bool:
    return True


def network_table(rows: Sequence[NetworkRow]) -> Table:
    first = rows[0]
    table = Table(title=f"{first.model} on {first.photographs} photographs, {first.dtype}")
    table.caption = "difference: largest, of the outputs from those before, relative to the largest output."
    for heading in ("mode", "accelerate", "images/s", "training step", "peak memory of a step", "difference"):
        table.add_column(heading, justify="left" if heading in ("mode", "accelerate") else "right")
    for row in rows:
        if row.status != "ok":
            table.add_row(row.mode, row.variant, Text(row.status, style="red"))
            continue
        difference = _NOTHING if row.variant == "before" else _number(row.difference, ".1e")
        step = f"{_number(row.step_ms, '.1f')} ms"
        table.add_row(row.mode, row.variant, _number(row.images_per_s, ".1f"), step, _bytes(row.peak_bytes), difference)
    return table


def price_table(rows: Sequence[PriceRow]) -> Table:
    table = Table(title="The price of anti-aliasing: a ResNet-50's training step, convolutions excluded")
    table.caption = (
        "price: batch norm, ReLU (maximum) and blur, less batch norm, ReLU (maximum) of the strided net, all sites, forward and "
        f"backward, batch {rows[0].batch}."
    )
    for heading in ("sites", "layout", "dtype", "unfused", "fused", "fused / unfused"):
        table.add_column(heading, justify="left" if heading in ("sites", "layout", "dtype") else "right")
    for stem, layout, dtype in dict.fromkeys((row.stem, row.layout, row.dtype) for row in rows):
        some = [row for row in rows if (row.stem, row.layout, row.dtype) == (stem, layout, dtype)]
        unfused, fused = (price(some, variant, stem) for variant in ("unfused", "fused"))
        sites = "the stem" if stem else "three stages"
        table.add_row(sites, layout, dtype, f"{unfused:,.0f} µs", f"{fused:,.0f} µs", f"{fused / unfused:.2f}")
    return table


@dataclass(frozen=True)
class Verdict:
    """A bar, what was measured, and whether that is over it; None where nothing was measured."""

    bar: str
    direction: str
    value: str
    passed: bool | None


def verdicts(measured: Sequence[Cell], device: str) -> list[Verdict]:
    """Judge the cells of one backend by the bars of its device."""
    good = [cell for cell in measured if cell.ours.ok]
    count = f"{len(good)} of {len(measured)}"
    found = [Verdict("every case of ours ran and was right", "all", count, len(good) == len(measured))]
    judge = _cpu_verdicts if device == "cpu" else _cuda_verdicts
    for direction in ("forward", "backward"):
        some = [cell for cell in good if cell.case.direction == direction]
        found += judge([cell for cell in some if cell.case.op == "blur_pool"], direction)
        if device == "cpu":
            found += _step_verdicts(some, direction)
        # What a small backward costs its caller is measured with the forward that it needs.
        label = direction if direction == "forward" else "forward+backward"
        calls = [c.ratio(_eager) for c in good if (c.case.purpose, c.case.direction) == ("call", label)]
        least = 2.0 if device == "cpu" else 1.0
        found.append(_least(f"small call, Python included: {least:g} times as fast as pad+conv", label, calls, least))
    kept = [c for c in good if c.ours.kept_bytes is not None]
    for bar, bound, those in (
        ("bytes kept for backward by blur_pool: 0", 0.0, [c for c in kept if c.case.op == "blur_pool"]),
        (
            "kept for backward where something comes before the blur: x and no more",
            1.0,
            [c for c in kept if c.case.op in ("act_blur_pool", "max_blur_pool", "stem_blur_pool")],
        ),
        (
            "kept for backward where a batch norm comes before the blur: at most 1 + 1/32 of x",
            1 + 1 / 32,
            [c for c in kept if c.case.op == "bn_act_blur_pool"],
        ),
    ):
        most = max(((c.ours.kept_bytes or 0) / c.case.input_bytes for c in those), default=None)
        if those or bound == 0:
            found.append(Verdict(bar, "backward", _number(most), None if most is None else most <= bound))
    return found


# Geometric mean and least of the ratios to the best peer, forward and backward.
STEP_BARS = {
    ("max_blur_pool", "stem_blur_pool"): {"forward": (4.0, 1.5), "backward": (6.0, 2.0)},
    ("act_blur_pool", "bn_act_blur_pool"): {"forward": (3.0, 1.0), "backward": (4.0, 1.2)},
    ("adaptive_g8", "adaptive_g2"): {"forward": (4.0, 1.5), "backward": (6.0, 2.0)},
}


def _step_verdicts(some: Sequence[Cell], direction: str) -> list[Verdict]:
    found = []
    for ops, bars in STEP_BARS.items():
        ratios = [cell.ratio() for cell in some if cell.case.op in ops and cell.case.purpose == "ratio"]
        if not ratios:
            continue
        (mean, least), names = bars[direction], ", ".join(ops)
        found.append(_mean(f"{names}: geometric mean of the ratios to the best peer ≥ {mean}", direction, ratios, mean))
        found.append(_least(f"{names}: no cell's ratio < {least}", direction, ratios, least))
    return found


def _least(bar: str, direction: str, values: Iterable[float | None], bound: float) -> Verdict:
    least = min((value for value in values if value is not None), default=None)
    return Verdict(bar, direction, _number(least), None if least is None else least >= bound)


def _mean(bar: str, direction: str, values: Iterable[float | None], bound: float) -> Verdict:
    mean = geometric_mean(values)
    return Verdict(bar, direction, _number(mean), None if mean is None else mean >= bound)


def _cpu_verdicts(some: Sequence[Cell], direction: str) -> list[Verdict]:
    ratios = [cell for cell in some if cell.case.purpose == "ratio"]
    mean, least = (2.5, 1.0) if direction == "forward" else (6.0, 1.5)
    found = [
        _mean(f"geometric mean of the ratios to the best peer ≥ {mean}", direction, (c.ratio() for c in ratios), mean),
        _least(f"no cell's ratio < {least}", direction, (c.ratio() for c in ratios), least),
    ]
    shares = {replace(c.case, batch=1): c.ours.share for c in some if c.case.purpose == "share"}
    if direction == "forward":
        close = [c for c in ratios if (c.ratio() or 1.2) < 1.2]
        backing = [shares.get(replace(c.case, batch=1, purpose="share")) for c in close]
        bar = "cells with a ratio < 1.2 have a share ≥ 0.75"
        known = [share for share in backing if share is not None]
        passed = None if len(known) < len(close) else all(share >= 0.75 for share in known)
        value = f"{len(close)} cells, least share {_number(min(known, default=None))}"
        found.append(Verdict(bar, direction, value, passed))
    for strict, bound, text in ((True, 0.6, "fp32 k ≤ 5 and bf16 k ≤ 4"), (False, 0.4, "elsewhere")):
        those = [share for case, share in shares.items() if (case.k <= (5 if case.dtype == "fp32" else 4)) == strict]
        found.append(_least(f"share of copy speed ≥ {bound}: {text}", direction, those, bound))
    return found


def _cuda_verdicts(some: Sequence[Cell], direction: str) -> list[Verdict]:
    ratios = [cell for cell in some if cell.case.purpose == "ratio"]
    found = []
    for low, high, bound in ((0, 5, 0.90), (5, 7, 0.85)):
        those = [c.ours.share for c in ratios if low < c.case.k <= high]
        found.append(_least(f"share of copy speed ≥ {bound}: k ≤ {high}", direction, those, bound))
    mean = 3.0 if direction == "forward" else 5.0
    found.append(_mean(f"geometric mean against pad+conv ≥ {mean}", direction, (c.ratio(_eager) for c in ratios), mean))
    fast = [c for c in ratios if (peer := c.best(_compiled)) and (peer.share or 0) > 0.6]
    slow = [c for c in ratios if c not in fast]
    bar = "geometric mean against the better compiled form ≥ 1.5, where its share ≤ 0.6"
    found.append(_mean(bar, direction, (c.ratio(_compiled) for c in slow), 1.5))
    bar = "share ≥ 0.90, or 1.5 times the better compiled form, where that form's share > 0.6"
    pairs = [max((c.ours.share or 0) / 0.9, (c.ratio(_compiled) or 0) / 1.5) for c in fast]
    over = sum(pair >= 1 for pair in pairs)
    return [*found, Verdict(bar, direction, f"{over} of {len(pairs)} cells", over == len(pairs) if pairs else None)]


def verdict_table(found: Sequence[Verdict], title: str) -> Table:
    table = Table("bar", "direction", "measured", "verdict", title=title)
    marks = {
        True: Text("pass", style="green"),
        False: Text("FAIL", style="bold red"),
        None: Text("not measured", style="yellow"),
    }
    for verdict in found:
        table.add_row(verdict.bar, verdict.direction, verdict.value, marks[verdict.passed])
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
        table.add_row(str(fall.cell.case), fall.cell.ours.backend, _number(fall.before), _number(fall.now))
    return table
