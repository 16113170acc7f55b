"""What PyTorch does to a function or a module: compile, differentiate, map, export, script, copy, distribute, cast."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import aliasfused
from agreement import assert_agree, bound, convolved, pascal, same
from aliasfused import blur_pool2d
from aliasfused.nn import BlurPool1d, BlurPool2d

pytestmark = [
    pytest.mark.filterwarnings(
        r"ignore:.*torch\.jit:DeprecationWarning"
    ),  # TorchScript is deprecated, and still served
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),  # its constants and checks are meant
]
MODES = ["reflect", "replicate", "zeros", "circular"]
OPS = torch.ops.aliasfused
H, W = pascal(4), [0.5, 0.25, -0.125]
SIDES = same(4, 3)


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    torch._dynamo.reset()


# --- gradients and maps of the function, by value, against the same transform of a convolution -----------------------
# The two programs share nothing: index_select and conv2d there, the ops here. Tests in float64.


def fixed(x):
    return (blur_pool2d(x, (H, W), (2, 1), pad_mode="reflect") ** 3).sum()


def fixed_expected(x):
    return (convolved(x, H, W, (2, 1), SIDES, "reflect") ** 3).sum()


def learned(x, h, w):
    return (blur_pool2d(x, (h, w), (2, 1), pad_mode="circular") ** 3).sum()


def learned_expected(x, h, w):
    return (convolved(x, h, w, (2, 1), SIDES, "circular") ** 3).sum()


def inputs(batch: tuple[int, ...] = ()):
    x = torch.randn(*batch, 1, 2, 5, 4, dtype=torch.float64)
    return x, torch.randn(*batch, 2, 4, dtype=torch.float64), torch.randn(*batch, 2, 3, dtype=torch.float64)


def tolerance(tree) -> float:
    """Cubes of sums of a few dozen products, differentiated twice at most: 1000 roundings of the largest number."""
    leaves = torch.utils._pytree.tree_leaves(tree)
    return 1000 * torch.finfo(torch.float64).eps * max(1.0, *(float(leaf.detach().abs().max()) for leaf in leaves))


def agree(actual, expected) -> None:
    actual, expected = (torch.utils._pytree.tree_leaves(tree) for tree in (actual, expected))
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert float(e.abs().max()) > 0  # zeros would agree with a lost gradient
        assert_agree(a, e, tolerance([e]))


TRANSFORMS = {
    "grad": torch.func.grad,
    "vmap": torch.func.vmap,
    "vmap of grad": lambda f: torch.func.vmap(torch.func.grad(f)),
    "jacrev": lambda f: torch.func.jacrev(torch.func.grad(f)),
    "hessian": torch.func.hessian,
    "jacfwd": torch.func.jacfwd,
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transform_of_fixed_taps(name):
    x = inputs((3,) if "vmap" in name else ())[0]
    agree(TRANSFORMS[name](fixed)(x), TRANSFORMS[name](fixed_expected)(x))


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("argument", [0, 1, 2])
def test_transform_of_learned_taps(name, argument):
    """With respect to each of image and rows; mapped over it, the others shared or mapped too."""
    values = inputs((3,) if "vmap" in name else ())
    functions = [learned, learned_expected]
    if name == "vmap":
        agree(*(torch.func.vmap(f)(*values) for f in functions))
        dims = tuple(0 if i == argument else None for i in range(3))
        values = [v if i == argument else v[0] for i, v in enumerate(values)]
        agree(*(torch.func.vmap(f, in_dims=dims)(*values) for f in functions))
    elif name == "vmap of grad":
        agree(*(torch.func.vmap(torch.func.grad(f, argnums=argument))(*values) for f in functions))
    elif name == "jacrev":
        agree(*(torch.func.jacrev(torch.func.grad(f, argnums=argument), argnums=(0, 1, 2))(*values) for f in functions))
    else:
        transform = {"grad": torch.func.grad, "hessian": torch.func.hessian, "jacfwd": torch.func.jacfwd}[name]
        agree(*(transform(f, argnums=argument)(*values) for f in functions))


@pytest.mark.parametrize("out_dim", [0, 1])
def test_vmap_of_an_inner_dimension(out_dim):
    x = torch.randn(1, 3, 2, 5, 4, dtype=torch.float64)
    actual = torch.func.vmap(lambda x: blur_pool2d(x, 3), in_dims=1, out_dims=out_dim)(x)
    expected = torch.stack([convolved(v, pascal(3), pascal(3), 2, same(3, 3), "reflect") for v in x.unbind(1)], out_dim)
    agree(actual, expected)


def test_jvp():
    values, tangents = inputs(), inputs()
    agree(torch.func.jvp(learned, values, tangents), torch.func.jvp(learned_expected, values, tangents))
    agree(torch.func.jvp(fixed, values[:1], tangents[:1]), torch.func.jvp(fixed_expected, values[:1], tangents[:1]))


@pytest.mark.parametrize("pad_mode", MODES)
def test_gradcheck_both_directions_and_twice(pad_mode):
    x, h, w = (v.requires_grad_() for v in inputs())

    def with_fixed(x):
        return blur_pool2d(x, (H, W), pad_mode=pad_mode)

    def with_learned(x, h, w):
        return blur_pool2d(x, (h, w), pad_mode=pad_mode)

    assert torch.autograd.gradcheck(with_fixed, (x,), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradcheck(with_learned, (x, h, w), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(with_fixed, (x,), check_fwd_over_rev=True)
    assert torch.autograd.gradgradcheck(with_learned, (x, h, w), check_fwd_over_rev=True)


# --- compile ---------------------------------------------------------------------------------------------------------


def compiled(f, **options):
    return torch.compile(f, fullgraph=True, backend="aot_eager", **options)


@pytest.mark.parametrize("name", ["grad", "vmap", "vmap of grad"])
def test_compiled_transform_by_value(name):
    """A plain autograd.Function gives silent zeros here."""
    x, h, w = inputs((3,) if "vmap" in name else ())
    transform = TRANSFORMS[name]
    agree(compiled(transform(fixed))(x), transform(fixed_expected)(x))
    if name == "vmap":
        agree(compiled(torch.func.vmap(learned))(x, h, w), torch.func.vmap(learned_expected)(x, h, w))
    else:
        wrap = torch.func.vmap if "vmap" in name else lambda f: f
        actual, expected = (wrap(torch.func.grad(f, argnums=(0, 1, 2))) for f in (learned, learned_expected))
        agree(compiled(actual)(x, h, w), expected(x, h, w))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("taps", ["fixed", "learned"])
def test_compiled_training_step(dynamic, taps):
    step = compiled(fixed if taps == "fixed" else learned, dynamic=dynamic)
    expected = fixed_expected if taps == "fixed" else learned_expected
    for size in ((5, 4), (8, 7), (6, 9)):
        values = [torch.randn(2, 2, *size, dtype=torch.float64), *inputs()[1:]][: 1 if taps == "fixed" else 3]
        values = [v.requires_grad_() for v in values]
        y, expected_y = step(*values), expected(*values)
        agree([y.detach()], [expected_y.detach()])
        agree(torch.autograd.grad(y, values), torch.autograd.grad(expected_y, values))


def test_taps_that_change_between_calls():
    """Numbers that change become symbolic in the second compilation."""
    f = compiled(lambda x, row: blur_pool2d(x, row))
    x = torch.randn(1, 2, 5, 6, dtype=torch.float64)
    for row in ([0.5, 0.5], [0.25, 0.75], [1.0, -2.0]):
        agree(f(x, row), convolved(x, row, row, 2, same(2, 2), "reflect"))


def test_dynamic_shapes_compile_once():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    module = torch.compile(BlurPool2d(3), fullgraph=True, dynamic=True, backend=counter)
    for shape in ((2, 3, 8, 9), (3, 3, 12, 15), (5, 3, 33, 20)):
        x = torch.randn(shape)
        assert_agree(module(x), convolved(x, pascal(4), pascal(4), 2, same(4, 4), "reflect"), bound(x, 16))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    "module", [BlurPool2d(3, learnable=True), BlurPool2d(3, learnable="normalised"), BlurPool1d(3)]
)
def test_modules_compile_whole(module):
    x = torch.randn(2, 3, 9, 8) if isinstance(module, BlurPool2d) else torch.randn(2, 3, 9)
    assert_agree(compiled(module)(x), module(x), bound(x, 16))


def test_inductor():
    """Its code around the op must agree with the strides the op says it returns, in both memory formats."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), BlurPool2d(4), nn.Conv2d(4, 4, 1)).double()
    step = torch.compile(network, fullgraph=True)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 3, 9, 12, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
        y, expected = step(x), network(x)
        agree([y.detach()], [expected.detach()])
        agree(torch.autograd.grad(y.square().sum(), x), torch.autograd.grad(expected.square().sum(), x))


