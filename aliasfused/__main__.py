"""``python -m aliasfused``: which implementations are built, for what, which are missing, why, and what mends it."""

from __future__ import annotations

from .kernels import Backend, backends

_TITLES = ("backend", "device", "available", "default", "detail", "reason", "remedy")


def _cells(backend: Backend) -> tuple[str, ...]:
    return tuple(("yes" if cell else "no") if isinstance(cell, bool) else cell or "-" for cell in backend)


def table() -> str:
    """A line per backend and device, in columns."""
    rows = [_TITLES, *(_cells(backend) for backend in backends())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


if __name__ == "__main__":
    print(table())
