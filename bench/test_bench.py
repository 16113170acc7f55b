"""``pytest bench``: the cases of ``bench.run`` through pytest-benchmark, for its options of comparing and storing."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from . import cases, peers
from .cases import Case
from .peers import Absent, Contender
from .timing import Inputs, difference

DEVICE = "cpu"
CASES = [case for case in cases.quick(DEVICE) if case.network == "resnet50" and case.purpose != "share"]


def _entries() -> list[Any]:
    """Each case with everybody who needs no compiler."""
    pairs = itertools.chain.from_iterable(
        ((case, contender) for contender in peers.contenders(case, DEVICE, peers.default_backends(DEVICE)))
        for case in CASES
    )
    return [pytest.param(c, who, id=f"{c}-{who.name}".replace(" ", "-")) for c, who in pairs if not who.compiled]


@pytest.mark.parametrize(("case", "contender"), _entries())
def test_bench(case: Case, contender: Contender, benchmark: Callable[..., Any]) -> None:
    inputs = Inputs(case, DEVICE)
    try:
        op = contender.build(case, DEVICE)
    except Absent as absent:
        pytest.skip(str(absent))
    assert difference(contender, op, inputs) <= 1, "only who is right is timed"
    benchmark.group = str(case)  # type: ignore[attr-defined]
    benchmark.extra_info["semantics"] = contender.equal(case)  # type: ignore[attr-defined]
    benchmark(inputs.work(op))
