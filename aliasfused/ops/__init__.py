"""The rooms: one file an op, with its schema, checks, autograd and public functions."""

from ..kernels import install_default
from .adaptive_blur_pool import adaptive_blur_pool2d
from .blur_pool import blur_pool1d, blur_pool2d
from .max_blur_pool import act_blur_pool2d, max_blur_pool2d

__all__ = ["act_blur_pool2d", "adaptive_blur_pool2d", "blur_pool1d", "blur_pool2d", "max_blur_pool2d"]

install_default()