# --- the raw ops -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck(channels_last):
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(2, 3, 7, 6).to(memory_format=memory_format)
    dy = torch.randn(2, 3, 4, 3).to(memory_format=memory_format)
    h, w = torch.randn(3, 3), torch.randn(3, 4)
    geometry = ([2, 2], [1, 2, 1, 1], "reflect")
    grid = (7, 6, channels_last)
    for op, arguments in (
        (OPS.blur_pool_fwd, (x, pascal(3), pascal(4), *geometry)),
        (OPS.blur_pool_bwd, (dy, pascal(3), pascal(4), *geometry, *grid)),
        (OPS.blur_pool_taps_fwd, (x, h, w, *geometry)),
        (OPS.blur_pool_taps_bwd, (dy, h, w, *geometry, *grid)),
        (OPS.blur_pool_taps_grad, (dy, x, w, 0, 3, *geometry)),
        (OPS.blur_pool_taps_grad, (dy, x, h, 1, 4, *geometry)),
    ):
        torch.library.opcheck(op.default, arguments)


# --- export, lowering, ONNX ------------------------------------------------------------------------------------------


def network() -> nn.Module:
    return nn.Sequential(BlurPool2d(3, 5, (1, 2), "replicate"), BlurPool2d(3, 4), BlurPool2d(3, 3, learnable=True))


