"""What every kernel here does around its sums: place a tile of the result, load and store rows of pixels, fetch taps."""

# mypy: disable-error-code="assignment"
# (kernels grow tuples, which the kernel language types one by one)

from __future__ import annotations

import triton
import triton.language as tl

from .window import source


@triton.jit
def identity(value, channel):
    return value


@triton.jit
def place(
    total, channels, strips, groups,
    CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Image, channel, strip of rows and group of columns of each element of this program's ROWS x COLS tile.

    The tile lies in (n c strip, group), or in (n strip group, c): small planes share a program, whatever their size.
    """
    columns = channels // ALIGN * ALIGN if CHANNELS_LAST else groups  # says that channels is a multiple
    blocks = tl.cdiv(columns, COLS)
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64 if WIDE else tl.int32) * ROWS + tl.arange(0, ROWS)[:, None]
    column = pid % blocks * COLS + tl.arange(0, COLS)[None, :]
    inside = (row < total) & (column < columns)
    if CHANNELS_LAST:
        n = row // groups // strips
        return n.to(tl.int64), column.to(tl.int64), row // groups % strips, row % groups, inside
    else:
        plane = row // strips
        return (plane // channels).to(tl.int64), (plane % channels).to(tl.int64), row % strips, column, inside


@triton.jit
def load(x, offset, inside, channel, ALIGN: tl.constexpr, ACC: tl.constexpr, PRE: tl.constexpr):
    """Pixels, prepared; zero where not inside."""
    if ALIGN > 1:
        offset = tl.multiple_of(offset, (1, ALIGN))
    value = PRE(tl.load(x + offset, mask=inside, other=0.0).to(ACC), channel)
    return tl.where(inside, value, 0.0)


@triton.jit
def load_row(
    x, offset, w_stride, first, width, inside, channel,
    BEGIN: tl.constexpr, END: tl.constexpr, SPAN: tl.constexpr, ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BORDER: tl.constexpr, ACC: tl.constexpr, PRE: tl.constexpr,
):  # fmt: skip
    """Pixels first + BEGIN ... first + END - 1 of the extended row at ``offset``, as a tuple of tuples of one."""
    VECTOR: tl.constexpr = not CHANNELS_LAST and ALIGN == SPAN and SPAN > 1
    if VECTOR:
        within = inside & (first < width)
        wide = offset[:, :, None] + first.to(tl.int64)[:, :, None] + tl.arange(0, SPAN)[None, None, :]
        wide = tl.multiple_of(wide, (1, 1, SPAN))
        span = unpack(tl.load(x + wide, mask=within[:, :, None], other=0.0), SPAN)
    pixels = ()
    for e in tl.static_range(BEGIN, END):
        if VECTOR and (e >= 0 and e < SPAN):
            within_e = within
            pixel = span[e]
        else:
            w = source(first + e, width, BORDER, True)
            within_e = inside & (w >= 0) & (w < width)
            at = offset + w.to(tl.int64) * w_stride
            if CHANNELS_LAST and ALIGN > 1:
                at = tl.multiple_of(at, (1, ALIGN))
            pixel = tl.load(x + at, mask=within_e, other=0.0)
        pixel = PRE(pixel.to(ACC), channel)
        if BORDER == "zeros":
            pixel = tl.where(within_e, pixel, 0.0)  # zero after the preparation, not before it
        pixels = pixels + ((pixel,),)
    return pixels


@triton.jit
def store_row(
    y, offset, w_stride, first, width, inside, values,
    SPAN: tl.constexpr, ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Round and store a tuple of SPAN pixels from column ``first`` on."""
    if not CHANNELS_LAST and ALIGN == SPAN and SPAN > 1:
        wide = offset[:, :, None] + first.to(tl.int64)[:, :, None] + tl.arange(0, SPAN)[None, None, :]
        wide = tl.multiple_of(wide, (1, 1, SPAN))
        within = (inside & (first < width))[:, :, None]
        tl.store(y + wide, pack(values, SPAN).to(y.dtype.element_ty), mask=within)
    else:
        for e in tl.static_range(SPAN):
            at = offset + (first + e).to(tl.int64) * w_stride
            if CHANNELS_LAST and ALIGN > 1:
                at = tl.multiple_of(at, (1, ALIGN))
            tl.store(y + at, values[e].to(y.dtype.element_ty), mask=inside & (first + e < width))


@triton.jit
def unpack(span, SPAN: tl.constexpr):
    """(R, T, SPAN) as SPAN tensors (R, T), without leaving registers: each split halves the stride of what is left."""
    ROWS: tl.constexpr = span.shape[0]
    COLS: tl.constexpr = span.shape[1]
    parts = (span,)
    for level in tl.static_range(4):
        if SPAN >> level > 1:
            even = ()
            odd = ()
            for r in tl.static_range(1 << level):
                halves = tl.split(tl.reshape(parts[r], (ROWS, COLS, SPAN >> (level + 1), 2)))
                even = even + (halves[0],)
                odd = odd + (halves[1],)
            parts = even + odd
    pixels = ()
    for r in tl.static_range(SPAN):
        pixels = pixels + (tl.reshape(parts[r], (ROWS, COLS)),)
    return pixels


@triton.jit
def pack(parts, SPAN: tl.constexpr):
    """The inverse of unpack."""
    ROWS: tl.constexpr = parts[0].shape[0]
    COLS: tl.constexpr = parts[0].shape[1]
    for level in tl.static_range(4):
        if SPAN >> level > 1:
            joined = ()
            for r in tl.static_range(SPAN >> (level + 1)):
                pair = tl.join(parts[r], parts[r + (SPAN >> (level + 1))])
                joined = joined + (tl.reshape(pair, (ROWS, COLS, 2 << level)),)
            parts = joined
    return parts[0]


@triton.jit
def all_taps(a, channel, c_stride, k_stride, channels, TAPS: tl.constexpr, K: tl.constexpr, ACC: tl.constexpr):
    """A row of taps as a tuple: the numbers TAPS, or where TAPS is None what tensor ``a`` holds for each channel."""
    taps = ()
    for p in tl.static_range(K):
        if TAPS is None:
            taps = taps + (tl.load(a + channel * c_stride + p * k_stride, mask=channel < channels, other=0.0).to(ACC),)
        else:
            taps = taps + (tl.full((1, 1), TAPS[p], ACC),)
    return taps


@triton.jit
def tap(a, p, channel, c_stride, k_stride, inside, TAPS: tl.constexpr, ACC: tl.constexpr):
    """Tap p, a run-time number. Compile-time taps are chosen among by comparison, so that they need no memory."""
    if TAPS is None:
        return tl.load(a + channel * c_stride + p * k_stride, mask=inside, other=0.0).to(ACC)
    else:
        value = tl.full((1, 1), 0.0, ACC)
        for i in tl.static_range(len(TAPS)):
            value = tl.where(p == i, tl.full((1, 1), TAPS[i], ACC), value)
        return value
