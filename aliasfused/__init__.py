"""Anti-aliased downsampling, fused: the low-pass filter and the sampling in one pass, forward and backward."""

from . import compat, filters, metrics, nn
from .kernels import backends, use_backend
from .ops import act_blur_pool2d, adaptive_blur_pool2d, blur_pool1d, blur_pool2d, max_blur_pool2d
from .ops.decompositions import decompositions
from .surgery import accelerate

__all__ = [
    "accelerate",
    "act_blur_pool2d",
    "adaptive_blur_pool2d",
    "backends",
    "blur_pool1d",
    "blur_pool2d",
    "compat",
    "decompositions",
    "filters",
    "max_blur_pool2d",
    "metrics",
    "nn",
    "use_backend",
]