def network_expected(x: torch.Tensor) -> torch.Tensor:
    for k, stride, pad_mode in ((5, (1, 2), "replicate"), (4, 2, "reflect"), (3, 2, "reflect")):
        x = convolved(x, pascal(k), pascal(k), stride, same(k, k), pad_mode)
    return x


DYNAMIC = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
TERMS = 25 + 16 + 9


def is_ours(node) -> bool:
    return "aliasfused" in str(node.target)


def test_export_keeps_one_node_a_blur_and_survives_the_disk():
    program = torch.export.export(network(), (torch.randn(2, 3, 20, 40),), dynamic_shapes=(DYNAMIC,))
    assert sum(map(is_ours, program.graph.nodes)) == 3
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for shape in ((2, 3, 20, 40), (1, 3, 17, 33)):
        x = torch.randn(shape)
        assert_agree(loaded(x), network_expected(x), bound(x, TERMS))


@pytest.mark.parametrize("border", ["pad", "gather"])
def test_a_program_lowers_to_aten(border):
    program = torch.export.export(network(), (torch.randn(2, 3, 20, 40),), dynamic_shapes=(DYNAMIC,))
    lowered = program.run_decompositions(aliasfused.decompositions(border))
    assert not any(map(is_ours, lowered.graph.nodes))
    x = torch.randn(1, 3, 17, 33)
    assert_agree(lowered.module()(x), network_expected(x), bound(x, TERMS))


