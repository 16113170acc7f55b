"""Anti-aliased downsampling, fused: the low-pass filter and the sampling in one pass, forward and backward."""

from . import filters
from .kernels import backends, use_backend
from .ops import blur_pool1d, blur_pool2d

__all__ = ["backends", "blur_pool1d", "blur_pool2d", "filters", "use_backend"]
