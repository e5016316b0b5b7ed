"""The Triton kernels against the eager segment norm. On a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adapters.base import BATCH_NORM, Norm, Segments
from tta_server.engine.segment_norm import SegmentBatchNorm
from tta_server.engine.triton_norm import TritonBatchNorm, _chunks, _dense, _Plan, available

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPS = 1e-5
NORMS = {
    "batch": BATCH_NORM,
    "blend": Norm(0.3),
    "blend-biased": Norm(0.7, biased=True),
    "running": Norm(0.2, running=True),
    "running-all": Norm(1.0, running=True),
    "prior": Norm(1.0, prior=3),
}
CASES = (([3, 0, 1, 5], 5), ([6], 5), ([1], 1), ([40, 1, 3], 200))
"""Rows by stream, and positions."""
TOLERANCES = {torch.float64: 1e-7, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""Relative and absolute. Weights and ``eps`` reach the kernels as float32."""


@pytest.fixture(autouse=True, scope="module")
def interpreter() -> Iterator[None]:
    """Triton decides when it is imported, and when kernels are, whether they are interpreted. Nothing but these tests
    imports it here."""
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE.type == "cpu":
            patch.setenv("TRITON_INTERPRET", "1")
        yield


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made.to(DEVICE, dtype)


def layer(streams: int, channels: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Scales, shifts, means and variances, ``[streams, channels]``, far from 1 and 0; views, as those in a state
    are."""
    own = normal(streams, 4 * channels, seed=1, dtype=dtype)
    gamma, beta, mean, var = own.split(channels, 1)
    return [gamma, beta, mean, 0.5 + var.abs()]


def run(
    kind: type[torch.autograd.Function],
    x: Tensor,
    given: list[Tensor],
    sizes: list[int],
    norm: Norm = BATCH_NORM,
    slope: Tensor | None = None,
) -> list[Tensor]:
    """What the norm gives: ``y``, mean and variance, and the gradients of ``x``, scales and shifts for ``slope``."""
    x, gamma, beta = (one.detach().requires_grad_() for one in (x, *given[:2]))
    y, mean, var = kind.apply(x, gamma, beta, *given[2:], Segments(sizes, DEVICE), norm, EPS)
    slope = normal(*x.shape, seed=9, dtype=x.dtype) if slope is None else slope
    gradients = torch.autograd.grad(y, [x, gamma, beta], slope.view_as(y))
    return [y.view_as(x), mean, var, *gradients]


def compare(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for name, one, other in zip(("y", "mean", "var", "d x", "d gamma", "d beta"), found, expected, strict=True):
        assert one.shape == other.shape, name
        # Of 16 bits the eager version's sums are, too: the greatest value sets the scale.
        scale = max(1.0, other.abs().max().item())
        torch.testing.assert_close(
            one.double() / scale, other.double() / scale, rtol=tolerance, atol=tolerance, msg=name
        )


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("mode", NORMS)
@pytest.mark.parametrize(("sizes", "positions"), CASES, ids=str)
def test_kernels_equal_the_eager_norm(sizes: list[int], positions: int, mode: str, shared: bool) -> None:
    """Values, statistics and gradients, for ragged streams, with and without rows, of one value, and of several chunks;
    each with tensors of its own or all with the same."""
    x = 1.5 * normal(sum(sizes), 2, positions, seed=0, dtype=torch.float64) + 0.3
    given = layer(1 if shared else len(sizes), 2, torch.float64)
    found, expected = (run(kind, x, given, sizes, NORMS[mode]) for kind in (TritonBatchNorm, SegmentBatchNorm))
    compare(found, expected, TOLERANCES[torch.float64])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    ("shape", "last"),
    [((33,), False), ((4, 3, 2), False), ((4, 3, 2), True), ((2, 41, 31), False), ((35, 7, 7), True), ((3, 5), True),
     ((1, 9), False), ((3, 1), False)],
    ids=str,
)  # fmt: skip
def test_shapes_layouts_and_types(shape: tuple[int, ...], dtype: torch.dtype, last: bool) -> None:
    """Channels more than a program's, positions more than a tile's, a single one, and none; both orders in memory,
    which the results keep; sums of 16-bit values are of float32."""
    sizes = [3, 1, 4]
    x = 1.5 * normal(sum(sizes), *shape, seed=0, dtype=dtype) + 0.3
    if last and len(shape) == 3:
        x = x.to(memory_format=torch.channels_last)
    elif last and len(shape) == 2:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    given = layer(len(sizes), shape[0], dtype)
    slope = normal(*x.shape, seed=9, dtype=dtype)
    found = run(TritonBatchNorm, x, given, sizes, slope=slope)
    wide = torch.promote_types(dtype, torch.float32)
    expected = run(SegmentBatchNorm, x.to(wide), [one.to(wide) for one in given], sizes, slope=slope.to(wide))
    compare(found, expected, TOLERANCES[dtype])
    assert [one.dtype for one in found] == [dtype] * 6
    assert found[0].stride() == found[3].stride() == x.stride()


def test_values_far_from_zero_keep_their_variance() -> None:
    """There is no difference of large squares."""
    x = 1000 + 0.01 * normal(9, 2, 300, seed=0, dtype=torch.float64)
    given = [torch.full((1, 2), value, device=DEVICE) for value in (1.0, 0.0, 0.0, 1.0)]
    _, mean, var = TritonBatchNorm.apply(x.float(), *given, Segments([9], DEVICE), BATCH_NORM, EPS)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    expected = x.float().double()
    torch.testing.assert_close(mean[0].double(), expected.mean((0, 2)), rtol=1e-6, atol=0)
    torch.testing.assert_close(var[0].double(), expected.var((0, 2), correction=0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sums_of_16_bit_values_are_wider(dtype: torch.dtype) -> None:
    """In 16 bits the sum would overflow, or stop to grow."""
    x = 100 + normal(3, 2, 900, seed=0, dtype=dtype)
    given = [torch.full((1, 2), value, device=DEVICE) for value in (1.0, 0.0, 0.0, 1.0)]
    _, mean, var = TritonBatchNorm.apply(x, *given, Segments([3], DEVICE), BATCH_NORM, EPS)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    torch.testing.assert_close(mean[0], x.float().mean((0, 2)), rtol=1e-6, atol=0)
    torch.testing.assert_close(var[0], x.float().var((0, 2), correction=0), rtol=1e-5, atol=0)


def test_rows_that_begin_between_addresses_are_copied() -> None:
    """Kernels are compiled for addresses that are multiples of 16."""
    rows = normal(3, 1, 5, seed=0)
    assert _dense(rows).data_ptr() == rows.data_ptr()
    moved = _dense(rows[1:])
    assert moved.data_ptr() % 16 == 0
    assert torch.equal(moved, rows[1:])


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("mode", ["batch", "prior"])
def test_a_stream_gets_the_same_bits_in_any_company(mode: str, last: bool) -> None:
    """Alone, and in the midst of others, one of which is full of NaN; wherever its rows begin in memory."""
    sizes, shape = [3, 37, 2, 5], (3, 13, 15)
    x = 1.5 * normal(sum(sizes), *shape, seed=0) + 0.3
    x[-5:] = torch.nan
    if last:
        x = x.to(memory_format=torch.channels_last)
    slope = normal(*x.shape, seed=9).to(memory_format=torch.channels_last if last else torch.contiguous_format)
    given = layer(len(sizes), shape[0])
    together = run(TritonBatchNorm, x, given, sizes, NORMS[mode], slope)
    parts, slopes = x.split(sizes), slope.split(sizes)
    for index, size in enumerate(sizes[:3]):
        own = [one[index : index + 1] for one in given]
        alone = run(TritonBatchNorm, parts[index], own, [size], NORMS[mode], slopes[index])
        for name, one, other in zip(("y", "mean", "var", "d x", "d gamma", "d beta"), alone, together, strict=True):
            rows = other.split(sizes)[index] if len(other) == sum(sizes) else other[index : index + 1]
            assert torch.equal(one, rows), (name, index)


def test_slopes_in_another_order_in_memory() -> None:
    """What comes back need not lie as ``x`` does, and may be one number for all."""
    x = normal(4, 3, 2, 5, seed=0).to(memory_format=torch.channels_last)
    given = layer(2, 3)
    for slope in (normal(*x.shape, seed=9), torch.full((1, 1, 1, 1), 0.5, device=DEVICE).expand(x.shape)):
        found, expected = (
            run(kind, x, given, [1, 3], slope=slope.reshape(4, 3, 10)) for kind in (TritonBatchNorm, SegmentBatchNorm)
        )
        compare(found, expected, TOLERANCES[torch.float32])


def test_inputs_without_gradient_get_none() -> None:
    x, given = normal(4, 3, 5, seed=0), layer(2, 3)
    gamma = given[0].detach().requires_grad_()
    y, _, _ = TritonBatchNorm.apply(x, gamma, *given[1:], Segments([1, 3], DEVICE), BATCH_NORM, EPS)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    slope = normal(*x.shape, seed=9)
    (found,) = torch.autograd.grad(y, [gamma], slope)
    torch.testing.assert_close(found, run(SegmentBatchNorm, x, given, [1, 3])[4], rtol=1e-5, atol=1e-5)


COMPILE = """
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tta_server.engine import triton_kernels

constants = {"LAST": True, "BL": 32, "BC": 32, "ACC": tl.float32, "UNBIASED": True, "WRITE": True}
types = {"chunks": "*i32", "weight": "fp32", "prior": "fp32", "eps": "fp32", "C": "i32", "L": "i32", "most": "i32"}
for kernel in (getattr(triton_kernels, name) for name in ("moments", "normalise", "slopes", "differentiate")):
    given = {name: constants[name] for name in kernel.arg_names if name in constants}
    signature = {
        name: "constexpr" if name in given else types.get(name, "i32" if name.endswith("_step") else "*fp32")
        for name in kernel.arg_names
    }
    positions = {(kernel.arg_names.index(name),): value for name, value in given.items()}
    made = triton.compile(ASTSource(kernel, signature, positions), target=GPUTarget("cuda", 80, 32))
    print(made.metadata.name, len(made.asm["cubin"]) > 1000)
"""


def test_kernels_compile_for_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    """The interpreter takes more than the compiler does."""
    hidden = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=os.environ | hidden, capture_output=True, text=True)
    assert done.stdout.split() == ["moments", "True", "normalise", "True", "slopes", "True", "differentiate", "True"], (
        done.stderr
    )


@pytest.mark.parametrize("positions", [1, 49, 1024, 12544])
@pytest.mark.parametrize("channels", [1, 16, 100])
def test_chunks_hold_every_row_once_and_depend_on_nothing_but_the_layer(channels: int, positions: int) -> None:
    sizes = [70, 0, 1, 200]
    rows = torch.empty(sum(sizes), channels, positions, device=DEVICE)
    plan, alone = _Plan.of(rows, Segments(sizes, DEVICE)), _Plan.of(rows[:200], Segments([200], DEVICE))
    assert (alone.most, alone.arguments) == (plan.most, plan.arguments)
    of_row = [int(row) for first, count in plan.chunks[:, :2].tolist() for row in range(first, first + count)]
    assert of_row == list(range(sum(sizes)))
    assert plan.chunks[:, 2].unique_consecutive().tolist() == [0, 1, 2, 3]
    assert plan.chunks[:, 1].max() <= plan.most
    own = plan.chunks[plan.chunks[:, 2] == 3]
    assert torch.equal(own[:, 0] - 71, alone.chunks[:, 0])
    assert _chunks(tuple(sizes), plan.most, rows.device) is plan.chunks


def test_available_on_cuda_for_means_of_batches() -> None:
    x = torch.zeros(2, 3, device=DEVICE)
    assert available(x) == (DEVICE.type == "cuda")
    for norm in (Norm(0.0), Norm(0.5, per_row=True), Norm(1.0, median=True)):
        assert not available(x, norm)