def test_a_program_lowered_by_gather_takes_maps_smaller_than_the_pad():
    program = torch.export.export(BlurPool2d(3, 7), (torch.randn(2, 3, 8, 9),), dynamic_shapes=(DYNAMIC,))
    x = torch.randn(
        1, 3, 3, 3
    )  # F.pad cannot reflect three pixels of these; torch.export keeps outputs of one pixel apart
    y = program.run_decompositions(aliasfused.decompositions("gather")).module()(x)
    assert_agree(y, convolved(x, pascal(7), pascal(7), 2, same(7, 7), "reflect"), bound(x, 49))


@pytest.mark.parametrize("border", ["pad", "gather"])
@pytest.mark.parametrize("pad_mode", MODES)
def test_a_training_graph_lowers_to_aten(border, pad_mode):
    """Gradients of gradients, so that all five ops occur."""

    def gradient(blur):
        def loss(x, h, w):
            return (blur(x, h, w, pad_mode) ** 3).sum()

        def norm(x, h, w):
            return sum(g.square().sum() for g in torch.func.grad(loss, argnums=(0, 1, 2))(x, h, w))

        return torch.func.grad(norm, argnums=(0, 1, 2))

    def ours(x, h, w, pad_mode):
        return blur_pool2d(blur_pool2d(x, (H, W), pad_mode=pad_mode), (h, w), pad_mode=pad_mode)

    def expected(x, h, w, pad_mode):
        return convolved(convolved(x, H, W, 2, SIDES, pad_mode), h, w, 2, SIDES, pad_mode)

    values = [torch.randn(1, 2, 9, 8, dtype=torch.float64), *inputs()[1:]]
    graph = make_fx(gradient(ours))(*values)
    found = {node.target for node in graph.graph.nodes if is_ours(node)}
    assert found == {op for op in aliasfused.decompositions() if op._schema.name.startswith("aliasfused::blur_pool")}
    lowered = make_fx(gradient(ours), decomposition_table=aliasfused.decompositions(border))(*values)
    assert not any(map(is_ours, lowered.graph.nodes))
    agree(lowered(*values), gradient(expected)(*values))


def test_an_unknown_border_is_named():
    with pytest.raises(ValueError, match="border must be 'pad' or 'gather', got 'mirror'"):
        aliasfused.decompositions("mirror")


def run_onnx(program, x: torch.Tensor) -> torch.Tensor:
    onnxruntime = pytest.importorskip("onnxruntime", reason="runs what was exported")
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@pytest.mark.parametrize("pad_mode", MODES)
@pytest.mark.parametrize("learnable", [False, True])
def test_onnx_is_pad_and_conv_with_dynamic_axes(pad_mode, learnable):
    pytest.importorskip("onnxscript", reason="torch.onnx needs it")
    module = BlurPool2d(3, 4, pad_mode=pad_mode, learnable=learnable).eval()
    program = torch.onnx.export(
        module, (torch.randn(2, 3, 8, 9),), dynamic_shapes=(DYNAMIC,), dynamo=True, verbose=False
    )
    # Zeros may become the padding of the convolution itself.
    assert [node.op_type for node in program.model.graph] in [["Pad", "Conv"]] + [["Conv"]] * (pad_mode == "zeros")
    for shape in ((2, 3, 8, 9), (5, 3, 12, 7)):
        x = torch.randn(shape)
        assert_agree(run_onnx(program, x), convolved(x, pascal(4), pascal(4), 2, same(4, 4), pad_mode), bound(x, 16))


@pytest.mark.parametrize("pad_mode", MODES)
def test_onnx_by_gather_takes_maps_smaller_than_the_pad(pad_mode):
    pytest.importorskip("onnxscript", reason="torch.onnx needs it")
    program = torch.export.export(
        BlurPool2d(3, 7, pad_mode=pad_mode), (torch.randn(2, 3, 8, 9),), dynamic_shapes=(DYNAMIC,)
    )
    program = torch.onnx.export(
        program.run_decompositions(aliasfused.decompositions("gather")), dynamo=True, verbose=False
    )
    for shape in ((2, 3, 8, 9), (1, 3, 2, 3), (3, 3, 1, 1)):
        x = torch.randn(shape)
        assert_agree(run_onnx(program, x), convolved(x, pascal(7), pascal(7), 2, same(7, 7), pad_mode), bound(x, 49))


