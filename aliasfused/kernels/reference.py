"""The truth, and the baseline.

The truth writes each axis as a dense float64 matrix, so that the adjoint is a transpose and is never derived twice.
The baseline is what everybody runs without this library, F.pad and a depthwise F.conv2d: the benchmark's peer, and the form
in which the op leaves PyTorch (ONNX, TorchScript).
"""

from __future__ import annotations

import functools
from typing import List, Optional  # noqa: UP035  (TorchScript reads these annotations)

import torch
import torch.nn.functional as F


def _source(t: torch.Tensor, n: int, pad_mode: str) -> torch.Tensor:
    """Index of x shown at position t of the extended axis; -1 where that is zero."""
    if pad_mode == "reflect":
        period = max(2 * (n - 1), 1)
        t = t.remainder(period)
        return torch.minimum(t, period - t)
    if pad_mode == "replicate":
        return t.clamp(0, n - 1)
    if pad_mode == "circular":
        return t.remainder(n)
    return torch.where((t >= 0) & (t < n), t, -1)


@functools.lru_cache(maxsize=64)
def _selection(n: int, before: int, after: int, k: int, stride: int, pad_mode: str) -> torch.Tensor:
    """(k, out, in) of zeros and ones: tap p of output o reads input h."""
    out = (n + before + after - k) // stride + 1
    index = _source(torch.arange(k)[:, None] + stride * torch.arange(out) - before, n, pad_mode)
    return (index[..., None] == torch.arange(n)).double()


def _axes(shape, size_h, size_w, stride, padding, pad_mode, device):
    left, right, top, bottom = padding
    rows = _selection(int(shape[-2]), top, bottom, size_h, stride[0], pad_mode)
    cols = _selection(int(shape[-1]), left, right, size_w, stride[1], pad_mode)
    return rows.to(device), cols.to(device)


def _matrix(taps, selection: torch.Tensor) -> torch.Tensor:
    """(1, out, in), or (C, out, in) for taps per channel."""
    taps = torch.as_tensor(taps, dtype=torch.float64, device=selection.device).view(-1, selection.shape[0])
    return torch.tensordot(taps, selection, 1)


def _like(value: torch.Tensor, x: torch.Tensor, channels_last: bool) -> torch.Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty(value.shape, dtype=x.dtype, device=x.device, memory_format=memory_format)
    return out.copy_(value)


def blur_pool_fwd(x, taps_h, taps_w, stride, padding, pad_mode):
    sizes = torch.as_tensor(taps_h).shape[-1], torch.as_tensor(taps_w).shape[-1]
    rows, cols = _axes(x.shape, *sizes, stride, padding, pad_mode, x.device)
    y = _matrix(taps_h, rows) @ x.double() @ _matrix(taps_w, cols).mT
    return _like(y, x, torch._prims_common.suggest_memory_format(x) is torch.channels_last)


def blur_pool_bwd(dy, taps_h, taps_w, stride, padding, pad_mode, H, W, channels_last):
    sizes = torch.as_tensor(taps_h).shape[-1], torch.as_tensor(taps_w).shape[-1]
    rows, cols = _axes((H, W), *sizes, stride, padding, pad_mode, dy.device)
    dx = _matrix(taps_h, rows).mT @ dy.double() @ _matrix(taps_w, cols)
    return _like(dx, dy, channels_last)


blur_pool_taps_fwd = blur_pool_fwd
blur_pool_taps_bwd = blur_pool_bwd


def blur_pool_taps_grad(dy, x, other, axis, size, stride, padding, pad_mode):
    sizes = (size, other.shape[-1]) if axis == 0 else (other.shape[-1], size)
    rows, cols = _axes(x.shape, *sizes, stride, padding, pad_mode, x.device)
    dy, x = dy.double(), x.double()
    if axis == 0:
        blurred = x @ _matrix(other, cols).mT
        grad = torch.einsum("ncij,pih,nchj->cp", dy, rows, blurred)
    else:
        blurred = _matrix(other, rows) @ x
        grad = torch.einsum("ncij,qjw,nciw->cq", dy, cols, blurred)
    return grad.to(other.dtype).contiguous()


def activation(u: torch.Tensor, act: str, args: List[float]) -> torch.Tensor:  # noqa: UP006
    """The activation that an op calls by this name."""
    if act == "relu":
        return F.relu(u)
    if act == "relu6":
        return F.relu6(u)
    if act == "silu":
        return F.silu(u)
    if act == "gelu":
        return F.gelu(u)
    if act == "gelu_tanh":
        return F.gelu(u, approximate="tanh")
    if act == "hardswish":
        # On a GPU the values of torch's own are no more accurate in float64 than in float32; its slope is, and right at corners.
        if u.dtype == torch.float64 and not u.requires_grad:
            return u * F.relu6(u + 3) / 6
        return F.hardswish(u)
    if act == "leaky_relu":
        return F.leaky_relu(u, args[0])
    if act == "softplus":
        return F.softplus(u, args[0], args[1])
    return u


