"""The names other libraries know their blurs by: a module each, its rules kept to the pixel, nothing imported."""

from . import adaptive, antialiased_cnns, composer, kornia, timm

__all__ = ["adaptive", "antialiased_cnns", "composer", "kornia", "timm"]
