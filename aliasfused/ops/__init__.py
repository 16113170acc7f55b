"""The rooms: one file an op, with its schema, checks, autograd and public functions."""

from ..kernels import install_default
from .blur_pool import blur_pool1d, blur_pool2d

__all__ = ["blur_pool1d", "blur_pool2d"]

install_default()
