"""Modules: a constructor, one call."""

from .blur_pool import BlurPool1d, BlurPool2d
from .max_blur_pool import ActBlurPool2d, MaxBlurPool2d

__all__ = ["ActBlurPool2d", "BlurPool1d", "BlurPool2d", "MaxBlurPool2d"]
