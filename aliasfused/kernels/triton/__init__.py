"""Triton kernels (work in progress placeholder)."""


def status(device: str) -> tuple[str, str, str]:
    return "", "it is not written yet", ""
