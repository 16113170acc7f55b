"""The Triton kernels. Triton is imported when one of them is first asked for, not before."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
from typing import Any

import torch

_OPS = {
    "blur_pool": ("blur_pool_fwd", "blur_pool_bwd", "blur_pool_taps_fwd", "blur_pool_taps_bwd", "blur_pool_taps_grad"),
    "max_blur_pool": ("max_blur_pool_fwd", "max_blur_pool_bwd", "max_blur_pool_sums"),
    "channel_moments": ("channel_moments",),
    "batch_norm": ("batch_norm_table", "batch_norm_follow", "batch_norm_gradient"),
    "adaptive_blur_pool": ("adaptive_blur_pool_fwd", "adaptive_blur_pool_bwd", "adaptive_blur_pool_logits_grad"),
}


def find(op: str) -> Any:
    """The function of an op. It is no attribute, as an op may have the name of its module."""
    module = next(module for module, ops in _OPS.items() if op in ops)
    return getattr(importlib.import_module(f".{module}", __name__), op)


@functools.cache
def _version() -> str:
    """Of the installed triton, or empty; asked of its metadata, as importing it takes a third of a second."""
    if importlib.util.find_spec("triton") is None:
        return ""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def status(device: str) -> tuple[str, str, str]:
    """Detail, reason why not, remedy."""
    if not _version():
        return "", "triton is not installed", "Install it with: pip install triton"
    detail = f"triton {_version()}"
    if device == "cpu" and not _interpreted():
        remedy = "Set TRITON_INTERPRET=1 before the first import of triton"
        return detail, "Triton runs on CPU tensors in its interpreter only", remedy
    if device == "cuda" and torch.version.cuda is None:
        remedy = "Install a CUDA build of torch"
        return detail, f"this torch ({torch.__version__}) was built without CUDA", remedy
    return detail, "", ""
