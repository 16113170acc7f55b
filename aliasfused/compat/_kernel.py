"""Blurs whose taps stand in a buffer, as other libraries keep them, and are read from it when it changes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .. import filters
from ..nn._blur import Blur2d
from ..ops._window import Padding, Stride, Window, window2d

Rows = tuple[tuple[float, ...], tuple[float, ...]]


def outer(rows: Rows) -> torch.Tensor:
    """The (kh, kw) kernel of two rows, in float64 on the CPU."""
    h, w = (torch.tensor(row, dtype=torch.float64, device="cpu") for row in rows)
    return h[:, None] * w


def read_rows(kernel: torch.Tensor, key: str) -> Rows:
    """The rows (h, w) of a depthwise kernel (C, 1, kh, kw) or (C, 1, k), or of one plane (kh, kw).

    1. the channels must agree;
    2. a kernel that is the binomial one, as its dtype holds it, gives the exact binomial rows; so does one without
       values (on the meta device), which is yet to be written;
    3. any other is split by :func:`aliasfused.filters.factor`; one of a single axis is taken as it is.

    Raises:
        ValueError: naming the key of the state_dict: channels differ, not finite, or not separable.
    """
    if kernel.dim() == 3:
        kernel = kernel.unsqueeze(-2)
    binomial = filters.binomial(kernel.shape[-2]), filters.binomial(kernel.shape[-1])
    if kernel.is_meta or kernel.numel() == 0:
        return binomial
    planes = kernel.detach().cpu().flatten(0, -3) if kernel.dim() > 2 else kernel.detach().cpu()[None]
    if not bool(torch.isfinite(planes).all()):
        raise ValueError(f"{key}: the taps must be finite, got inf or nan")
    if not bool((planes == planes[0]).all()):
        raise ValueError(f"{key}: one filter for all channels is needed, but its channels differ")
    if torch.equal(planes[0], outer(binomial).to(kernel.dtype)):
        return binomial
    if kernel.shape[-2] == 1:
        return (1.0,), tuple(planes[0, 0].tolist())
    try:
        return filters.factor(planes[0])
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


class KernelBlur(Blur2d):
    """A blur with its kernel in a buffer, read at construction, assignment and load_state_dict, never in a call.

    A write into the buffer in place is not seen until :meth:`refresh_taps`. Casting the module casts the buffer and
    leaves the taps as they were read.
    """

    if TYPE_CHECKING:  # as real annotations TorchScript would refuse them
        filt: torch.Tensor
        stride: Any
        pad: Any

    _kernel = "filt"
    _watched = frozenset({"stride", "padding", "pad_mode", "pad"})

    def _geometry(self) -> tuple[Stride, Padding, Any]:
        """Stride, padding and pad_mode as :func:`aliasfused.blur_pool2d` takes them, from the library's attributes."""
        raise NotImplementedError

    def _start(
        self, rows: Rows, planes: tuple[int, ...], persistent: bool, device: Any = None, dtype: Any = None
    ) -> None:
        kernel = outer(rows).to(device or torch.get_default_device(), dtype or torch.get_default_dtype())
        self.register_buffer(self._kernel, kernel.expand(*planes, *kernel.shape).clone(), persistent=persistent)
        self._window = window2d(rows, *self._geometry())

    def _read(self, kernel: torch.Tensor, key: str) -> Window:
        return window2d(read_rows(kernel, key), *self._geometry())

    def refresh_taps(self) -> None:
        """Read the taps from the buffer again, after it was written in place.

        Raises:
            ValueError: as for :func:`read_rows`; the taps then stay as they were.
        """
        self._window = self._read(getattr(self, self._kernel), self._kernel)

    def register_buffer(self, name: str, tensor: torch.Tensor | None, persistent: bool = True) -> None:
        super().register_buffer(name, tensor, persistent)
        if name == self._kernel and "_window" in self.__dict__ and "_is_replica" not in self.__dict__:
            self.refresh_taps()

    def __setattr__(self, name: str, value: Any) -> None:
        known: Window | None = self.__dict__.get("_window")
        rows = known and known[:2]
        # DataParallel assigns copies of the buffer in every call; they are what was read already.
        if known and name == self._kernel and isinstance(value, torch.Tensor) and "_is_replica" not in self.__dict__:
            shape = getattr(self, name).shape
            if value.dim() != len(shape) or (len(shape) > 2 and value.shape[0] != shape[0]):
                raise ValueError(f"{name}: expected a filter like {tuple(shape)}, got shape {tuple(value.shape)}")
            rows = read_rows(value, name)  # first, so that a refusal leaves the buffer as it was
        former = self.__dict__.get(name)
        super().__setattr__(name, value)
        if rows and (name == self._kernel or name in self._watched):
            try:
                self._window = window2d(rows, *self._geometry())
            except (TypeError, ValueError):
                if name in self._watched and former is not None:
                    self.__dict__[name] = former
                raise

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):  # type: ignore[no-untyped-def]
        before, key = len(errors), prefix + self._kernel
        buffer = self._buffers.get(self._kernel)
        values = None if buffer is None else buffer.clone()
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        if key in state_dict and self._kernel not in self._non_persistent_buffers_set and len(errors) == before:
            try:
                self._window = self._read(state_dict[key], key)
            except ValueError as error:  # the buffer is then as it was, too
                errors.append(str(error))
                if buffer is not None and values is not None:
                    buffer.copy_(values)
                    self._buffers[self._kernel] = buffer
