"""Anti-aliased downsampling, fused: the low-pass filter and the sampling in one pass, forward and backward."""

from . import compat, filters, nn
from .kernels import backends, use_backend
from .ops import blur_pool1d, blur_pool2d
from .ops.decompositions import decompositions
from .surgery import accelerate

__all__ = [
    "accelerate",
    "backends",
    "blur_pool1d",
    "blur_pool2d",
    "compat",
    "decompositions",
    "filters",
    "nn",
    "use_backend",
]
