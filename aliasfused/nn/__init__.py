"""Modules: a constructor, one call."""

from .adaptive_blur_pool import AdaptiveBlurPool2d
from .blur_pool import BlurPool1d, BlurPool2d
from .bn_blur_pool import BNActBlurPool2d
from .max_blur_pool import ActBlurPool2d, MaxBlurPool2d

__all__ = ["ActBlurPool2d", "AdaptiveBlurPool2d", "BNActBlurPool2d", "BlurPool1d", "BlurPool2d", "MaxBlurPool2d"]