# --- TorchScript and FX ----------------------------------------------------------------------------------------------

SCRIPTED = {
    "fixed": (lambda: BlurPool2d(3, 4, (1, 2)), (2, 3, 7, 8)),
    "no batch": (lambda: BlurPool2d(3, 4, pad_mode="circular"), (3, 7, 8)),
    "map smaller than the pad": (lambda: BlurPool2d(3, 7), (2, 3, 2, 1)),
    "learnable": (lambda: BlurPool2d(3, 5, learnable=True, pad_mode="replicate"), (2, 3, 7, 8)),
    "normalised": (lambda: BlurPool2d(None, 5, learnable="normalised", pad_mode="zeros"), (2, 3, 7, 8)),
    "one axis": (lambda: BlurPool1d(3, 4), (2, 3, 7)),
    "one axis, learnable": (lambda: BlurPool1d(3, 4, learnable=True), (3, 7)),
    "antialiased_cnns": (lambda: aliasfused.compat.antialiased_cnns.BlurPool(3, "repl", pad_off=1), (2, 3, 7, 8)),
    "antialiased_cnns, one tap": (lambda: aliasfused.compat.antialiased_cnns.BlurPool(3, filt_size=1), (2, 3, 7, 8)),
    "antialiased_cnns, one axis": (lambda: aliasfused.compat.antialiased_cnns.BlurPool1D(3), (2, 3, 7)),
    "timm": (lambda: aliasfused.compat.timm.BlurPool2d(3, 4, pad_mode="constant"), (2, 3, 7, 8)),
    "kornia": (lambda: aliasfused.compat.kornia.BlurPool2D(4), (2, 3, 7, 8)),
    "kornia, maximum": (lambda: aliasfused.compat.kornia.MaxBlurPool2D(4, max_pool_size=3), (2, 3, 7, 8)),
    "kornia, maximum of unequal sides": (lambda: aliasfused.compat.kornia.MaxBlurPool2D(3, 2, (2, 3)), (2, 3, 7, 8)),
    "maximum": (lambda: aliasfused.nn.MaxBlurPool2d(3, max_padding=1), (2, 3, 7, 8)),
    "activation": (lambda: aliasfused.nn.ActBlurPool2d("gelu"), (3, 7, 8)),
}


@pytest.mark.parametrize("name", SCRIPTED)
def test_scripted_for_inference(name):
    make, shape = SCRIPTED[name]
    module, x = make(), torch.randn(shape)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Sequential(module)), file)
    file.seek(0)
    with torch.no_grad():
        assert_agree(torch.jit.load(file)(x), module(x), bound(x, 49))


@pytest.mark.parametrize("transform", [torch.jit.script, torch.fx.symbolic_trace])
def test_float64_stays_float64(transform):
    module = BlurPool2d(2, 4, learnable="normalised", dtype=torch.float64)
    x = torch.randn(1, 2, 6, 7, dtype=torch.float64)
    with torch.no_grad():
        assert_agree(transform(module)(x), module(x), bound(x, 16))


@pytest.mark.parametrize("name", [name for name in SCRIPTED if "smaller" not in name])
def test_traced_and_run_at_another_size(name):
    make, shape = SCRIPTED[name]
    module = make()
    with torch.no_grad():
        traced = torch.jit.trace(module, torch.randn(shape))
        assert not any("aliasfused" in node.kind() for node in traced.inlined_graph.nodes())
        x = torch.randn(*shape[:-1], shape[-1] + 5)
        assert_agree(traced(x), module(x), bound(x, 25))


