"""The bars that the rows are judged by."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from rich.table import Table
from rich.text import Text

from .layer import CHANNELS, LayerRow
from .network import NetworkRow
from .price import PriceRow, price, prices
from .report import Cell, by_layer, compiled, eager, geometric_mean, megabytes, number, released, times_released

# Geometric mean and least of the ratios to the best peer, forward and backward.
STEP_BARS = {
    ("max_blur_pool", "stem_blur_pool"): {"forward": (4.0, 1.5), "backward": (6.0, 2.0)},
    ("act_blur_pool", "bn_act_blur_pool"): {"forward": (3.0, 1.0), "backward": (4.0, 1.2)},
    ("adaptive_g8", "adaptive_g2"): {"forward": (4.0, 1.5), "backward": (6.0, 2.0)},
}
# Geometric mean of the ratios to the released formulation: at least, and the goal.
RELEASED_BARS = {"forward": (50, 100), "backward": (40, 75)}
# Bytes kept for backward over those of x.
KEPT_BARS = (
    ("bytes kept for backward by blur_pool: 0", 0.0, ("blur_pool",)),
    (
        "kept for backward with a maximum before the blur: at most 1 + 1/8 of x",
        1 + 1 / 8,
        ("max_blur_pool", "stem_blur_pool"),
    ),
    (
        "kept for backward with a batch norm or activation before it: at most 1 + 1/32 of x",
        1 + 1 / 32,
        ("act_blur_pool", "bn_act_blur_pool"),
    ),
)
# Of a layer with predicted filters: what training may keep, over the bytes of x.
LAYER_BARS = {
    ("apply", "logits kept"): (1.10, "logits applied at the kept positions"),
    ("apply", "logits everywhere"): (1.30, "logits of all positions applied"),
    # 2.8 with a copy of x with its border; the predictor's is made again.
    ("layer", "dense"): (1.7, "the whole layer, dense"),
}


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
        calls = [c.ratio(eager) for c in good if (c.case.purpose, c.case.direction) == ("call", label)]
        least = 2.0 if device == "cpu" else 1.0
        found.append(_least(f"small call, Python included: {least:g} times as fast as pad+conv", label, calls, least))
    kept = [c for c in good if c.ours.kept_bytes is not None]
    for bar, bound, ops in KEPT_BARS:
        most = max(((c.ours.kept_bytes or 0) / c.case.input_bytes for c in kept if c.case.op in ops), default=None)
        if most is not None or not bound:
            found.append(Verdict(bar, "backward", number(most), None if most is None else most <= bound))
    return found


def _step_verdicts(some: Sequence[Cell], direction: str) -> list[Verdict]:
    found = []
    for ops, bars in STEP_BARS.items():
        ratios = [cell.ratio() for cell in some if cell.case.op in ops and cell.case.purpose == "ratio"]
        if not ratios:
            continue
        (mean, least), names = bars[direction], ", ".join(ops)
        found.append(_mean(f"{names}: geometric mean of the ratios to the best peer ≥ {mean}", direction, ratios, mean))
        found.append(_least(f"{names}: no cell's ratio < {least}", direction, ratios, least))
    to_released = [ratio for cell in some if (ratio := cell.ratio(released)) is not None]
    if to_released:
        least, goal = RELEASED_BARS[direction]
        bar = f"predicted filters: geometric mean against the released formulation, logits everywhere, ≥ {least} (goal: {goal})"
        found.append(_mean(bar, direction, to_released, least))
    return found


def network_verdicts(rows: Sequence[NetworkRow]) -> list[Verdict]:
    """Memory of an eager training step of resnetblur50, against the strided net's."""
    by_variant = {row.variant: row for row in rows if (row.model, row.mode) == ("resnetblur50", "eager")}
    if not by_variant.keys() >= {"plain", "accelerated"}:
        return []
    found = []
    for name, part, bound in (("bytes kept by", "kept_bytes", 1.0), ("peak of", "peak_bytes", 1.03)):
        ours, plain = (getattr(by_variant[variant], part) for variant in ("accelerated", "plain"))
        value = f"{ours / plain:.3f}: {megabytes(ours)} to {megabytes(plain)}"
        bar = f"resnetblur50: {name} a training step ≤ {bound:g} of the strided net's"
        found.append(Verdict(bar, "forward+backward", value, ours <= bound * plain))
    return found


def layer_verdicts(rows: Sequence[LayerRow]) -> list[Verdict]:
    """What is kept where a bar is said for, and how much faster than the released layer an evaluation is."""
    judged = [row for row in rows if (row.case.op, row.case.channels) == ("adaptive_g8", CHANNELS) and row.kept_bytes]

    def most(part: str, variant: str) -> float | None:
        layers = (row for row in judged if (row.part, row.variant) == (part, variant))
        return max(((row.kept_bytes or 0) / row.case.input_bytes for row in layers), default=None)

    found = []
    for (part, variant), (bound, what) in LAYER_BARS.items():
        ours, theirs = most(part, variant), most(part, "released")
        bar = f"kept for backward by {what} ≤ {bound:.2f} of x ({CHANNELS} channels in 8 groups)"
        value = f"{number(ours)}, released {number(theirs)}"
        found.append(Verdict(bar, "backward", value, None if ours is None else ours <= bound))
    known = by_layer(rows)
    layers = [row for row in rows if (row.part, row.variant, row.case.direction) == ("layer", "compat", "forward")]
    bar = "the whole layer, evaluated: geometric mean against the released one ≥ 4"
    return [*found, _mean(bar, "forward", (times_released(row, known) for row in layers), 4)]


def price_verdicts(rows: Sequence[PriceRow]) -> list[Verdict]:
    """Of the stem and of the stages, in every layout and dtype."""
    pairs = [[price(some, variant, stem) for variant in ("fused", "unfused")] for (stem, *_), some in prices(rows)]
    most = max((fused / unfused for fused, unfused in pairs), default=None)
    passed = all(fused <= unfused / 6 for fused, unfused in pairs) if pairs else None
    bar = "price of anti-aliasing ≤ 1/6 of the unfused one's, stem and stages"
    return [Verdict(bar, "forward+backward", number(most), passed)]


def _least(bar: str, direction: str, values: Iterable[float | None], bound: float) -> Verdict:
    least = min((value for value in values if value is not None), default=None)
    return Verdict(bar, direction, number(least), None if least is None else least >= bound)


def _mean(bar: str, direction: str, values: Iterable[float | None], bound: float) -> Verdict:
    mean = geometric_mean(values)
    return Verdict(bar, direction, number(mean), None if mean is None else mean >= bound)


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
        value = f"{len(close)} cells, least share {number(min(known, default=None))}"
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
    found.append(_mean(f"geometric mean against pad+conv ≥ {mean}", direction, (c.ratio(eager) for c in ratios), mean))
    fast = [c for c in ratios if (peer := c.best(compiled)) and (peer.share or 0) > 0.6]
    slow = [c for c in ratios if c not in fast]
    bar = "geometric mean against the better compiled form ≥ 1.5, where its share ≤ 0.6"
    found.append(_mean(bar, direction, (c.ratio(compiled) for c in slow), 1.5))
    bar = "share ≥ 0.90, or 1.5 times the better compiled form, where that form's share > 0.6"
    pairs = [max((c.ours.share or 0) / 0.9, (c.ratio(compiled) or 0) / 1.5) for c in fast]
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
