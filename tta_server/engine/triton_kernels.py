"""Triton kernels of the segment batch norm, explained in ``triton_norm.py``, which imports this where there is triton.

Each program works on one *chunk*, some neighbouring rows of one stream, and ``BC`` channels, in tiles of ``BL`` values
by ``BC`` channels. ``chunks [P, 6]`` (int32) says of each chunk its first row and how many it has, its stream, that
stream's first chunk, how many chunks it has and how many rows. ``LAST``: channels lie side by side in memory, else a
channel's positions. Sums are of type ``ACC``.

What a program adds up, and in which order, depends on its stream's rows alone. Neither the number of rows in the batch
nor that of streams is an argument that kernels are specialised for.
"""
# Triton may not be installed, and has no types where it is; its compiler knows no annotations but tl.constexpr.
# mypy: disable-error-code="import-not-found, import-untyped, no-any-return"
# mypy: disallow-untyped-decorators=False, disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-calls=False

from __future__ import annotations

import triton
import triton.language as tl

_PARTS = tl.constexpr(32)
"""Chunks that are added up at a time."""


@triton.jit
def _tile(start, values, channel, C, L, LAST: tl.constexpr, BL: tl.constexpr):
    """Where the values from ``start`` on lie, from the chunk's first on, and which of them there are."""
    value = start + tl.arange(0, BL)
    there = (value < values)[:, None] & (channel < C)[None, :]
    if LAST:
        place = value[:, None] * C + channel[None, :]
    else:
        place = ((value // L) * C * L + value % L)[:, None] + channel[None, :] * L
    return place, there


@triton.jit
def _sum(partial, which, before, count, channel, C, ACC: tl.constexpr):
    """Of a stream's partial sums, ``[channels]``."""
    total = tl.zeros([_PARTS, channel.shape[0]], ACC)
    for start in range(0, count, _PARTS):
        part = start + tl.arange(0, _PARTS)
        there = (part < count)[:, None] & (channel < C)[None, :]
        total += tl.load(partial + (2 * (before + part) + which)[:, None] * C + channel[None, :], mask=there, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _weight(rows, L, weight, prior, UNBIASED: tl.constexpr, ACC: tl.constexpr):
    """``w`` and ``k`` of a stream of so many rows."""
    values = (rows * L).to(ACC)
    w = tl.where(prior > 0, rows.to(ACC) / tl.maximum(rows + prior, 1.0), weight)
    w = tl.where(values > 1, w, 0.0)
    k = values / tl.maximum(values - 1, 1.0) if UNBIASED else values / tl.maximum(values, 1.0)
    return w, k


@triton.jit
def _mix(reference, batch, w):
    """``(1 - w) reference + w batch``, exact for ``w`` of 0 and of 1."""
    gap = batch - reference
    return tl.where(w < 0.5, reference + w * gap, batch - (1 - w) * gap)


@triton.jit
def moments(
    x,
    chunks,
    partial,
    C,
    L,
    LAST: tl.constexpr,
    BL: tl.constexpr,
    BC: tl.constexpr,
    ACC: tl.constexpr,
):
    """``partial [P, 2, C]``: each chunk's sum of ``x``, and sum of squares of ``x`` less its mean in the chunk."""
    chunk = tl.program_id(0)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    x += tl.load(chunks + 6 * chunk).to(tl.int64) * C * L
    values = tl.load(chunks + 6 * chunk + 1) * L
    total = tl.zeros([BL, BC], ACC)
    for start in range(0, values, BL):
        place, there = _tile(start, values, channel, C, L, LAST, BL)
        total += tl.load(x + place, mask=there, other=0.0).to(ACC)
    sums = tl.sum(total, 0)
    mean = sums / tl.maximum(values, 1).to(ACC)
    total = tl.zeros([BL, BC], ACC)
    for start in range(0, values, BL):
        place, there = _tile(start, values, channel, C, L, LAST, BL)
        gap = tl.where(there, tl.load(x + place, mask=there, other=0.0).to(ACC) - mean[None, :], 0.0)
        total += gap * gap
    tl.store(partial + 2 * chunk * C + channel, sums, mask=channel < C)
    tl.store(partial + (2 * chunk + 1) * C + channel, tl.sum(total, 0), mask=channel < C)


@triton.jit(
    do_not_specialize=["most", "gamma_step", "beta_step", "mean_step", "var_step"],
    do_not_specialize_on_alignment=["gamma", "beta", "reference_mean", "reference_var"],
)
def normalise(
    x,
    y,
    gamma,
    beta,
    reference_mean,
    reference_var,
    gamma_step,
    beta_step,
    mean_step,
    var_step,
    chunks,
    partial,
    kept,
    used_mean,
    used_var,
    most,
    weight,
    prior,
    eps,
    C,
    L,
    UNBIASED: tl.constexpr,
    LAST: tl.constexpr,
    BL: tl.constexpr,
    BC: tl.constexpr,
    ACC: tl.constexpr,
):
    """``y``; of each stream ``kept [S, 3, C]``, which are ``mu``, ``r`` and ``m``, and the statistics used.

    Chunks have at most ``most`` rows. The steps lead from one stream's tensor to the next one's, 0 where it is shared.
    """
    chunk = tl.program_id(0)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    there = channel < C
    first, own = tl.load(chunks + 6 * chunk).to(tl.int64), tl.load(chunks + 6 * chunk + 1)
    stream, before = tl.load(chunks + 6 * chunk + 2), tl.load(chunks + 6 * chunk + 3)
    count, rows = tl.load(chunks + 6 * chunk + 4), tl.load(chunks + 6 * chunk + 5)

    values = tl.maximum(rows * L, 1).to(ACC)
    m = _sum(partial, 0, before, count, channel, C, ACC) / values
    spread = tl.zeros([_PARTS, BC], ACC)
    for start in range(0, count, _PARTS):
        part = start + tl.arange(0, _PARTS)
        inside = (part < count)[:, None] & there[None, :]
        size = (tl.maximum(tl.minimum(rows - part * most, most), 1) * L).to(ACC)[:, None]
        place = (2 * (before + part))[:, None] * C + channel[None, :]
        gap = tl.load(partial + place, mask=inside, other=0.0) / size - m[None, :]
        squares = tl.load(partial + place + C, mask=inside, other=0.0)
        spread += tl.where(inside, squares + size * gap * gap, 0.0)
    v = tl.sum(spread, 0) / values

    w, k = _weight(rows, L, weight, prior, UNBIASED, ACC)
    mean = tl.load(reference_mean + stream * mean_step + channel, mask=there, other=0.0).to(ACC)
    var = tl.load(reference_var + stream * var_step + channel, mask=there, other=1.0).to(ACC)
    mean, var = _mix(mean, m, w), _mix(var, k * v, w)
    r = 1 / tl.sqrt(var + eps)
    if chunk == before:
        tl.store(kept + 3 * stream * C + channel, mean, mask=there)
        tl.store(kept + (3 * stream + 1) * C + channel, r, mask=there)
        tl.store(kept + (3 * stream + 2) * C + channel, m, mask=there)
        tl.store(used_mean + stream * C + channel, mean, mask=there)
        tl.store(used_var + stream * C + channel, var, mask=there)

    a = tl.load(gamma + stream * gamma_step + channel, mask=there, other=0.0).to(ACC) * r
    b = tl.load(beta + stream * beta_step + channel, mask=there, other=0.0).to(ACC)
    x += first * C * L
    y += first * C * L
    for start in range(0, own * L, BL):
        place, inside = _tile(start, own * L, channel, C, L, LAST, BL)
        one = tl.load(x + place, mask=inside, other=0.0).to(ACC) - mean[None, :]
        tl.store(y + place, one * a[None, :] + b[None, :], mask=inside)


@triton.jit
def slopes(
    x,
    g,
    chunks,
    kept,
    partial,
    C,
    L,
    LAST: tl.constexpr,
    BL: tl.constexpr,
    BC: tl.constexpr,
    ACC: tl.constexpr,
):
    """``partial [P, 2, C]``: each chunk's sums of ``g`` and of ``g (x - mu)``."""
    chunk = tl.program_id(0)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    x += tl.load(chunks + 6 * chunk).to(tl.int64) * C * L
    g += tl.load(chunks + 6 * chunk).to(tl.int64) * C * L
    values, stream = tl.load(chunks + 6 * chunk + 1) * L, tl.load(chunks + 6 * chunk + 2)
    mean = tl.load(kept + 3 * stream * C + channel, mask=channel < C, other=0.0)
    sums, products = tl.zeros([BL, BC], ACC), tl.zeros([BL, BC], ACC)
    for start in range(0, values, BL):
        place, there = _tile(start, values, channel, C, L, LAST, BL)
        slope = tl.load(g + place, mask=there, other=0.0).to(ACC)
        sums += slope
        gap = tl.load(x + place, mask=there, other=0.0).to(ACC) - mean[None, :]
        products += tl.where(there, slope * gap, 0.0)
    tl.store(partial + 2 * chunk * C + channel, tl.sum(sums, 0), mask=channel < C)
    tl.store(partial + (2 * chunk + 1) * C + channel, tl.sum(products, 0), mask=channel < C)


@triton.jit(do_not_specialize=["gamma_step"], do_not_specialize_on_alignment=["gamma"])
def differentiate(
    x,
    g,
    g_x,
    g_gamma,
    g_beta,
    gamma,
    gamma_step,
    chunks,
    partial,
    kept,
    weight,
    prior,
    C,
    L,
    UNBIASED: tl.constexpr,
    WRITE: tl.constexpr,
    LAST: tl.constexpr,
    BL: tl.constexpr,
    BC: tl.constexpr,
    ACC: tl.constexpr,
):
    """``g_gamma`` and ``g_beta``, ``[S, C]``, and with ``WRITE`` ``g_x``."""
    chunk = tl.program_id(0)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    there = channel < C
    first, own = tl.load(chunks + 6 * chunk).to(tl.int64), tl.load(chunks + 6 * chunk + 1)
    stream, before = tl.load(chunks + 6 * chunk + 2), tl.load(chunks + 6 * chunk + 3)
    count, rows = tl.load(chunks + 6 * chunk + 4), tl.load(chunks + 6 * chunk + 5)

    total = _sum(partial, 0, before, count, channel, C, ACC)
    product = _sum(partial, 1, before, count, channel, C, ACC)
    r = tl.load(kept + (3 * stream + 1) * C + channel, mask=there, other=0.0)
    if chunk == before:
        tl.store(g_gamma + stream * C + channel, product * r, mask=there)
        tl.store(g_beta + stream * C + channel, total, mask=there)
    if WRITE:
        m = tl.load(kept + (3 * stream + 2) * C + channel, mask=there, other=0.0)
        a = tl.load(gamma + stream * gamma_step + channel, mask=there, other=0.0).to(ACC) * r
        w, k = _weight(rows, L, weight, prior, UNBIASED, ACC)
        share = w * a / tl.maximum(rows * L, 1).to(ACC)
        offset, slope = share * total, share * k * r * r * product
        x += first * C * L
        g += first * C * L
        g_x += first * C * L
        for start in range(0, own * L, BL):
            place, inside = _tile(start, own * L, channel, C, L, LAST, BL)
            gap = tl.load(x + place, mask=inside, other=0.0).to(ACC) - m[None, :]
            through = tl.load(g + place, mask=inside, other=0.0).to(ACC) * a[None, :]
            tl.store(g_x + place, through - offset[None, :] - slope[None, :] * gap, mask=inside)
