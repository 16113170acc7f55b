"""Whole models: what is inside them is exchanged for the fused form."""

from .exchange import Report, Row, accelerate

__all__ = ["Report", "Row", "accelerate"]