def maximum(v: torch.Tensor, kernel: List[int], padding: List[int]) -> torch.Tensor:  # noqa: UP006
    """The dense maximum over a window, of v extended by -inf: (left, right, top, bottom)."""
    if kernel[0] == 1 and kernel[1] == 1:
        return v
    left, right, top, bottom = padding
    if left == right and top == bottom and 2 * left <= kernel[1] and 2 * top <= kernel[0]:
        return F.max_pool2d(v, [kernel[0], kernel[1]], [1, 1], [top, left])
    # torch's own padding is even on both sides. What it cannot say it can be shown.
    return F.max_pool2d(F.pad(v, padding, value=-float("inf")), [kernel[0], kernel[1]], [1, 1])


def prepared(
    x: torch.Tensor,
    affine: Optional[torch.Tensor],  # noqa: UP045
    act: str,
    act_args: List[float],  # noqa: UP006
    kernel: List[int],  # noqa: UP006
    max_padding: List[int],  # noqa: UP006
) -> torch.Tensor:
    """What a blur with a prologue blurs, in differentiable steps: affine and activation in at least float32."""
    z = x if x.dtype == torch.float64 or (affine is None and act == "none") else x.float()
    if affine is not None:
        center, scale, shift = affine[:, None, :, None, None].unbind()
        z = (z - center) * scale + shift
    return maximum(activation(z, act, act_args).to(x.dtype), kernel, max_padding)


def _differentiated(dy, x, affine, act, act_args, kernel, max_padding, taps_h, taps_w, stride, padding, pad_mode):
    """du and x - center in float64, u being what the activation is of."""
    with torch.inference_mode(False), torch.enable_grad():
        x = x.detach().to(torch.float64, copy=True)
        u, centred = x, x
        if affine is not None:
            center, scale, shift = affine.detach().double()[:, None, :, None, None].unbind()
            centred = x - center
            u = centred * scale + shift
        u = u.detach().requires_grad_()
        z = maximum(activation(u, act, act_args), kernel, max_padding)
        height, width = z.shape[2:]
        dz = blur_pool_bwd(dy.double(), taps_h, taps_w, stride, padding, pad_mode, height, width, False)
        (du,) = torch.autograd.grad(z, u, dz)
    return du, centred


def max_blur_pool_fwd(x, affine, act, act_args, kernel, max_padding, taps_h, taps_w, stride, padding, pad_mode):
    affine = None if affine is None else affine.double()
    z = prepared(x.double(), affine, act, act_args, kernel, max_padding)
    y = blur_pool_fwd(z, taps_h, taps_w, stride, padding, pad_mode)
    return _like(y, x, torch._prims_common.suggest_memory_format(x) is torch.channels_last)


def max_blur_pool_bwd(dy, x, affine, correction, *rest):
    du, centred = _differentiated(dy, x, affine, *rest)
    dx = du if affine is None else du * affine.double()[1, :, None, None]
    if correction is not None:
        shift, slope = correction.double()[:, None, :, None, None].unbind()
        dx = dx + shift + slope * centred
    return _like(dx, x, torch._prims_common.suggest_memory_format(x) is torch.channels_last)


def max_blur_pool_sums(dy, x, affine, *rest):
    du, centred = _differentiated(dy, x, affine, *rest)
    sums = torch.stack([du.sum((0, 2, 3)), (du * centred).sum((0, 2, 3))])
    return sums if x.dtype is torch.float64 else sums.float()


def logits_steps(logits: torch.Tensor, size, stride):
    """How far apart the logits of neighbouring outputs lie: the stride, where there are some for all positions of x, of ``size``."""
    return tuple(stride) if tuple(logits.shape[2:]) == tuple(size) else (1, 1)


def kept(logits: torch.Tensor, size, stride) -> torch.Tensor:
    """The logits of the outputs."""
    s_h, s_w = logits_steps(logits, size, stride)
    return logits if s_h == s_w == 1 else logits[:, :, ::s_h, ::s_w]


def filters_of(logits: torch.Tensor, kernel_size: int, groups: int, normalize: str) -> torch.Tensor:
    """The filters that logits stand for, (N, G, k^2, H', W'), in at least float32."""
    wide = logits if logits.dtype is torch.float64 else logits.float()
    w = wide.unflatten(1, (groups, kernel_size**2))
    if normalize == "none":
        return w
    return w.softmax(2) if normalize == "group" else wide.softmax(1).view_as(w)


