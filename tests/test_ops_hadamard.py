"""`mq_ao::hadamard`: the fast transform against the dense product in float64."""

from __future__ import annotations

import ctypes
import platform
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

from mq_ao import MqAoError
from mq_ao.ops import hadamard_matrix as hm
from mq_ao.ops.hadamard import hadamard
from mq_ao.ops.native import build
from tests.test_hadamard_matrix import SIZES

pytestmark = pytest.mark.usefixtures("native_kernels")
op = torch.ops.mq_ao.hadamard

# Besides: bases that are unrolled (28) and that are not (36, 52, 368), over whole vectors and over single floats.
MORE_SIZES = [28, 56, 448, 36, 576, 52, 104, 368, 736]
seeds = st.integers(0, 2**31)


def dense(x: Tensor, scale: Tensor | None = None) -> Tensor:
    x = x.double() if scale is None else x.double() * scale.double()
    return x @ hm.matrix(x.shape[-1])


def assert_close(y: Tensor, exact: Tensor, x: Tensor) -> None:
    # Every value is a sum of n terms of random rounding errors, each of the rows' rms times 2^-24; the additions in
    # turn leave errors of some log2(n) <= 13 (order 368: 184) steps, of which the root adds up: far below 32.
    rms = x.double().square().mean(-1, keepdim=True).sqrt()
    assert ((y.double() - exact).abs() <= 32 * 2**-24 * rms).all()


@pytest.mark.parametrize("n", SIZES + MORE_SIZES)
def test_fast_transform_is_the_dense_product(n: int) -> None:
    gen = torch.Generator().manual_seed(n)
    x, scale = torch.randn(3, n, generator=gen), torch.rand(n, generator=gen) + 0.5
    matrix = hm.matrix.__wrapped__(n)  # not kept: the largest takes 512 MB
    for s, product in ((None, x.double()), (scale, x.double() * scale.double())):
        assert_close(op(x, s), product @ matrix, product)


