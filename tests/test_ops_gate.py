"""`mq_ao::gate`: floats next to float64's, and the same as what `mq_ao::qgate` quantizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.ao.quantization.fx import _decomposed  # noqa: F401  (registers quantized_decomposed)

from mq_ao import MqAoError
from mq_ao.ops import hadamard_matrix as hm
from mq_ao.ops.gate import gate

pytestmark = pytest.mark.usefixtures("native_kernels")
op = torch.ops.mq_ao.gate

Call = tuple[Tensor, Tensor, Tensor | None, bool]


def exact(y: Tensor, z: Tensor, s: Tensor | None, hadamard: bool) -> Tensor:
    """In float64."""
    x = y.double() * z.double() * torch.sigmoid(z.double() * (1.0 if s is None else s.double()))
    return x @ hm.matrix(x.shape[-1]) if hadamard else x


def assert_near(x: Tensor, args: Call) -> None:
    y, z, s, hadamard = args
    # Some ten roundings of 2^-24, and that of s z, which the exponential multiplies by s z.
    size = exact(y, z, s, False).abs() * (1 + (z.double() * (1.0 if s is None else s.double())).abs())
    if hadamard:
        # A rotated value is a sum of all values of its row and errs with the largest ones.
        size = 8 * size.square().mean(-1, keepdim=True).sqrt()
    assert ((x.double() - exact(*args)).abs() <= 1e-6 * size + 1e-30).all()


cases = st.fixed_dictionaries(
    {
        "lead": st.sampled_from([(), (0,), (1,), (3,), (2, 5), (1, 0), (70,)]),
        "n": st.sampled_from([1, 2, 4, 12, 20, 48, 96, 192, 256, 576]),
        "odd": st.integers(0, 3),
        "smooth": st.booleans(),
        "hadamard": st.booleans(),
        "strided": st.booleans(),
        "seed": st.integers(0, 2**31),
    }
)


def drawn(case: dict[str, Any]) -> Call:
    gen = torch.Generator().manual_seed(case["seed"])
    n = case["n"] if case["hadamard"] else case["n"] + case["odd"]
    y, z = (torch.randn(*case["lead"], 2 * n + 5, generator=gen)[..., n : 2 * n] * 3 for _ in range(2))
    if not case["strided"]:
        y, z = y.contiguous(), z.contiguous()
    s = torch.rand(n, generator=gen) * 3 + 0.2 if case["smooth"] else None
    return y, z, s, case["hadamard"]


@settings(max_examples=80, deadline=None)
@given(case=cases)
def test_matches_float64(case: dict[str, Any]) -> None:
    args = drawn(case)
    for x in (gate(*args), gate.reference(*args)):
        assert x.dtype == torch.float32 and x.shape == args[0].shape and x.is_contiguous()
        assert_near(x, args)


@pytest.mark.parametrize("hadamard", [False, True])
def test_qgate_quantizes_the_same_floats(hadamard: bool) -> None:
    gen = torch.Generator().manual_seed(0)
    y, z, s = torch.randn(9, 192, generator=gen), torch.randn(9, 192, generator=gen), torch.rand(192, generator=gen)
    q = torch.ops.mq_ao.qgate(y, 1.0, 0, z, 1.0, 0, s, hadamard, 0.02, 100)
    quantize = torch.ops.quantized_decomposed.quantize_per_tensor
    assert torch.equal(q, quantize(op(y, z, s, hadamard), 0.02, 100, 0, 255, torch.uint8))


def test_nan_and_infinity_stay_in_their_rows() -> None:
    y, z = torch.randn(4, 48), torch.randn(4, 48)
    clean = op(y, z, None, True)
    y[1, 7] = torch.nan
    z[2, 9] = torch.inf
    x = op(y, z, None, True)
    assert x[1].isnan().all() and not x[2].isfinite().any()
    assert torch.equal(x[[0, 3]], clean[[0, 3]])


def test_bits_do_not_depend_on_threads() -> None:
    y, z = torch.randn(150, 384), torch.randn(150, 384)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(op(y, z, None, True))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_opcheck() -> None:
    y, z = torch.randn(3, 2, 24).transpose(0, 1), torch.randn(2, 3, 48)[..., 24:]
    torch.library.opcheck(op.default, (y, z, torch.ones(24), True))
    torch.library.opcheck(op.default, (y, z))


class Gate(torch.nn.Module):
    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        return gate(y * 2, z, None, True) + 1


def test_exports_with_dynamic_rows_and_compiles() -> None:
    shape = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", min=1)}
    program = torch.export.export(Gate(), (torch.randn(2, 3, 48), torch.randn(2, 3, 48)), dynamic_shapes=(shape, shape))
    inputs = torch.randn(5, 1, 48), torch.randn(5, 1, 48)
    for run in (program.module(), torch.compile(Gate(), fullgraph=True)):
        assert torch.equal(run(*inputs), Gate()(*inputs))


Y = torch.zeros(2, 8)


@pytest.mark.parametrize(
    ("message", "args"),
    [
        ("one shape", (Y, Y[:, :4])),
        ("one shape", (Y, Y[0])),
        ("last axis is empty", (Y[:, :0], Y[:, :0])),
        ("y must be float32", (Y.double(), Y)),
        ("z must be float32", (Y, Y.to(torch.uint8))),
        ("s must be a float32 vector of 8", (Y, Y, torch.ones(7))),
        ("order 6 exists", (Y[:, :6], Y[:, :6], None, True)),
    ],
)
def test_bad_calls_say_what_is_wrong(message: str, args: tuple[Any, ...]) -> None:
    for call in (op, gate.reference):
        with pytest.raises(MqAoError, match=message):
            call(*args)
    with FakeTensorMode() as mode, pytest.raises(MqAoError, match=message):
        op(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))


def test_out_is_resized_and_written() -> None:
    y, z = torch.randn(2, 8), torch.randn(2, 8)
    out = torch.empty(0)
    assert op.out(y, z, out=out) is out
    assert torch.equal(out, op(y, z))
    with pytest.raises(MqAoError, match="must have that dtype"):
        op.out(y, z, out=torch.empty(0, dtype=torch.int8))