def shown_to_taps(x, size, kernel_size, stride, groups, pad_mode, gather):
    """What every tap in turn shows to all outputs, of which there are ``size``: (N, G, C/G, H', W'), in at least float32."""
    radius = kernel_size // 2
    wide = x if x.dtype is torch.float64 else x.float()
    extended = extend(wide, [radius] * 4, pad_mode, gather).unflatten(1, (groups, x.shape[1] // groups))
    reach = [s * (n - 1) + 1 for s, n in zip(stride, size, strict=True)]
    for p in range(kernel_size):
        for q in range(kernel_size):
            yield extended[..., p : p + reach[0] : stride[0], q : q + reach[1] : stride[1]]


def adaptive_in_steps(x, logits, kernel_size, stride, groups, normalize, pad_mode, gather=None):
    """The adaptive blur of torch's own differentiable operations, tap by tap."""
    if gather is None:
        leaves = torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.onnx.is_in_onnx_export()
        gather = not leaves and kernel_size // 2 >= min(x.shape[2:])
    logits = kept(logits, x.shape[2:], stride)
    w = filters_of(logits, kernel_size, groups, normalize)
    shown = shown_to_taps(x, logits.shape[2:], kernel_size, stride, groups, pad_mode, gather)
    y = sum(w[:, :, None, tap] * pixels for tap, pixels in enumerate(shown)).flatten(1, 2).to(x.dtype)
    if torch.jit.is_tracing():  # sizes are tensors then
        return y
    return y.contiguous(memory_format=torch._prims_common.suggest_memory_format(x))


def _grids(size, kernel_size, stride, pad_mode, device):
    """(tap, rows, columns): which pixel of x a tap of every output reads, as matrices of zeros and ones."""
    radius = kernel_size // 2
    rows, cols = _axes((*size,), kernel_size, kernel_size, stride, [radius] * 4, pad_mode, device)
    return [(p * kernel_size + q, rows[p], cols[q]) for p in range(kernel_size) for q in range(kernel_size)]


def adaptive_blur_pool_fwd(x, logits, kernel_size, stride, groups, normalize, pad_mode):
    w = filters_of(kept(logits, x.shape[2:], stride).double(), kernel_size, groups, normalize)
    pixels = x.double().unflatten(1, (groups, x.shape[1] // groups))
    y = pixels.new_zeros((*pixels.shape[:3], *w.shape[3:]))
    for tap, rows, cols in _grids(x.shape[2:], kernel_size, stride, pad_mode, x.device):
        y += w[:, :, None, tap] * (rows @ pixels @ cols.mT)
    return _like(y.flatten(1, 2), x, torch._prims_common.suggest_memory_format(x) is torch.channels_last)


def adaptive_blur_pool_bwd(dy, logits, kernel_size, stride, groups, normalize, pad_mode, H, W, channels_last):
    w = filters_of(kept(logits, (H, W), stride).double(), kernel_size, groups, normalize)
    results = dy.double().unflatten(1, (groups, dy.shape[1] // groups))
    dx = results.new_zeros((*results.shape[:3], H, W))
    for tap, rows, cols in _grids((H, W), kernel_size, stride, pad_mode, dy.device):
        dx += rows.mT @ (w[:, :, None, tap] * results) @ cols
    return _like(dx.flatten(1, 2), dy, channels_last)


def adaptive_blur_pool_logits_grad(dy, x, logits, kernel_size, stride, groups, normalize, pad_mode):
    s_h, s_w = logits_steps(logits, x.shape[2:], stride)
    w = filters_of(logits[:, :, ::s_h, ::s_w].double(), kernel_size, groups, normalize)
    pixels, results = (t.double().unflatten(1, (groups, t.shape[1] // groups)) for t in (x, dy))
    dw = torch.zeros_like(w)
    for tap, rows, cols in _grids(x.shape[2:], kernel_size, stride, pad_mode, x.device):
        dw[:, :, tap] = (results * (rows @ pixels @ cols.mT)).sum(2)
    if normalize != "none":
        dw = w * (dw - (w * dw).sum(2 if normalize == "group" else (1, 2), keepdim=True))
    dlogits = torch.zeros(logits.shape, dtype=torch.float64, device=logits.device)
    dlogits[:, :, ::s_h, ::s_w] = dw.flatten(1, 2)
    return _like(dlogits, logits, torch._prims_common.suggest_memory_format(logits) is torch.channels_last)


def channel_moments(x):
    if x.numel() == 0:
        return x.new_zeros((3, x.shape[1]), dtype=torch.float64)
    count = x.numel() // x.shape[1]
    var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    return torch.stack([torch.full_like(mean, count), mean, var * count])


def batch_norm_table(mean, var, count, weight, bias, eps, wide):
    """Of differentiable operations, for whoever differentiates it."""
    mean, var = mean.double(), var.double()
    scale = ((var if count is None else var / count) + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    dtype = torch.float64 if wide else torch.float32
    center = mean.to(dtype)
    shift = (center - mean) * scale
    if bias is not None:
        shift = shift + bias
    return torch.stack([center, scale.to(dtype), shift.to(dtype)])


def batch_norm_follow(running_mean, running_var, num_batches_tracked, moments, momentum):
    factor = momentum
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
        if momentum is None:
            factor = num_batches_tracked.double().reciprocal()
    count, mean, m2 = moments
    for running, value in ((running_mean, mean), (running_var, m2 / (count - 1))):
        running.copy_(running.double() * (1 - factor) + value * factor)


def batch_norm_gradient(sums, moments, table, eps):
    (count, mean, m2), (center, scale, _), (first, second) = moments, table.double(), sums.double()
    count = count.clamp(min=1)  # an empty batch has gradients: zero
    invstd, off = (m2 / count + eps).rsqrt(), center - mean
    second = second + off * first
    slope = -scale * invstd.square() * second / count
    correction = torch.stack([slope * off - scale * first / count, slope])
    return tuple(t.to(table.dtype) for t in (correction, second * invstd, first))


def border_index(like: torch.Tensor, n: int, before: int, after: int, pad_mode: str) -> torch.Tensor:
    """Which of an axis' n pixels each position of its extension shows; zeros, which shows none beyond, has no index.

    Divisors are tensors because the ONNX exporter wants a symbolic size to be one.
    """
    t = torch.arange(n + before + after, device=like.device) - before
    if pad_mode == "reflect":
        # TorchScript has no sym_max, and the built-in max would fix a symbolic size while exporting.
        if torch.jit.is_scripting():
            period = max(2 * (n - 1), 1)
        else:
            period = torch.sym_max(2 * (n - 1), 1)
        t = t.remainder(torch.full_like(t, period))
        return torch.minimum(t, period - t)
    if pad_mode == "replicate":
        return t.clamp(0, n - 1)
    return t.remainder(torch.full_like(t, n))


def extend(x: torch.Tensor, padding: List[int], pad_mode: str, gather: bool = False) -> torch.Tensor:  # noqa: UP006
    """x with its border: F.pad, or with ``gather`` an index lookup that also serves maps smaller than the pad."""
    if max(padding) == 0:
        return x
    if pad_mode == "zeros":
        return F.pad(x, padding)
    if not gather:
        return F.pad(x, padding, mode=pad_mode)
    left, right, top, bottom = padding
    x = x.index_select(-2, border_index(x, x.shape[-2], top, bottom, pad_mode))
    return x.index_select(-1, border_index(x, x.shape[-1], left, right, pad_mode))


def unfused(
    x: torch.Tensor,
    taps_h: List[float],  # noqa: UP006
    taps_w: List[float],  # noqa: UP006
    stride: List[int],  # noqa: UP006
    padding: List[int],  # noqa: UP006
    pad_mode: str,
    gather: bool = False,
) -> torch.Tensor:
    """The blur as pad and depthwise convolution, from numbers."""
    channels = x.shape[1]
    if torch.jit.is_tracing():
        channels = int(channels)  # ONNX's older exporter wants the kernel's shape constant
    h = torch.tensor(taps_h, dtype=torch.float64, device=x.device)
    w = torch.tensor(taps_w, dtype=torch.float64, device=x.device)
    kernel = (h[:, None] * w).to(x.dtype).expand(channels, 1, len(taps_h), len(taps_w))
    return F.conv2d(extend(x, padding, pad_mode, gather), kernel, stride=stride, groups=channels)


def unfused_taps(
    x: torch.Tensor,
    taps_h: torch.Tensor,
    taps_w: torch.Tensor,
    stride: List[int],  # noqa: UP006
    padding: List[int],  # noqa: UP006
    pad_mode: str,
    gather: bool = False,
) -> torch.Tensor:
    """The blur as pad and depthwise convolution, from (C, k) tensors of taps."""
    kernel = (taps_h[:, :, None] * taps_w[:, None, :]).to(x.dtype)
    return F.conv2d(extend(x, padding, pad_mode, gather), kernel[:, None], stride=stride, groups=x.shape[1])


def status(device: str) -> tuple[str, str, str]:
    """Detail, reason why not, remedy: this backend runs wherever PyTorch does."""
    if device == "cuda" and torch.version.cuda is None:
        return (
            "float64 matrices",
            f"this torch ({torch.__version__}) was built without CUDA",
            "Install a CUDA build of torch",
        )
    return "float64 matrices", "", ""