@pytest.mark.parametrize("n", SIZES + MORE_SIZES)
def test_unit_vectors_give_the_rows_of_the_matrix(n: int) -> None:
    """No rounding but the norm's: signs and places of the native base are those of the matrix, exactly."""
    at = torch.randperm(n, generator=torch.Generator().manual_seed(n))[:24]
    signs = hm.base(hm.factor(n)[0])[at // hm.factor(n)[1]]
    rows = torch.einsum("ra,rb->rab", signs, hm.sylvester(hm.factor(n)[1])[at % hm.factor(n)[1]]).reshape(len(at), n)
    x = torch.zeros(len(at), n)
    x[torch.arange(len(at)), at] = 1
    assert torch.equal(op(x), (rows * torch.tensor(n**-0.5, dtype=torch.float32)).float())


@settings(max_examples=60, deadline=None)
@given(
    lead=st.sampled_from([(), (0,), (1,), (3,), (70,), (2, 3), (1, 0), (2, 1, 4)]),
    n=st.sampled_from([1, 2, 4, 12, 24, 36, 48, 96, 128, 192, 256]),
    view=st.sampled_from(["dense", "columns", "every second", "transposed", "expanded"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.float16]),
    with_scale=st.booleans(),
    seed=seeds,
)
def test_any_shape_stride_and_dtype(
    lead: tuple[int, ...], n: int, view: str, dtype: torch.dtype, with_scale: bool, seed: int
) -> None:
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(*lead, 2 * n + 3, generator=gen).to(dtype)
    x = x[..., : 2 * n : 2] if view == "every second" else x[..., 3 : 3 + n]
    if view == "dense":
        x = x.contiguous()
    if view == "transposed" and x.dim() > 2:
        x = x.transpose(0, 1)
    if view == "expanded" and x.dim() > 1 and len(x):
        x = x[:1].expand(5, *x.shape[1:])
    scale = torch.rand(n, generator=gen) + 0.5 if with_scale else None
    y = hadamard(x, scale)
    assert y.dtype == dtype and y.shape == x.shape and y.is_contiguous()
    exact = dense(x, scale)
    if dtype in (torch.bfloat16, torch.float16):
        # One rounding to the narrow type, half an ulp, after float32 arithmetic.
        bound = torch.finfo(dtype).eps * 0.51 * exact.abs() + 1e-5
    else:
        # A few roundings of sums of at most 256 values of size 3.
        bound = torch.full_like(exact, 2e-6 if dtype == torch.float32 else 1e-14)
    assert ((y.double() - exact).abs() <= bound).all()


def test_scale_may_be_of_another_dtype_and_strided() -> None:
    x, scale = torch.randn(4, 48), (torch.rand(96) + 0.5)[::2]
    assert torch.equal(op(x, scale), op(x, scale.contiguous()))
    assert torch.equal(op(x, scale.to(torch.bfloat16)), op(x, scale.to(torch.bfloat16).float()))


@pytest.mark.parametrize("n", [48, 1024, 1536])
def test_nan_and_infinity_reach_the_whole_row_and_no_other(n: int) -> None:
    clean = torch.randn(4, n)
    x = clean.clone()
    x[1, n // 3] = torch.nan
    x[2, n // 2] = -torch.inf
    y = op(x)
    assert y[1].isnan().all()
    assert torch.equal(y[2], -torch.inf * hm.matrix(n)[n // 2].sign().float())
    assert torch.equal(y[[0, 3]], op(clean)[[0, 3]])


def test_bits_do_not_depend_on_threads_or_neighbours() -> None:
    x = torch.randn(200, 1536)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = op(x)
        for count in (2, 3):
            torch.set_num_threads(count)
            assert torch.equal(op(x), alone)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(op(x[7]), alone[7])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 24).to(dtype)
    torch.library.opcheck(op.default, (x,))
    torch.library.opcheck(op.default, (x.transpose(0, 1), torch.rand(24)))


class Rotation(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return hadamard(x * 2, None) + 1


def test_exports_with_dynamic_rows() -> None:
    dims = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("length", min=1)},)
    program = torch.export.export(Rotation(), (torch.randn(2, 3, 48),), dynamic_shapes=dims)
    x = torch.randn(5, 1, 48)
    assert torch.equal(program.module()(x), op(x * 2) + 1)


def test_compiles() -> None:
    x = torch.randn(2, 3, 48)
    assert torch.equal(torch.compile(Rotation(), fullgraph=True)(x), op(x * 2) + 1)


@pytest.mark.parametrize(
    ("x", "scale", "message"),
    [
        (torch.zeros(2, 6), None, "order 6 exists .*: the nearest orders to choose are 4 and 8"),
        (torch.zeros(2, 92), None, "order 92 is known here: the nearest orders to choose are 88 and 96"),
        (torch.zeros(2, 0), None, "the last axis of x is empty"),
        (torch.tensor(1.0), None, "not a scalar"),
        (torch.zeros(2, 8, dtype=torch.int32), None, "must be floating point"),
        (torch.zeros(2, 8), torch.ones(4), "scale must be a floating point vector of 8 values"),
        (torch.zeros(2, 8), torch.ones(1, 8), "scale must be a floating point vector of 8 values"),
        (torch.zeros(2, 8), torch.ones(8, dtype=torch.int8), "scale must be a floating point vector of 8 values"),
    ],
)
def test_bad_calls_say_what_is_wrong(x: Tensor, scale: Tensor | None, message: str) -> None:
    with pytest.raises(MqAoError, match=message):
        op(x, scale)
    with pytest.raises(MqAoError, match=message):
        hadamard.reference(x, scale)
    with FakeTensorMode() as mode, pytest.raises(MqAoError, match=message):
        op(mode.from_tensor(x), scale if scale is None else mode.from_tensor(scale))


# The core by itself, so that the variants this machine would not choose are run too.
CORE_SHIM = """
#include "hadamard.h"
extern "C" void rotate(float* x, long rows, long n) {
  const mq_ao::hadamard::Plan* plan = mq_ao::hadamard::find_plan(n);
  std::vector<float> work(plan->work_size());
  for (long i = 0; i < rows; ++i) mq_ao::hadamard::rotate(*plan, x + i * n, work.data());
}
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="variants of x86")
@pytest.mark.parametrize("flag", ["-march=x86-64", "-march=x86-64-v3"])
def test_every_instruction_set_is_right(flag: str, tmp_path: Path) -> None:
    (tmp_path / "shim.cpp").write_text(CORE_SHIM)
    shared = tmp_path / "shim.so"
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
    command = [build.compiler(), *build.FLAGS, flag, *warnings, "-fPIC", "-shared", f"-I{Path(build.__file__).parent}"]
    subprocess.run([*command, str(tmp_path / "shim.cpp"), "-o", str(shared)], check=True)
    core = ctypes.CDLL(str(shared))
    for n in (1, 2, 8, 12, 36, 48, 64, 160, 192, 448, 576, 1536, 2048):
        x = torch.randn(3, n)
        y = x.clone()
        core.rotate(ctypes.c_void_p(y.data_ptr()), ctypes.c_long(3), ctypes.c_long(n))
        assert_close(y, dense(x), x)
