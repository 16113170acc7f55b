"""The native CPU kernels in every instruction set, what is said of the backends, and how one is exchanged for another."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import aliasfused
from aliasfused import __main__, blur_pool2d, kernels
from aliasfused.kernels import native, reference

ROOT = Path(__file__).parent.parent
NAMES = ("native", "triton", "reference")


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *filter(None, sys.path)])
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
    )


def backend(name: str, device: str) -> kernels.Backend:
    return next(b for b in aliasfused.backends() if (b.name, b.device) == (name, device))


def built() -> list[str]:
    """The instruction sets of the build, best first."""
    return backend("native", "cpu").detail.partition(" of ")[2].split(",")


needs_native = pytest.mark.skipif(
    not backend("native", "cpu").available, reason=f"backend native on cpu: {backend('native', 'cpu').reason}"
)


# --- instruction sets ------------------------------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("isa", built() if backend("native", "cpu").available else [])
def test_instruction_set(isa, capfd):
    """Sums, tails, borders and conversions, in a process of its own: see isa_sweep.py."""
    one_heap = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
    run = python(str(ROOT / "tests" / "isa_sweep.py"), isa, ALIASFUSED_CPU_ISA=isa, **one_heap)
    if "must name an instruction set of this processor" in run.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert run.returncode == 0, f"exit status {run.returncode}\n{run.stdout}{run.stderr}"
    with capfd.disabled():
        print(f"\n  {run.stdout.strip()}", end=" ")


@needs_native
def test_the_best_instruction_set_is_chosen_and_baseline_is_always_there():
    chosen, _, rest = backend("native", "cpu").detail.partition(" of ")
    assert rest.split(",")[-1] == "baseline"
    if "ALIASFUSED_CPU_ISA" not in os.environ and sys.platform == "linux" and Path("/proc/cpuinfo").exists():
        flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
        assert chosen != "baseline" or "avx2" not in flags


@needs_native
def test_an_unknown_instruction_set_is_refused_with_those_there_are():
    program = (
        "import aliasfused, torch\nprint(aliasfused.backends()[0])\naliasfused.blur_pool2d(torch.ones(1, 1, 4, 4))"
    )
    run = python("-c", program, ALIASFUSED_CPU_ISA="sse9")
    assert run.returncode == 1
    error = run.stderr.strip().splitlines()[-1]
    assert error.startswith("RuntimeError: aliasfused: the native backend cannot run on cpu: "), run.stderr
    for word in ("ALIASFUSED_CPU_ISA", "sse9", ",".join(built())):
        assert word in error
    assert "available=False" in run.stdout


def objects() -> list[Path]:
    """What the shared object was linked from, if it was built here."""
    return sorted(ROOT.glob("build/objects/*.o"))


def symbols(path: Path, kinds: str) -> set[str]:
    """Names of code and data of some of nm's kinds; W, V, u and w are those that the linker takes from whichever object
    comes first."""
    lines = subprocess.run(
        ["nm", "-C", "--defined-only", path], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    rows = [line.split(maxsplit=2) for line in lines]
    return {name for _, kind, name in rows if kind in kinds and not name.startswith("DW.ref.")}


def defines(path: Path, start: str) -> bool:
    return any(name.startswith(start) for name in symbols(path, "T"))


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is not installed")
@pytest.mark.skipif(not objects(), reason="the shared object was not built here: its parts are not at hand")
def test_instruction_sets_share_no_code():
    """A weak symbol outside the namespace of its instruction set could serve a processor that does not have that set."""
    by_isa = [(path, isa) for path in objects() for isa in built() if defines(path, f"aliasfused::{isa}::blur_pool(")]
    assert {isa for _, isa in by_isa} == set(built())
    for path, isa in by_isa:
        foreign = {name for name in symbols(path, "WVuw") if f"aliasfused::{isa}::" not in name}
        assert not foreign, f"{path.name} shares {sorted(foreign)}"


# --- what is said of the backends ------------------------------------------------------------------------------------


def test_backends_are_described():
    rows = aliasfused.backends()
    assert [(b.name, b.device) for b in rows] == [(n, d) for n in NAMES for d in ("cpu", "cuda")]
    for b in rows:
        assert b.default == (b.name == "native")
        assert b.available == (not b.reason) == (not b.remedy), "what is missing comes with a reason and a remedy"
        assert b.detail or not b.available
    assert backend("reference", "cpu").available


def test_the_table_names_every_backend():
    run = python("-m", "aliasfused")
    assert run.returncode == 0, run.stderr
    lines = [line.split() for line in run.stdout.splitlines()]
    assert lines[0] == ["backend", "device", "available", "default", "detail", "reason", "remedy"]
    assert [tuple(line[:2]) for line in lines[1:]] == [(b.name, b.device) for b in aliasfused.backends()]
    for line, b in zip(run.stdout.splitlines()[1:], aliasfused.backends(), strict=True):
        assert b.detail in line and b.reason in line and b.remedy in line
        assert line.split()[2:4] == ["yes" if b.available else "no", "yes" if b.default else "no"]


def test_the_table_is_aligned(monkeypatch):
    """Every column begins where its title does, whatever the cells' lengths."""
    rows = (
        kernels.Backend("native", "cpu", True, True, "", "", ""),
        kernels.Backend("x", "cuda", False, False, "d" * 30, "r", "m"),
    )
    monkeypatch.setattr(__main__, "backends", lambda: rows)
    title, first, second = __main__.table().splitlines()
    assert second[title.index("reason")] == "r" and second[title.index("remedy")] == "m"
    assert first[title.index("detail")] == first[title.index("reason")] == first[title.index("remedy")] == "-"


