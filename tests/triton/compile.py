"""The Triton kernels compiled ahead of time, without a GPU, run by tests/test_triton.py in a process of its own.

Gates: nothing spilled, nothing exchanged through shared memory, and 16 bytes at a time where the layout permits.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from aliasfused import filters
from aliasfused.kernels.triton import adaptive_blur_pool as adaptive
from aliasfused.kernels.triton import batch_norm as norms
from aliasfused.kernels.triton import blur_pool as ours
from aliasfused.kernels.triton import channel_moments as moments
from aliasfused.kernels.triton import max_blur_pool as steps
from aliasfused.kernels.triton.launch import options

POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64"}
ADJOINT = pytest.mark.parametrize("adjoint", [False, True], ids=["fwd", "bwd"])
LAYOUT = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])


@pytest.fixture(autouse=True, scope="module")
def fresh_cache(tmp_path_factory):
    """So that every kernel is compiled, and by this compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


def cuobjdump() -> str:
    """Triton's own, else the CUDA toolkit's."""
    wheels = Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin")
    folders = [
        Path(triton.__file__).parent / "backends/nvidia/bin",
        *wheels,
        "/usr/local/cuda/bin",
        *os.get_exec_path(),
    ]
    found = shutil.which("cuobjdump", path=os.pathsep.join(map(str, folders)))
    assert found, "no cuobjdump beside triton, in the nvidia wheels, in /usr/local/cuda/bin or on the PATH"
    return found


def compiled(kernel, arguments, capability=90):
    """Compile as a launch with these arguments would: ones and multiples of 16 are made known to the compiler."""
    signature, constants, attributes = {}, {}, {}
    pointers = POINTERS | {torch.int64: "*i64"}

    def typed(value, path, specialised):
        if isinstance(value, tuple):
            return tuple(typed(element, (*path, j), True) for j, element in enumerate(value))
        if value is None or (specialised and isinstance(value, int) and value == 1):
            constants[path] = value
            return "constexpr"
        if isinstance(value, torch.Tensor) or (specialised and value % 16 == 0):
            attributes[path] = [["tt.divisibility", 16]]
        if isinstance(value, torch.Tensor):
            return pointers[value.dtype]
        return "i32" if abs(value) < 2**31 else "i64"

    for i, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        if parameter.is_constexpr:
            signature[name], constants[(i,)] = "constexpr", value
        else:
            signature[name] = typed(value, (i,), name not in kernel.do_not_specialize)
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options(ours.THREADS))


