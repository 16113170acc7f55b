"""The shared object: importing it registers the kernels."""

def info() -> str:
    """What was built, as ``device=detail;device=detail``."""