@pytest.mark.skipif(backend("native", "cuda").available, reason="this build has CUDA kernels")
def test_missing_cuda_kernels_are_refused_with_what_mends_it():
    """The dispatcher's CUDA entry, called on CPU tensors: there need be no device to hear why."""
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    x, b = torch.ones(1, 1, 4, 4), backend("native", "cuda")
    with pytest.raises(RuntimeError, match="aliasfused: the native backend cannot run on cuda: ") as error:
        torch.ops.aliasfused.blur_pool_fwd.default.redispatch(cuda, x, [1.0], [1.0], [2, 2], [0, 0, 0, 0], "zeros")
    assert b.reason in str(error.value) and b.remedy in str(error.value)


def test_a_missing_shared_object_is_refused_and_the_rest_works(monkeypatch):
    monkeypatch.setattr(native, "_ERROR", "its shared object could not be loaded (a test took it away)")
    before = kernels._registrations.current
    kernels._registrations.install(before)
    try:
        x = torch.ones(1, 1, 4, 4)
        with pytest.raises(RuntimeError, match=r"native backend cannot run on cpu: .*took it away.* pip install"):
            blur_pool2d(x)
        refused = pytest.raises(RuntimeError, match=r"native backend cannot run here: .*took it away.* pip install")
        with refused, aliasfused.use_backend("native"):
            pass
        with aliasfused.use_backend("reference"):
            assert torch.equal(blur_pool2d(x), torch.ones(1, 1, 2, 2))
    finally:
        monkeypatch.undo()
        kernels._registrations.install(before)


# --- exchanging them -------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """The ops that the reference backend ran."""
    seen = []

    def spy(name):
        function = getattr(reference, name)
        monkeypatch.setattr(reference, name, lambda *args: (seen.append(name), function(*args))[1])

    for name in kernels.OPS:
        spy(name)
    return seen


X = torch.arange(30.0).view(1, 1, 5, 6)


@needs_native
def test_every_op_goes_to_the_backend_in_use_and_back(calls):
    def everything():
        x = X.clone().requires_grad_()
        h = torch.ones(3, requires_grad=True)
        blur_pool2d(x).sum().backward()
        blur_pool2d(x, (h, 1)).sum().backward()
        aliasfused.max_blur_pool2d(x, scale=torch.ones(x.shape[1], requires_grad=True)).sum().backward()
        aliasfused.nn.BNActBlurPool2d(x.shape[1])(x).sum().backward()
        logits = torch.ones(x.shape[0], 9, *x.shape[2:], requires_grad=True)
        aliasfused.adaptive_blur_pool2d(x, logits, groups=1).sum().backward()

    everything()
    assert not calls
    with aliasfused.use_backend("reference"):
        everything()
    assert sorted(set(calls)) == sorted(kernels.OPS)
    calls.clear()
    everything()
    assert not calls


@needs_native
def test_backends_nest_and_come_back_after_an_exception(calls):
    with aliasfused.use_backend("reference"):
        with aliasfused.use_backend("native"):
            blur_pool2d(X)
            assert not calls
        blur_pool2d(X)
        assert len(calls) == 1
        with pytest.raises(KeyError), aliasfused.use_backend("native"):
            raise KeyError
        blur_pool2d(X)
        assert len(calls) == 2
    blur_pool2d(X)
    assert len(calls) == 2


@needs_native
def test_a_refused_backend_changes_nothing(calls):
    refused = pytest.raises(ValueError, match=r"name must be 'native', 'triton' or 'reference', got 'cudnn'")
    with refused, aliasfused.use_backend("cudnn"):
        pass
    blur_pool2d(X)
    assert not calls


@needs_native
def test_other_threads_and_compiled_graphs_see_it(calls):
    compiled = torch.compile(blur_pool2d, backend="aot_eager", fullgraph=True)
    compiled(X)
    assert not calls
    with aliasfused.use_backend("reference"):
        compiled(X)
        assert calls == ["blur_pool_fwd"]
        thread = threading.Thread(target=blur_pool2d, args=(X,))
        thread.start()
        thread.join()
        assert len(calls) == 2
    compiled(X)
    assert len(calls) == 2


def test_exchanging_is_silent(recwarn):
    with aliasfused.use_backend("reference"), aliasfused.use_backend("reference"):
        blur_pool2d(X)
    assert not [str(w.message) for w in recwarn]


@pytest.mark.skipif(backend("triton", "cpu").available, reason="triton serves CPU tensors here (TRITON_INTERPRET)")
def test_a_backend_without_this_device_is_refused():
    """Triton, which needs a GPU or its interpreter: at once where it serves no device, else when it is called on this one."""
    b = backend("triton", "cpu")
    with (
        pytest.raises(RuntimeError, match="aliasfused: the triton backend cannot run") as error,
        aliasfused.use_backend("triton"),
    ):
        blur_pool2d(X)
    assert b.reason in str(error.value) and b.remedy in str(error.value)
    assert torch.equal(blur_pool2d(X, 1), X[..., ::2, ::2])