def plan(
    adjoint, k, channels_last, dtype=torch.bfloat16, shape=(32, 64, 112, 112), stride=(2, 2), border="reflect", learned=False
):  # fmt: skip
    """The kernel and arguments of a launch, from tensors without memory."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    out = [-(-n // s) for n, s in zip(shape[2:], stride, strict=True)]
    x, y = (
        torch.empty(s, dtype=dtype, device="meta", memory_format=memory_format) for s in (shape, (*shape[:2], *out))
    )
    taps = torch.empty(shape[1], k, device="meta") if learned else filters.binomial(k)
    src, dst = (y, x) if adjoint else (x, y)
    padding = [(k - 1) // 2, k // 2] * 2
    kernel, _, arguments = ours.plan(adjoint, src, dst, taps, taps, stride, padding, border, channels_last)
    return kernel, arguments


def assert_lean(binary, tmp_path, shared=0):
    """Neither stack (spills among it) nor local nor more shared memory: a thread works in its registers."""
    path = tmp_path / "kernel.cubin"
    path.write_bytes(binary.asm["cubin"])
    report = subprocess.run([cuobjdump(), "-res-usage", path], capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", report))
    # What the driver keeps for itself of shared memory is counted where there is some.
    assert usage and int(usage["STACK"]) == int(usage["LOCAL"]) == 0 and (shared or int(usage["SHARED"]) == 0), report
    assert binary.metadata.shared <= shared


def widths(binary, instruction):
    """Bytes that each global load or store moves, as a set."""
    found = re.findall(rf"{instruction}\.global(?:\.\w+)*?(?:\.v(\d))?\.b(\d+)", binary.asm["ptx"])
    assert found
    return {int(vector or 1) * int(bits) // 8 for vector, bits in found}


def assert_wide(binary, adjoint, channels_last):
    """x and dx move 16 bytes at a time. In NHWC so does all else; in NCHW, y and dy are half as long, and borders are pixels."""
    if channels_last:
        assert widths(binary, "ld") == widths(binary, "st") == {16}
    elif adjoint:
        assert 8 in widths(binary, "ld") and widths(binary, "st") == {16}
    else:
        assert 16 in widths(binary, "ld") and widths(binary, "st") == {8}


@ADJOINT
@LAYOUT
@pytest.mark.parametrize(("capability", "k"), [*((90, k) for k in range(2, 8)), (80, 4), (100, 7)])
def test_tuned(capability, k, channels_last, adjoint, tmp_path):
    kernel, arguments = plan(adjoint, k, channels_last)
    assert kernel is ours.patch
    binary = compiled(kernel, arguments, capability)
    assert_lean(binary, tmp_path)
    assert_wide(binary, adjoint, channels_last)


@ADJOINT
@LAYOUT
def test_float32(channels_last, adjoint, tmp_path):
    binary = compiled(*plan(adjoint, 5, channels_last, torch.float32))
    assert_lean(binary, tmp_path)
    assert_wide(binary, adjoint, channels_last)


@pytest.mark.parametrize(
    ("adjoint", "changes"),
    [
        (False, dict(shape=(8, 64, 27, 27))),
        (True, dict(shape=(8, 512, 7, 7), border="replicate")),
        (True, dict(shape=(8, 24, 14, 14), border="zeros", learned=True)),
        (False, dict(shape=(2**31, 1, 8, 8))),
    ],
    ids=["odd", "small", "learned", "wide"],
)
def test_other_images(adjoint, changes, tmp_path):
    """Unaligned rows, small planes, taps per channel, more tiles than 32 bits count."""
    assert_lean(compiled(*plan(adjoint, 3, False, **changes)), tmp_path)


@ADJOINT
@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
def test_gather(adjoint, learned):
    kernel, arguments = plan(adjoint, 12, True, stride=(3, 3), learned=learned)
    assert kernel is ours.gather
    assert 16 in widths(compiled(kernel, arguments), "ld")


@pytest.fixture
def launched(monkeypatch):
    """What would have been launched, as (kernel, arguments)."""
    calls = []
    for module in (adaptive, norms, ours, moments, steps):
        monkeypatch.setattr(
            module, "launch", lambda device, threads, kernel, _, arguments: calls.append((kernel, arguments))
        )
    return calls


@pytest.mark.parametrize("axis", [0, 1])
def test_taps_grad(axis, launched):
    x, dy = torch.empty(8, 64, 56, 56, device="meta"), torch.empty(8, 64, 28, 28, device="meta")
    ours.blur_pool_taps_grad(dy, x, torch.empty(64, 4, device="meta"), axis, 3, (2, 2), [1, 1, 1, 2], "reflect")
    compiled(*launched[0])


def step(act, kernel, dtype, shape=(8, 64, 56, 56), channels_last=False, affine=True):
    """Launch forward, backward and sums of tensors without memory."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)
    table = torch.empty(3, shape[1], dtype=torch.promote_types(dtype, torch.float32), device="meta") if affine else None
    numbers, pads = (
        (1.0, 20.0) if act == "softplus" else (),
        [(k - 1) // 2 for k in (kernel[1], kernel[1], kernel[0], kernel[0])],
    )
    rest = (act, numbers, kernel, pads, filters.binomial(4), filters.binomial(3), (2, 2), [1, 1, 1, 2], "reflect")
    y = steps.max_blur_pool_fwd(x, table, *rest)
    steps.max_blur_pool_bwd(y, x, table, table if table is None else table[:2], *rest)
    steps.max_blur_pool_sums(y, x, table, *rest)


@LAYOUT
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_step(dtype, channels_last, launched):
    """Where C is contiguous, whole vectors of it are loaded and stored."""
    step("relu", (3, 3), dtype, channels_last=channels_last)
    forward, backward, _ = (compiled(*call) for call in launched)
    assert forward.metadata.shared == 0
    for binary in (forward, backward):
        assert widths(binary, "st") == ({16} if channels_last else {dtype.itemsize})
        # The rest are tables.
        assert not channels_last or widths(binary, "ld") == {16, 4}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh", "softplus"])
def test_activations(act, dtype, launched):
    """An approximate logarithm is not one near 1."""
    step(act, (1, 1), dtype, affine=False)
    for call in launched:
        assert "lg2.approx" not in compiled(*call).asm["ptx"]


@pytest.mark.parametrize("shape", [(3, 1, 5, 1), (2**31, 1, 8, 8)], ids=["strides of one", "wide"])
def test_steps_of_other_images(shape, launched):
    step("none", (2, 2) if shape[3] > 1 else (2, 1), torch.float16, shape)
    for call in launched:
        compiled(*call)


@LAYOUT
@pytest.mark.parametrize("dtype", POINTERS, ids=lambda d: str(d)[6:])
def test_moments(dtype, channels_last, launched, tmp_path):
    """Threads meet when all is summed, not before."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(8, 64, 56, 56, dtype=dtype, device="meta", memory_format=memory_format)
    moments.channel_moments(x)
    binary = compiled(*launched[0])
    assert_lean(binary, tmp_path, shared=8 * moments.THREADS * launched[0][1]["SPAN"])
    assert widths(binary, "ld") == {16}


@pytest.mark.parametrize("shape", [(8, 61, 27, 27), (2**31, 1, 8, 8)], ids=["odd", "wide"])
@pytest.mark.parametrize("cut", [0, 1], ids=["whole", "cut"])
def test_moments_of_other_images(shape, cut, launched, tmp_path):
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta")[..., cut:]
    moments.channel_moments(x)
    assert_lean(compiled(*launched[0]), tmp_path, shared=8 * moments.THREADS * launched[0][1]["SPAN"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_norm(dtype, launched, tmp_path):
    """Of parameters and statistics in this dtype."""
    moments, sums = torch.empty(3, 64, dtype=torch.float64, device="meta"), torch.empty(2, 64, device="meta")
    row, batches = torch.empty(64, dtype=dtype, device="meta"), torch.empty((), dtype=torch.int64, device="meta")
    table = norms.batch_norm_table(row, row, None, row, row, 1e-5, False)
    norms.batch_norm_table(moments[1], moments[2], moments[0], None, None, 1e-5, False)
    norms.batch_norm_follow(row, row, batches, moments, 0.1)
    norms.batch_norm_follow(row, row, batches, moments, None)
    norms.batch_norm_gradient(sums, moments, table, 1e-5)
    assert len(launched) == 5
    for call in launched:
        assert_lean(compiled(*call), tmp_path)


def predicted(
    k,
    normalize,
    channels_last,
    dtype=torch.bfloat16,
    shape=(8, 64, 56, 56),
    groups=8,
    border="reflect",
    everywhere=False,
):
    """Launch forward, backward and the gradient of the logits, of tensors without memory."""

    def empty(channels, *size):
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        return torch.empty((shape[0], channels, *size), dtype=dtype, device="meta", memory_format=memory_format)

    out = [-(-n // 2) for n in shape[2:]]
    x, dy, logits = empty(*shape[1:]), empty(shape[1], *out), empty(groups * k * k, *(shape[2:] if everywhere else out))
    arguments = k, (2, 2), groups, normalize, border
    adaptive.adaptive_blur_pool_fwd(x, logits, *arguments)
    adaptive.adaptive_blur_pool_bwd(dy, logits, *arguments, *shape[2:], channels_last)
    adaptive.adaptive_blur_pool_logits_grad(dy, x, logits, *arguments)


@LAYOUT
@pytest.mark.parametrize(
    ("k", "dtype", "normalize"),
    [
        (3, torch.bfloat16, "group"),
        (5, torch.bfloat16, "joint"),
        (3, torch.float32, "joint"),
        (5, torch.float32, "group"),
    ],
)
@pytest.mark.parametrize("everywhere", [False, True], ids=["kept", "everywhere"])
def test_predicted_filters(k, dtype, normalize, channels_last, everywhere, launched, tmp_path):
    """Where C is contiguous, whole vectors of it are loaded and stored. Threads meet to learn whether a border is near."""
    predicted(k, normalize, channels_last, dtype, everywhere=everywhere)
    for kernel, arguments in launched:
        binary = compiled(kernel, arguments)
        assert_lean(binary, tmp_path, shared=16 if kernel is adaptive.backward else 0)
        if kernel in (adaptive.forward, adaptive.backward):
            assert widths(binary, "st") == ({16} if channels_last else {dtype.itemsize})
        # The rest are logits, and what there is for each softmax.
        wide = channels_last and kernel is not adaptive.softmaxes
        assert widths(binary, "ld") <= {dtype.itemsize, 4} | ({16} if wide else set())
        assert not wide or 16 in widths(binary, "ld")


@pytest.mark.parametrize(
    "changes",
    [
        dict(k=7, normalize="group", channels_last=True, dtype=torch.float64, border="zeros"),
        dict(k=9, normalize="joint", channels_last=False, shape=(3, 1, 5, 1), groups=1),
        dict(k=3, normalize="none", channels_last=True, shape=(2, 15, 9, 9), groups=5, border="circular"),
        dict(k=3, normalize="group", channels_last=False, shape=(2**31, 2, 3, 3), groups=2, border="replicate"),
    ],
    ids=["long", "strides of one", "odd", "wide"],
)
def test_other_predicted_filters(changes, launched):
    predicted(**changes)
    for call in launched:
        compiled(*call)
