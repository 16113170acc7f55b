"""The benchmark's own logic: what it would time, whom it believes, what it writes down and when it raises an alarm."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("psutil")
pytest.importorskip("rich")
pytest.importorskip("typer")
pytest.importorskip("matplotlib")

import aliasfused
from bench import bars, cases, layer, models, network, peers, price, report, run, sanitize, timing
from bench.cases import Case
from bench.peers import Absent, Contender
from bench.rows import Machine, Row, Store, latest, resumable, to_rows
from bench.test_bench import CASES as pytest_cases

CASE = Case("blur_pool", "resnet50", 4, 9, 2, "NHWC", "fp32", 4, "backward")
MACHINE = Machine(
    "2026-01-01T00:00:00Z", "abc", "cpu", "A CPU", 2, 2, "warm", 0.5, "3.11", "2.13", "0.1", "1.0", "absent"
)


def row(
    contender: str = "aliasfused",
    us: float | None = 1.0,
    case: Case = CASE,
    machine: Machine = MACHINE,
    **extra: object,
) -> Row:
    role = "ours" if contender == "aliasfused" else "peer"
    backend = "native" if role == "ours" else ""
    calls = None if us is None else 3
    status = "absent: it is not installed" if us is None else "ok"
    plain = Row(case, contender, role, backend, False, "", status, us, us, calls, None, None, machine)
    return dataclasses.replace(plain, **extra)  # type: ignore[arg-type]


def cell(ours: float, **others: float) -> report.Cell:
    return report.cells([row(us=ours), *(row(name, us) for name, us in others.items())])[0]


@pytest.fixture
def reference() -> Iterator[None]:
    with aliasfused.use_backend("reference"):
        yield


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("grid", [cases.quick, cases.barred])
def test_a_grid_names_each_case_once_and_shares_are_of_inputs_no_cache_holds(grid, device):
    grid = grid(device)
    assert len(set(grid)) == len(grid)
    assert {case.direction for case in grid} >= {"forward", "backward"}
    large = [case for case in grid if case.purpose == "share" or (device == "cuda" and case.purpose == "ratio")]
    assert large
    assert all(case.input_bytes >= cases.SHARE_BYTES[device] for case in large)


def test_fewest_bytes_at_stride_two_are_five_quarters_of_the_input():
    even = dataclasses.replace(CASE, size=8)
    assert even.fewest_bytes == 1.25 * even.input_bytes
    assert CASE.fewest_bytes == CASE.input_bytes + 2 * 4 * 5 * 5 * 4  # ceil(9/2) = 5


def test_filters_leave_what_is_among_the_wanted_values():
    grid = cases.barred("cpu")
    some = cases.select(grid, site=["64@112"], k=[3, 7], dtype=None, direction=[])
    assert {(case.site, case.k) for case in some} == {("64@112", 3), ("64@112", 7)}
    assert {case.dtype for case in some} == {"fp32", "bf16"}
    assert cases.select(grid) == grid
    assert cases.select(grid, layout=["nhwc"]) == []


def test_compiled_peers_take_part_everywhere_under_the_bars_and_where_said_else():
    def compiled(case: Case, bars: bool) -> bool:
        return any(contender.compiled for contender in peers.contenders(case, "cpu", ["native"], bars))

    ratios = cases.select(cases.quick("cpu"), purpose=["ratio"])
    assert {case.site for case in ratios if compiled(case, bars=False)} == set(cases.QUICK_COMPILED)
    assert all(compiled(case, bars=True) for case in ratios)
    assert not any(compiled(case, bars=True) for case in cases.barred("cpu") if case.purpose != "ratio")


def test_turns_interleave_and_give_each_its_calls_and_its_time():
    order = []

    def timer(name: str, seconds: float) -> timing.Turn:
        return timing.Turn(lambda: order.append(name) or seconds)

    slow, fast = timing.interleave([timer("slow", 10.0), timer("fast", 1 / 64)], seconds=1 / 8, rounds=4, at_least=3)
    assert (slow.calls, fast.calls) == (3, 8)
    assert slow.min_us == slow.median_us == 10e6
    assert "".join(name[0] for name in order[:9]) == "sffsffsff"


def test_kept_bytes_count_a_storage_once():
    x = torch.ones(3, 5, requires_grad=True)

    def product() -> torch.Tensor:
        return (x * x)[:2] * x[:2]

    assert timing.kept_bytes(product) == 2 * 3 * 5 * 4  # x, and the product that was sliced
    assert timing.kept_bytes(product, held=[x[1:]]) == 3 * 5 * 4
    assert timing.kept_bytes(lambda: x + 1) == 0


@pytest.mark.parametrize("direction", ["forward", "backward", "forward+backward"])
@pytest.mark.parametrize("k", [3, 4])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_everybody_does_the_work_said(reference, direction, k, dtype):
    """Each peer equals this library under the arguments its row names, other paddings and borders included."""
    case = dataclasses.replace(CASE, direction=direction, k=k, dtype=dtype)
    inputs = timing.Inputs(case, "cpu")
    for contender in peers.contenders(case, "cpu", ["reference"]):
        if contender.compiled:
            continue
        try:
            op = contender.build(case, "cpu")
        except Absent:
            continue
        assert timing.difference(contender, op, inputs) <= 1, contender.name


@pytest.mark.parametrize("op", cases.OPS)
def test_the_peers_of_every_op_do_its_work(reference, op):
    """The released formulation too, though its logits are everywhere and its filters sum to one together."""
    case = dataclasses.replace(CASE, op=op, channels=16, k=3 if op in cases.GROUPS else 4)
    inputs = timing.Inputs(case, "cpu")
    contenders = [c for c in peers.contenders(case, "cpu", ["reference"]) if not c.compiled and c.name != "kornia"]
    assert {c.role for c in contenders} == {"ours", "peer"}
    assert [c.name for c in contenders if timing.difference(c, c.build(case, "cpu"), inputs) > 1] == []


def test_pytest_benchmark_has_a_case_of_every_op():
    assert {case.op for case in pytest_cases} == set(cases.OPS)


def test_the_form_that_is_compiled_does_the_work_said(reference):
    inputs = timing.Inputs(CASE, "cpu")
    contender = Contender("slices", "peer", peers._slices)
    assert timing.difference(contender, contender.build(CASE, "cpu"), inputs) <= 1


def test_who_is_wrong_or_absent_or_fails_gets_a_row_and_no_time(reference):
    def absent(case: Case, device: str) -> peers.Op:
        raise Absent("it is not installed")

    def shifted(case: Case, device: str) -> peers.Op:
        return lambda x: aliasfused.blur_pool2d(x.roll(1, -1), case.k)

    def broken(case: Case, device: str) -> peers.Op:
        raise RuntimeError("no such kernel\nand more")

    right = peers.PEERS["blur_pool"][0]
    crowd = [right, *(Contender(f.__name__, "peer", f) for f in (absent, shifted, broken))]
    rows = to_rows(CASE, timing.measure(CASE, crowd, "cpu", seconds=1e-4), MACHINE)
    statuses = {r.contender: r.status for r in rows}
    assert statuses.pop("copy") == statuses.pop(right.name) == "ok"
    assert statuses["absent"] == "absent: it is not installed"
    assert statuses["shifted"].startswith("differs: ")
    assert statuses["broken"] == "failed: RuntimeError: no such kernel"
    assert all((r.min_us is None) == (r.status != "ok") for r in rows)


def test_rows_survive_the_file(tmp_path: Path):
    store = Store(tmp_path / "deep" / "rows.csv", Row)
    rows = [row(share=0.5, kept_bytes=0), row("pad+conv", 2.5, compiled=True), row("timm", None, semantics="padding 2")]
    store.add(rows[:1])
    store.add(rows[1:])
    store.add([])
    assert list(store) == rows
    assert list(Store(store.path, Row, fresh=True)) == []


def test_the_last_of_rows_about_the_same_thing_counts():
    default = dataclasses.replace(MACHINE, allocator="default")
    rows = [row(us=1.0), row(us=3.0, machine=default), row("timm"), row(us=2.0)]
    assert {(r.contender, r.machine.allocator, r.min_us) for r in latest(rows)} == {
        ("aliasfused", "warm", 2.0),
        ("aliasfused", "default", 3.0),
        ("timm", "warm", 1.0),
    }


def test_a_run_is_taken_up_from_rows_of_its_own_kind_only(tmp_path: Path):
    store = Store(tmp_path / "rows.csv", Row)
    later = dataclasses.replace(MACHINE, date="2026-01-02T00:00:00Z", busy_percent=9.0)
    strangers = [dataclasses.replace(MACHINE, **{name: value}) for name, value in
                 (("commit", "def"), ("threads", 1), ("allocator", "default"), ("torch", "2.11"))]  # fmt: skip
    store.add([row(machine=machine) for machine in (later, *strangers)])
    bench = run.Bench(MACHINE, store, ["native"], True, [], None)  # type: ignore[arg-type]
    assert [r.machine for r in bench.rows("warm")] == [later]
    call = dataclasses.replace(CASE, purpose="call")
    store.add([row(case=call), row("pad+conv", case=call)])
    assert bench.pending([CASE, call]) == [CASE]  # every peer of CASE is missing
    assert resumable(MACHINE)
    assert not resumable(dataclasses.replace(MACHINE, commit="abc+"))
    assert not resumable(dataclasses.replace(MACHINE, commit="unknown"))


def test_a_ratio_is_to_the_best_peer_that_was_timed():
    rows = [row(us=2.0), row("pad+conv", 6.0), row("timm", None), row("slices compiled", 4.0, compiled=True)]
    one = report.cells([*rows, row("copy", 0.5, role="yardstick")])[0]
    assert one.ratio() == 2.0
    assert one.ratio(report.eager) == 3.0
    assert one.best(report.compiled).contender == "slices compiled"
    assert report.cells([row(us=None)])[0].ratio() is None


@pytest.mark.parametrize(("now", "fell"), [(1.0, False), (1.24, False), (1.26, True)])
def test_a_fall_is_more_than_a_fifth(now, fell):
    found = report.falls([cell(now, timm=3.0)], [cell(1.0, timm=3.0)])
    assert bool(found) is fell


def test_a_new_peer_is_no_fall():
    assert not report.falls([cell(1.0, timm=3.0, better=1.5)], [cell(1.0, timm=3.0)])
    assert not report.falls([cell(1.0, better=1.5)], [cell(1.0, timm=3.0)])


@pytest.mark.parametrize(("again", "regressed"), [(1.0, False), (2.0, True)])
def test_an_alarm_needs_two_falls(tmp_path: Path, again, regressed):
    store = Store(tmp_path / "before.csv", Row)
    store.add([row(us=1.0), row("timm", 3.0)])
    asked = []

    def measure(todo):
        asked.extend(todo)
        return [row(us=again), row("timm", 3.0)]

    bench = types.SimpleNamespace(machine=MACHINE, measure=measure, console=types.SimpleNamespace(print=lambda _: None))
    assert run._regressed(bench, [cell(2.0, timm=3.0)], store.path) is regressed
    assert asked == [CASE]


def test_bars_are_judged_by_their_own_cells():
    def pair(direction: str, ratio: float, **case: object) -> list[Row]:
        one = dataclasses.replace(CASE, direction=direction, **case)
        return [row(case=one), row("pad+conv", ratio, case=one)]

    share = dataclasses.replace(CASE, purpose="share", batch=9, direction="forward", k=3)
    rows = [*pair("forward", 1.1, k=3), *pair("forward", 9.0, k=4), *pair("backward", 5.0)]
    rows += [row(case=share, share=0.8), *pair("forward", 1.9, purpose="call")]
    rows[4] = dataclasses.replace(rows[4], kept_bytes=0)
    found = {(v.bar, v.direction): v for v in bars.verdicts(report.cells(rows), "cpu")}
    passed = {(bar.split(":")[0][:28], direction): v.passed for (bar, direction), v in found.items()}
    assert passed == {
        ("every case of ours ran and w", "all"): True,
        ("geometric mean of the ratios", "forward"): True,
        ("no cell's ratio < 1.0", "forward"): True,
        ("cells with a ratio < 1.2 hav", "forward"): True,
        ("share of copy speed ≥ 0.6", "forward"): True,
        ("share of copy speed ≥ 0.4", "forward"): None,
        ("small call, Python included", "forward"): False,
        ("geometric mean of the ratios", "backward"): False,
        ("no cell's ratio < 1.5", "backward"): True,
        ("share of copy speed ≥ 0.6", "backward"): None,
        ("share of copy speed ≥ 0.4", "backward"): None,
        ("small call, Python included", "forward+backward"): None,
        ("bytes kept for backward by b", "backward"): True,
    }
    assert bars.verdicts(report.cells([row(us=None)]), "cpu")[0].passed is False


def test_the_price_of_anti_aliasing():
    """Of what three networks do at one site: the same work fused as unfused, and what is paid above the plain one."""
    for stem in (False, True):
        x = torch.randn(2, 4, 12, 12)
        unfused, fused = (price.chain(variant, 4, stem, "cpu") for variant in ("unfused", "fused"))
        torch.testing.assert_close(fused(x), unfused(x.clone()), rtol=1e-4, atol=1e-5)
        assert price.chain("plain", 4, stem, "cpu")(x.clone()).shape[-1] == (6 if stem else 12)
    times = {"plain": 2.0, "unfused": 8.0, "fused": 3.0}
    rows = [
        price.PriceRow("64@112", stem, "NCHW", "fp32", 8, v, t * (1 + stem), MACHINE)
        for v, t in times.items()
        for stem in (0, 1)
    ]
    assert [price.price(rows, v, True) for v in ("unfused", "fused")] == [12.0, 2.0]
    assert [price.price(rows, v, False) for v in ("unfused", "fused")] == [6.0, 1.0]
    assert report.price_table(rows).row_count == 2


# --- the released layer, whole layers, whole networks -------------------------------------------------------------------

GOLDEN = sorted((Path(__file__).parent / "golden" / "adaptive").glob("*.npz"))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_the_released_layer_is_the_one_recorded(path: Path):
    data = {name: torch.from_numpy(value) for name, value in np.load(path).items() if name != "pad"}
    _, channels, _, _, kernel_size, group, stride, training = data["meta"].tolist()
    released = models.Released(channels, kernel_size, stride, group).double().train(bool(training))
    state = {name.removeprefix("state."): value for name, value in data.items() if name.startswith("state.")}
    released.load_state_dict(state, strict=True)
    x = data["x"].requires_grad_()
    y = released(x)
    dx, dweight = torch.autograd.grad(y, (x, released.conv.weight), data["dy"])
    for found, name in ((y, "y"), (dx, "dx"), (dweight, "dconv_weight")):
        torch.testing.assert_close(found, data[name], rtol=1e-10, atol=1e-10)


LAYER_CASE = Case("adaptive_g2", "resnet50", 8, 10, 2, "NHWC", "fp32", 3, "forward")


def test_layers_with_predicted_filters_do_the_same_and_keep_less(tmp_path: Path):
    rows = layer.measure([LAYER_CASE], "cpu", MACHINE, 1e-4, lambda what: None)
    assert [(r.part, r.variant) for r in rows if r.kept_bytes] == [
        (part, variant) for part, variants in layer.VARIANTS.items() for variant in variants
    ]
    assert max(r.difference for r in rows) < 1e-5
    kept = {(r.part, r.variant): r.kept_bytes / LAYER_CASE.input_bytes for r in rows if r.kept_bytes}
    logits = 2 * 9 / 8
    assert kept["apply", "logits everywhere"] == pytest.approx(1 + logits)
    assert kept["apply", "logits kept"] == pytest.approx(1 + logits / 4)
    assert kept["apply", "released"] == pytest.approx(1 + 9 + logits)  # x, every window, and the filters
    assert kept["layer", "strided"] < kept["layer", "dense"] == kept["layer", "compat"] < kept["layer", "released"]
    assert all(r.peak_bytes > 0 for r in rows)
    store = Store(tmp_path / "layer.csv", layer.LayerRow)
    store.add(rows)
    assert list(store) == rows
    assert report.layer_table(rows).row_count == len(rows) / 2


def test_what_the_sanitizer_sees_runs(capsys):
    """On a CPU, where nobody watches: that the calls are right ones."""
    sanitize.main("cpu")
    assert capsys.readouterr().out == "256 cases\n"


def test_the_bars_of_layers():
    case = dataclasses.replace(LAYER_CASE, op="adaptive_g8", channels=layer.CHANNELS)
    kept = {"logits kept": 1.07, "logits everywhere": 1.31, "dense": 1.6, "released": 12.0}
    rows = [
        layer.LayerRow(c, part, variant, us, 1, training and int(kept.get(variant, 0) * case.input_bytes), 0.0, MACHINE)
        for part, variants in layer.VARIANTS.items()
        for variant in variants
        for training in (None, True)
        for c in [dataclasses.replace(case, direction="forward+backward" if training else "forward")]
        for us in [5.0 if variant == "released" else 1.0]
    ]
    assert [v.passed for v in bars.layer_verdicts(rows)] == [True, False, True, True]
    assert [v.value.split(",")[0] for v in bars.layer_verdicts(rows)] == ["1.07", "1.31", "1.60", "5.00"]
    assert {v.passed for v in bars.layer_verdicts([])} == {None}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_first_look_at_layers_is_at_a_site_that_bars_judge(device):
    first, whole = layer.grid(device, False), layer.grid(device, True)
    assert 0 < len(first) < len(whole) == len(set(whole)) and set(first) < set(whole)
    assert {case.channels for case in first} == {layer.CHANNELS}
    assert {(case.channels, case.size) for case in whole} == {
        (64, 111), (128, 56), (256, 56), (256, 28), (512, 28), (512, 14), (1024, 14),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "blurs"),
    [("resnetblur50", 4), ("antialiased_resnet50", 7), ("antialiased_vgg16_bn", 5), ("adaptive_resnet50", 7)],
)
def test_anti_aliased_networks_are_their_strided_ones_with_blurs(name, blurs):
    """On meta tensors: as many classes, the same parameters but predictors, and all blurs are known to accelerate."""
    pytest.importorskip("timm")
    with torch.device("meta"):
        plain = network.NETWORKS[name].plain()
        shapes = [p.shape for p in plain.parameters()]
        blurred = network.NETWORKS[name].blurred(plain)
        assert blurred.eval()(torch.empty(1, 3, 224, 224)).shape == (1, 1000)
    known = {"BlurPool2d", *(path.rpartition(".")[2] for path in models.ALSO)}
    found = [module for module in blurred.modules() if type(module).__name__ in known]
    assert len(found) == blurs
    predictors = {id(p) for module in found for p in module.parameters()}
    assert [p.shape for p in blurred.parameters() if id(p) not in predictors] == shapes


def tiny() -> torch.nn.Module:
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.MaxPool2d(2)]
    return torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())


def test_a_network_in_its_variants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(network.NETWORKS, "tiny", network.Network(tiny, models.pools_blurred))
    eager = [kind for kind in network.KINDS if "eager" in kind]
    x = torch.randn(2, 3, 20, 20)
    monkeypatch.setattr(network, "inputs", lambda device: x)
    rows = network.measure(["tiny"], "cpu", MACHINE, "native", 1e-4, lambda what: None, eager)
    assert [row.variant for row in rows] == ["plain", "unfused", "accelerated"]
    plain, unfused, accelerated = rows
    assert plain.difference is None and unfused.difference == 0 and 0 < accelerated.difference < 1e-5
    assert accelerated.kept_bytes < plain.kept_bytes < unfused.kept_bytes
    assert 0 < accelerated.peak_bytes < unfused.peak_bytes
    # x, what convolution and ReLU give, and the indices of the maximum; statistics and the loss are small.
    maps = 4 * (x.numel() + 2 * 8 * (2 * 18**2 + 2 * 9**2))
    assert maps <= plain.kept_bytes < maps + 1000
    store = Store(tmp_path / "network.csv", network.NetworkRow)
    store.add(rows)
    assert list(store) == rows
    assert report.network_table(rows).row_count == 3


def test_the_names_of_networks_are_those_measured(monkeypatch: pytest.MonkeyPatch):
    def absent(device: str) -> torch.Tensor:
        raise Absent("there are no photographs")

    monkeypatch.setattr(network, "inputs", absent)
    rows = network.measure(network.NETWORKS, "cpu", MACHINE, "native", 1e-4, lambda what: None)
    assert [row.model for row in rows] == [*network.NETWORKS]
    assert {row.status for row in rows} == {"absent: there are no photographs"}
    assert set(network.QUICK) <= network.NETWORKS.keys()
    assert report.network_table(rows).row_count == len(rows)
    jobs = network.compilations(network.QUICK, "cpu", 2, network.QUICK_KINDS)
    assert [job.args[-2:] for job in jobs] == [
        (variant, training) for training in (True, False) for variant in ("unfused", "accelerated")
    ]


@pytest.mark.parametrize(("kept", "peak", "passed"), [(80, 103, [True, True]), (82, 104, [False, False])])
def test_the_bars_of_a_networks_memory(kept, peak, passed):
    def measured(variant: str, peak: int, kept: int) -> network.NetworkRow:
        return network.NetworkRow(
            "resnetblur50", 4, "float32", "eager", variant, "ok", 1.0, 1.0, peak, kept, None, MACHINE
        )

    rows = [measured("plain", 100, 81), measured("unfused", 130, 99), measured("accelerated", peak, kept)]
    assert [v.passed for v in bars.network_verdicts(rows)] == passed
    assert bars.network_verdicts(rows[:2]) == []


@pytest.mark.parametrize(("fused", "passed"), [(3.0, True), (3.2, False)])
def test_the_bar_of_the_price(fused, passed):
    times = {"plain": 2.0, "unfused": 8.0, "fused": fused}
    rows = [price.PriceRow("128@56", False, "NCHW", "fp32", 8, v, t, MACHINE) for v, t in times.items()]
    assert [v.passed for v in bars.price_verdicts(rows)] == [passed]


def test_the_bars_of_predicted_filters_and_of_what_is_kept():
    def pair(op: str, direction: str, kept: float, **peers: float) -> list[Row]:
        case = dataclasses.replace(CASE, op=op, direction=direction)
        ours = row(case=case, kept_bytes=int(kept * case.input_bytes) if direction == "backward" else None)
        return [ours, *(row(name, us, case=case) for name, us in peers.items())]

    rows = [*pair("adaptive_g8", "forward", 1, slices=5.0, released=49.0), *pair("max_blur_pool", "backward", 1.125)]
    rows += [*pair("adaptive_g8", "backward", 1, slices=5.0, released=41.0), *pair("act_blur_pool", "backward", 1.1)]
    found = {(v.bar, v.direction): v.passed for v in bars.verdicts(report.cells(rows), "cpu")}
    starts = {(bar[:48], direction): passed for (bar, direction), passed in found.items()}
    assert starts["predicted filters: geometric mean against the re", "forward"] is False
    assert starts["predicted filters: geometric mean against the re", "backward"] is True
    assert starts["adaptive_g8, adaptive_g2: geometric mean of the ", "forward"] is True
    assert starts["kept for backward with a maximum before the blur", "backward"] is True
    assert starts["kept for backward with a batch norm or activatio", "backward"] is False