@pytest.mark.parametrize("name", ["fixed", "learnable", "one axis, learnable", "timm"])
def test_training_a_scripted_module_is_refused(name):
    make, shape = SCRIPTED[name]
    scripted = torch.jit.script(make())
    x = torch.randn(shape)
    with pytest.raises(torch.jit.Error, match="a scripted blur is for inference"):
        scripted(x.requires_grad_())


@pytest.mark.parametrize("name", SCRIPTED)
def test_symbolically_traced_as_one_call(name):
    """torch.fx and what stands on it: feature extraction, quantisation."""
    make, shape = SCRIPTED[name]
    module, x = make(), torch.randn(shape)
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.ReLU(), module))
    assert_agree(traced(x), module(x.relu()), 0.0)


# --- copies, casts, devices, processes -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTED)
@pytest.mark.parametrize("twin", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_give_the_same(name, twin):
    make, shape = SCRIPTED[name]
    module, x = make(), torch.randn(shape)
    assert torch.equal(twin(module)(x), module(x))


@pytest.mark.parametrize("x_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("learnable", [False, True])
def test_autocast_gives_a_convolutions_dtype(x_dtype, autocast, learnable):
    x = torch.randn(1, 2, 6, 6).to(x_dtype)
    module = BlurPool2d(2, 3, learnable=learnable)
    with torch.autocast("cpu", dtype=autocast):
        expected = F.conv2d(x, torch.ones(2, 1, 3, 3, dtype=x_dtype), groups=2).dtype
        y = module(x)
    assert y.dtype is expected
    values = convolved(x.to(expected).double(), pascal(3), pascal(3), 2, same(3, 3), "reflect").to(expected)
    assert_agree(y, values, bound(x.to(expected), 9))


def test_autocast_trains_learned_taps_in_their_own_dtype():
    module = BlurPool2d(2, 3, learnable=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        module(torch.randn(1, 2, 6, 6)).sum().backward()
    assert module.taps_h.grad.dtype is torch.float32


@pytest.mark.parametrize("name", SCRIPTED)
def test_meta_tensors_have_the_shape_and_strides(name):
    make, shape = SCRIPTED[name]
    module = make()
    formats = [torch.contiguous_format] + [torch.channels_last] * (len(shape) == 4)
    for memory_format in formats:
        x = torch.randn(shape).contiguous(memory_format=memory_format)
        y, meta = module(x), module.to("meta")(x.to("meta"))
        assert meta.is_meta and (meta.shape, meta.stride(), meta.dtype) == (y.shape, y.stride(), y.dtype)
        module = make()


def distributed_network() -> nn.Module:
    torch.manual_seed(1)
    blurs = [BlurPool2d(3, 4, learnable=True), aliasfused.compat.antialiased_cnns.BlurPool(3, filt_size=3)]
    return nn.Sequential(nn.Conv2d(3, 3, 3), *blurs, BlurPool2d(None, 3, learnable="normalised")).double()


def distributed_step(network: nn.Module, x: torch.Tensor) -> None:
    network(x).square().mean(dim=(1, 2, 3)).mean().backward()


def distributed_worker(rank: int, store: str, x: torch.Tensor, results) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    network = nn.parallel.DistributedDataParallel(distributed_network())
    for _ in range(2):  # the second step rebuilds buckets and broadcasts the buffers
        network.zero_grad()
        distributed_step(network, x[rank::2])
    results.put((rank, [p.grad.numpy() for p in network.parameters()]))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is built without torch.distributed")
def test_two_processes_get_the_gradient_of_one(tmp_path):
    x = torch.randn(4, 3, 17, 18, dtype=torch.float64)
    network = distributed_network()
    distributed_step(network, x)
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    workers = torch.multiprocessing.spawn(distributed_worker, (str(tmp_path / "store"), x, results), 2, join=False)
    while not workers.join():
        pass
    for _, grads in (results.get(), results.get()):
        for p, grad in zip(network.parameters(), grads, strict=True):
            assert_agree(torch.from_numpy(grad), p.grad, tolerance([p.grad]))
