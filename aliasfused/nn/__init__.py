"""Modules: a constructor, one call."""

from .blur_pool import BlurPool1d, BlurPool2d

__all__ = ["BlurPool1d", "BlurPool2d"]
