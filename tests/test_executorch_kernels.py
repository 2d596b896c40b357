"""The operators in programs that ExecuTorch's runtime runs: PyTorch's results, and errors instead of crashes."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

REASON = 'needs executorch: pip install "mq-ao[executorch]"'
pytest.importorskip("executorch.exir", reason=REASON)

from executorch.exir import to_edge_transform_and_lower  # noqa: E402
from executorch.runtime import Method, Program, Runtime  # noqa: E402

import mq_ao.ops  # noqa: E402, F401
from mq_ao.ops.native import executorch_build  # noqa: E402

pytestmark = pytest.mark.usefixtures("native_kernels", "kernels")
LENGTHS = (1, 2, 5, 33, 40)
MOST_ROWS, MOST_STEPS = 2, 40


@pytest.fixture(scope="module")
def kernels() -> None:
    """The ExecuTorch library, in this process."""
    executorch_build.load()


class Call(torch.nn.Module):
    """One call of an operator, its tensors as inputs."""

    def __init__(self, operator: Any, names: Sequence[str], constants: dict[str, Any]) -> None:
        super().__init__()
        self.operator, self.names, self.constants = operator, names, constants

    def forward(self, *tensors: Tensor) -> Any:
        return self.operator(**dict(zip(self.names, tensors, strict=True)), **self.constants)


class Compiled:
    """A call as a program of any batch and length, where `moving` inputs have those as first axes.

    `batched` inputs have a batch alone.
    """

    def __init__(self, name: str, tensors: dict[str, Tensor], moving: set[str], batched: set[str], **rest: Any) -> None:
        self.call = Call(getattr(torch.ops.mq_ao, name).default, list(tensors), rest)
        batch = torch.export.Dim("batch", min=1, max=MOST_ROWS)
        length = torch.export.Dim("length", min=1, max=MOST_STEPS)
        rows = {0: batch, 1: length}
        shapes = tuple(rows if n in moving else {0: batch} if n in batched else None for n in tensors)
        program = torch.export.export(self.call, tuple(tensors.values()), dynamic_shapes=(shapes,))
        lowered = to_edge_transform_and_lower(program).to_executorch()
        assert f"mq_ao::{name}" in [o.name for o in lowered.executorch_program.execution_plan[0].operators]
        self.bytes = bytes(lowered.buffer)
        self.program, self.method = load(self.bytes)

    def __call__(self, tensors: dict[str, Tensor]) -> list[Tensor]:
        # Results are views of memory that the next call overwrites.
        return [x.clone() for x in self.method.execute(tuple(x.contiguous() for x in tensors.values()))]

    def expected(self, tensors: dict[str, Tensor]) -> list[Tensor]:
        results = self.call(*tensors.values())
        return [results] if isinstance(results, Tensor) else list(results)


def load(program: bytes) -> tuple[Program, Method]:
    loaded = Runtime.get().load_program(program)
    method = loaded.load_method("forward")
    assert method is not None
    return loaded, method


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        if a.is_floating_point():
            # The same core, perhaps with another compiler's contractions: a few roundings of the largest value.
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * (b.abs().max().item() if b.numel() else 0))
        else:
            # Such a difference may cross a rounding boundary.
            assert (a.int() - b.int()).abs().max() <= 1


def check(
    make: Callable[[int, int], dict[str, Tensor]], name: str, moving: set[str], batched: set[str], **rest: Any
) -> None:
    """Checks one program at several sizes; make(batch, length) draws its operands."""
    compiled = Compiled(name, make(2, 6), moving, batched, **rest)
    for batch in (1, 2):
        for length in LENGTHS:
            tensors = make(batch, length)
            assert_same(compiled(tensors), compiled.expected(tensors))


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape)


def drawn(dtype: torch.dtype, *shape: int) -> Tensor:
    if dtype == torch.float32:
        return torch.randn(*shape)
    return (
        torch.randint(-128, 128, shape, dtype=dtype)
        if dtype == torch.int8
        else torch.randint(0, 256, shape, dtype=dtype)
    )


def scan_operands(
    batch: int, length: int, channels: int, groups: int | None, d_state: int, dtypes: Sequence[torch.dtype]
) -> dict[str, Tensor]:
    matrix = (d_state,) if groups is None else (groups, d_state)
    u, delta, B, C = dtypes
    return {
        "u": drawn(u, batch, length, channels),
        "delta": drawn(delta, batch, length, channels),
        "A": -torch.rand(channels, d_state) * 4,
        "B": drawn(B, batch, length, *matrix),
        "C": drawn(C, batch, length, *matrix),
        "D": randn(channels),
        "delta_bias": randn(channels),
        "initial_state": randn(batch, channels, d_state),
    }


ROWS = {"u", "delta", "B", "C"}
F32, I8, U8 = torch.float32, torch.int8, torch.uint8


@pytest.mark.parametrize(("channels", "groups", "d_state"), [(24, None, 16), (5, None, 8), (36, 2, 64), (150, 1, 16)])
def test_selective_scan(channels: int, groups: int | None, d_state: int) -> None:
    torch.manual_seed(0)
    check(
        lambda b, t: scan_operands(b, t, channels, groups, d_state, (F32,) * 4),
        "selective_scan",
        ROWS,
        {"initial_state"},
        delta_softplus=True,
    )


def test_selective_scan_without_options() -> None:
    torch.manual_seed(0)

    def make(batch: int, length: int) -> dict[str, Tensor]:
        every = scan_operands(batch, length, 16, None, 16, (F32,) * 4)
        return {n: every[n].abs() if n == "delta" else every[n] for n in ("u", "delta", "A", "B", "C")}

    check(make, "selective_scan", ROWS, set())


GRIDS = {"u_scale": 0.02, "delta_scale": 0.015, "B_scale": 0.01, "C_scale": 0.01}


@pytest.mark.parametrize(
    ("dtypes", "d_state", "int8_state", "integer_output"),
    [
        ((I8, I8, I8, I8), 16, False, True),
        ((I8, F32, F32, F32), 16, True, True),
        ((U8, I8, U8, I8), 8, False, False),
        ((F32, I8, I8, F32), 64, True, True),
    ],
)
def test_qselective_scan(dtypes: Sequence[torch.dtype], d_state: int, int8_state: bool, integer_output: bool) -> None:
    torch.manual_seed(0)

    def make(batch: int, length: int) -> dict[str, Tensor]:
        operands = scan_operands(batch, length, 21, None, d_state, dtypes)
        if int8_state:
            operands["initial_state"] = drawn(I8, batch, 21, d_state).clamp(min=-127)
            operands["state_scale"] = torch.rand(21, d_state) * 0.02 + 0.01
        return operands

    zero_points = {f"{n}_zero_point": 7 for n in ("u", "delta", "B", "C")}
    out = {"out_scale": 0.05, "out_zero_point": 9} if integer_output else {}
    check(make, "qselective_scan", ROWS, {"initial_state"}, delta_softplus=True, **GRIDS, **zero_points, **out)


def ssd_operands(
    batch: int, length: int, shape: tuple[int, int, int, int], dtypes: Sequence[torch.dtype] = (F32,) * 4
) -> dict[str, Tensor]:
    """Of (heads, headdim, groups, d_state)."""
    heads, headdim, groups, d_state = shape
    x, dt, B, C = dtypes
    return {
        "x": drawn(x, batch, length, heads, headdim),
        "dt": drawn(dt, batch, length, heads),
        "A": -torch.rand(heads) * 4,
        "B": drawn(B, batch, length, groups, d_state),
        "C": drawn(C, batch, length, groups, d_state),
        "D": randn(heads),
        "dt_bias": randn(heads),
        "initial_state": randn(batch, heads, headdim, d_state),
    }


SSD_ROWS = {"x", "dt", "B", "C"}


@pytest.mark.parametrize("shape", [(4, 16, 1, 16), (6, 5, 2, 24), (24, 64, 1, 128)])
@pytest.mark.parametrize("packed", [False, True])
def test_ssd_scan(shape: tuple[int, int, int, int], packed: bool) -> None:
    torch.manual_seed(0)

    def make(batch: int, length: int) -> dict[str, Tensor]:
        operands = ssd_operands(batch, length, shape)
        if packed:
            operands |= {"D": randn(*shape[:2]), "seq_idx": torch.randint(0, 2, (batch, length))}
        return operands

    limits = {"dt_softplus": True, "dt_min": 0.01, "dt_max": 1.5 if packed else None}
    check(make, "ssd_scan", SSD_ROWS | {"seq_idx"}, {"initial_state"}, **limits)


def test_ssd_scan_without_options() -> None:
    torch.manual_seed(0)

    def make(batch: int, length: int) -> dict[str, Tensor]:
        every = ssd_operands(batch, length, (4, 8, 2, 16))
        return {n: every[n].abs() if n == "dt" else every[n] for n in ("x", "dt", "A", "B", "C")}

    check(make, "ssd_scan", SSD_ROWS, set())


@pytest.mark.parametrize(
    ("dtypes", "shape", "out_scale"),
    [
        ((I8, I8, I8, I8), (4, 16, 1, 16), 0.05),
        ((I8, F32, F32, F32), (24, 64, 1, 128), 0.05),
        ((U8, I8, U8, I8), (6, 5, 2, 24), None),
        ((F32, I8, I8, F32), (4, 16, 1, 16), 0.05),
    ],
)
def test_qssd_scan(dtypes: Sequence[torch.dtype], shape: tuple[int, int, int, int], out_scale: float | None) -> None:
    torch.manual_seed(0)
    grids = {f"{name}_{kind}": value for name in SSD_ROWS for kind, value in (("scale", 0.01), ("zero_point", 7))}
    rest = {"dt_softplus": True, "dt_max": 2.0, "out_scale": out_scale, "out_zero_point": 9}
    check(lambda b, t: ssd_operands(b, t, shape, dtypes), "qssd_scan", SSD_ROWS, {"initial_state"}, **grids, **rest)


def conv_operands(batch: int, length: int, channels: int, taps: int, dtype: torch.dtype) -> dict[str, Tensor]:
    weight = {"weight": randn(channels, taps)}
    if dtype != F32:
        weight = {"weight": drawn(I8, channels, taps), "weight_scale": torch.rand(channels) * 0.01}
    state = {"initial_state": randn(batch, taps - 1, channels)}
    return {"x": drawn(dtype, batch, length, channels), **weight, "bias": randn(channels), **state}


@pytest.mark.parametrize(("channels", "taps", "activation"), [(24, 4, "silu"), (5, 3, None), (150, 6, "silu")])
def test_causal_conv1d(channels: int, taps: int, activation: str | None) -> None:
    torch.manual_seed(0)
    check(
        lambda b, t: conv_operands(b, t, channels, taps, F32),
        "causal_conv1d",
        {"x"},
        {"initial_state"},
        activation=activation,
    )


@pytest.mark.parametrize(("dtype", "out_scale", "channels"), [(I8, 0.05, 24), (U8, 0.05, 5), (I8, None, 150)])
def test_qcausal_conv1d(dtype: torch.dtype, out_scale: float | None, channels: int) -> None:
    torch.manual_seed(0)
    grid = {"x_scale": 0.02, "x_zero_point": 11, "out_scale": out_scale, "out_zero_point": 5}
    check(
        lambda b, t: conv_operands(b, t, channels, 4, dtype),
        "qcausal_conv1d",
        {"x"},
        {"initial_state"},
        activation="silu",
        **grid,
    )


@pytest.mark.parametrize(("n", "scaled"), [(192, True), (8, False), (12, True)])
def test_hadamard(n: int, scaled: bool) -> None:
    torch.manual_seed(0)
    scale = {"scale": torch.rand(n)} if scaled else {}
    check(lambda b, t: {"x": randn(b, t, n), **scale}, "hadamard", {"x"}, set())


@pytest.mark.parametrize(("n", "smooth", "hadamard"), [(192, True, True), (21, True, False), (12, False, True)])
def test_gate(n: int, smooth: bool, hadamard: bool) -> None:
    torch.manual_seed(0)
    s = {"s": torch.rand(n) + 0.5} if smooth else {}
    check(lambda b, t: {"y": randn(b, t, n), "z": randn(b, t, n), **s}, "gate", {"y", "z"}, set(), hadamard=hadamard)


class Attention(torch.nn.Module):
    """Attention with a cache of its own, as programs have it."""

    def __init__(self, groups: int, width: int) -> None:
        super().__init__()
        for name in ("key_cache", "value_cache"):
            self.register_buffer(name, torch.zeros(MOST_STEPS, 2, groups, width))
        self.register_buffer("position", torch.zeros(1, dtype=torch.int64))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        state = (self.key_cache, self.value_cache, self.position)
        y = torch.ops.mq_ao.attention_into_cache(query, key, value, 0.3, *state)
        self.position.add_(query.shape[2])
        return y


@pytest.mark.parametrize(("heads", "groups", "width"), [(4, 2, 8), (3, 3, 5), (8, 1, 64)])
def test_attention_into_cache(heads: int, groups: int, width: int) -> None:
    torch.manual_seed(0)
    module = Attention(groups, width)

    def make(length: int) -> tuple[Tensor, ...]:
        rows = [randn(length, 2, groups, width) for _ in range(2)]
        return randn(2, heads, length, width), *rows

    length = torch.export.Dim("length", min=1, max=MOST_STEPS)
    exported = torch.export.export(
        Attention(groups, width), make(3), dynamic_shapes=({2: length}, {0: length}, {0: length})
    )
    lowered = to_edge_transform_and_lower(exported).to_executorch()
    copies = lowered.exported_program().graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)
    assert [str(node.args[0]) for node in copies] == ["b_position"], "caches are written where they lie"
    program, method = load(bytes(lowered.buffer))
    for count in (3, 1, 20, 1, 2, 13):
        tensors = make(count)
        assert_same([x.clone() for x in method.execute(tensors)], [module(*tensors)])
    with pytest.raises(RuntimeError):
        method.execute(make(1))
    del program


def shortened(tensors: dict[str, Tensor], name: str, axis: int, size: int) -> dict[str, Tensor]:
    return tensors | {name: tensors[name].narrow(axis, 0, size)}


def test_operands_that_do_not_fit_are_errors() -> None:
    """Inputs of a program may have any size below the largest: kernels see combinations that no export allows."""
    torch.manual_seed(0)
    scan = scan_operands(2, 6, 16, None, 16, (F32,) * 4)
    conv = conv_operands(2, 6, 16, 4, F32)
    gate = {"y": randn(2, 6, 12), "z": randn(2, 6, 12)}
    for name, good, moving, batched, bad in (
        (
            "selective_scan",
            scan,
            ROWS,
            {"initial_state"},
            [("delta", 1, 5), ("B", 1, 1), ("C", 0, 1), ("initial_state", 0, 1)],
        ),
        (
            "ssd_scan",
            ssd_operands(2, 6, (4, 8, 2, 16)),
            SSD_ROWS,
            {"initial_state"},
            [("dt", 1, 5), ("B", 1, 1), ("C", 0, 1), ("initial_state", 0, 1)],
        ),
        ("causal_conv1d", conv, {"x"}, {"initial_state"}, [("initial_state", 0, 1)]),
        ("gate", gate, {"y", "z"}, set(), [("z", 1, 3)]),
    ):
        compiled = Compiled(name, good, moving, batched)
        for fault in bad:
            with pytest.raises(RuntimeError):
                compiled(shortened(good, *fault))
            # The error passes: the next call is right.
            assert_same(compiled(good), compiled.expected(good))
        # Not a slice, whose strides ExecuTorch's Python runtime aborts on when it is empty.
        empty = {n: torch.zeros(2, 0, *x.shape[2:]) if n in moving else x for n, x in good.items()}
        if name != "gate":
            with pytest.raises(RuntimeError):
                compiled(empty)


def test_bad_constants_are_errors() -> None:
    """A program with other constants than exports allow: changed in its bytes."""
    torch.manual_seed(0)
    scale, zero_point, out_zero_point = 0.0371, -77, -99
    good = conv_operands(2, 6, 16, 4, I8)
    grid = {"x_scale": scale, "x_zero_point": zero_point, "out_scale": 0.0613, "out_zero_point": out_zero_point}
    compiled = Compiled("qcausal_conv1d", good, {"x"}, {"initial_state"}, activation="silu", **grid)
    inputs = tuple(good.values())
    for before, after in (
        (struct.pack("<d", scale), struct.pack("<d", -1.0)),
        (struct.pack("<d", 0.0613), struct.pack("<d", float("nan"))),
        (struct.pack("<q", zero_point), struct.pack("<q", -129)),
        (struct.pack("<q", out_zero_point), struct.pack("<q", 1 << 40)),
        (b"silu", b"gelu"),
    ):
        assert compiled.bytes.count(before) == 1
        program, method = load(compiled.bytes.replace(before, after))
        with pytest.raises(RuntimeError):
            method.execute(inputs)
        del program


def test_packed_weights_can_be_shared() -> None:
    executorch_build.share_packed_weights(True)
    executorch_build.share_packed_weights(False)


def test_loading_again_is_the_same_library() -> None:
    assert executorch_build.load() == executorch_build.load() == executorch_build.cached()
