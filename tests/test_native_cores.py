"""The portable C++ cores, compiled without torch for several instruction sets: same results, exact functions."""

from __future__ import annotations

import ctypes
import math
import platform
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mq_ao.errors import MqAoError
from mq_ao.ops.cached_attention import cached_attention
from mq_ao.ops.causal_conv1d import causal_conv1d
from mq_ao.ops.native import build
from mq_ao.ops.selective_scan import selective_scan, selective_scan_backward
from mq_ao.ops.ssd_scan import ssd_scan

SHIM = r"""
#include "attention.h"
#include "conv.h"
#include "scan.h"
#include "scan_backward.h"
#include "ssd.h"
using namespace mq_ao;

extern "C" void apply(const char* name, const float* x, float* y, long count) {
  for (long i = 0; i < count; i += kLanes) {
    const int lanes = int(std::min<long>(kLanes, count - i));
    const Vec v = load(x + i, lanes);
    const Vec r = name[0] == '2' ? exp2(v) : name[0] == 'e' ? exp(v) : name[0] == 'p' ? softplus(v) : silu(v);
    store(r, y + i, lanes);
  }
}

static Rows<const float> rows(const float* p, const long* s, long width) { return {p, s[1] * width, width, s[4]}; }
static Rows<float> rows(float* p, const long* s, long width) { return {p, s[1] * width, width, s[4]}; }

// s: batch, length, channels, groups, d_state
static ScanInputs<float> inputs(const long* s, const float** p) {
  const long matrix = s[3] * s[4];
  return {{s[0], s[1], s[2], s[3], s[4]}, rows(p[0], s, s[2]), rows(p[1], s, s[2]), rows(p[3], s, matrix),
          rows(p[4], s, matrix), p[2], p[5], p[6], p[7], true};
}

extern "C" void scan(const long* s, const float** p, float* y, float* last_state) {
  const ScanInputs<float> in = inputs(s, p);
  const ScanTasks tasks{in.shape, kRangeBlocks * kLanes};
  for (long i = 0; i < tasks.count(); ++i) {
    if (s[1] == 1 && s[4] % kLanes == 0)
      scan_step(in, tasks.task(i), rows(y, s, s[2]), last_state);
    else
      scan_task(in, tasks.task(i), rows(y, s, s[2]), last_state);
  }
}

// out: du, ddelta, dA, dD, ddelta_bias, dinitial_state, dB, dC; a task takes all channels of a group.
extern "C" void scan_gradient(const long* s, const float** p, const float* dy, const float* dlast, float** out) {
  const ScanInputs<float> in = inputs(s, p);
  const ScanTasks tasks{in.shape, s[2]};
  const ScanGradients<float> grads{rows(dy, s, s[2]), dlast, rows(out[0], s, s[2]), rows(out[1], s, s[2]),
                                   out[2], out[3], out[4], out[5], out[6], out[7]};
  for (long i = 0; i < tasks.count(); ++i) GradientTask<float>(in, tasks.task(i), 0, grads).run();
}

extern "C" void conv(const long* s, const float** p, float* y, float* last_state) {
  const ConvInputs<float> in{{s[0], s[1], s[2], s[4]}, rows(p[0], s, s[2]), p[1], p[2], p[3], true};
  conv_task(in, ChannelTask{0, s[0], 0, s[2]}, rows(y, s, s[2]), last_state);
}

// s: batch, length, heads, groups, d_state, headdim. All units in one range.
extern "C" void ssd(const long* s, const float** p, float* y, float* last_state) {
  const long matrix = s[3] * s[4], columns = s[2] * s[5];
  const SsdInputs<float> in{{s[0], s[1], s[2], s[5], s[3], s[4]}, rows(p[0], s, columns), rows(p[1], s, s[2]),
                            rows(p[3], s, matrix), rows(p[4], s, matrix), p[2], p[5], p[6], p[7], nullptr, false, true,
                            0.0f, 2.0f};
  run_ssd(in, rows(y, s, columns), last_state, [](long count, long, auto&& part) { part(0, count); });
}

// s: batch, length, heads, groups, width, past. p: query, past key and value, key and value.
extern "C" void attention(const long* s, const float** p, float* y) {
  const long group = s[4], row = s[3] * group, token = s[0] * row, head = s[1] * s[4];
  const auto cached = [&](const float* rows) { return Cached<float>{rows, token, row, group, nullptr, 0, 0, 0}; };
  const AttentionOperands<float, float> in{{s[0], s[1], s[2], s[3], s[4], s[5]}, p[0], s[2] * head, head, s[4],
                                           cached(p[1]), cached(p[2]), cached(p[3]), cached(p[4]), nullptr, 0.5f, y};
  run_attention(in, [](long count, long, auto&& part) { part(0, count); });
}
"""
X86 = platform.machine() == "x86_64"
VARIANTS = ["-march=x86-64", "-march=x86-64-v3", "-march=native"] if X86 else [build.ARCH_FLAG]


@pytest.fixture(scope="module", params=VARIANTS)
def core(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The cores for one instruction set."""
    try:
        compiler = build.compiler()
    except MqAoError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("cores")
    (folder / "shim.cpp").write_text(SHIM)
    # GCC 12's own AVX-512 header has values that it takes for uninitialized; psabi is a note for C callers of vectors.
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-maybe-uninitialized", "-Wno-psabi"]
    flags = [*build.FLAGS, request.param, *warnings, "-fPIC", "-shared"]
    include = f"-I{Path(build.__file__).parent}"
    subprocess.run([compiler, *flags, include, str(folder / "shim.cpp"), "-o", str(folder / "shim.so")], check=True)
    return ctypes.CDLL(str(folder / "shim.so"))


def pointers(tensors: list[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*[t.data_ptr() for t in tensors])


def apply(core: ctypes.CDLL, name: str, x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    core.apply(name.encode(), *(ctypes.c_void_p(t.data_ptr()) for t in (x, y)), ctypes.c_long(x.numel()))
    return y


def exact_softplus(x: Tensor) -> Tensor:
    return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))


@pytest.mark.parametrize(
    ("name", "exact", "low", "high", "ulps"),
    [
        # Measured over a seventh of all floats: 0.99 ulp (1.22 without fused multiply-add).
        ("2", torch.exp2, -126.0, 127.4, 1.5),
        # 1.06 (1.34).
        ("exp", torch.exp, -87.3, 88.7, 1.5),
        # 3.62: exp, a division and a polynomial.
        ("plus", exact_softplus, -87.0, 1000.0, 4.0),
        # 2.40.
        ("silu", torch.nn.functional.silu, -80.0, 100.0, 3.0),
    ],
)
def test_functions_are_accurate(core: ctypes.CDLL, name: str, exact, low: float, high: float, ulps: float) -> None:
    gen = torch.Generator().manual_seed(0)
    anywhere = torch.rand(1_000_000, generator=gen) * (high - low) + low
    near_zero = torch.randn(1_000_000, generator=gen) * 10.0 ** (torch.rand(1_000_000, generator=gen) * 12 - 10)
    x = torch.cat((anywhere, near_zero.clamp(low, high)))
    expected = exact(x.double())
    exponent = torch.frexp(expected).exponent.clamp(min=-125)
    error = (apply(core, name, x).double() - expected).abs() / torch.exp2(exponent.double() - 24)
    assert error.max().item() <= ulps


def test_functions_at_the_ends(core: ctypes.CDLL) -> None:
    x = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 200.0, -200.0, 1e30, -1e30])
    nan, inf = math.nan, math.inf
    for name, expected in (
        ("2", [1, 1, inf, 0, nan, inf, 0, inf, 0]),
        ("exp", [1, 1, inf, 0, nan, inf, 0, inf, 0]),
        ("plus", [math.log(2), math.log(2), inf, 0, nan, 200, 0, 1e30, 0]),
    ):
        torch.testing.assert_close(apply(core, name, x), torch.tensor(expected, dtype=torch.float32), equal_nan=True)


def close(actual: Tensor, expected: Tensor) -> None:
    scale = expected.abs().max().item()
    # Float32 rounding of sums of up to some hundred terms, relative to the largest result.
    torch.testing.assert_close(actual, expected.float(), rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize(
    "shape", [(2, 40, 21, 1, 16), (1, 1, 40, 2, 16), (1, 33, 12, 3, 5), (2, 3, 16, 1, 40), (1, 1, 5, 1, 3)]
)
def test_cores_match_the_references(core: ctypes.CDLL, shape: tuple[int, ...]) -> None:
    batch, length, channels, groups, d_state = shape
    gen = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=gen)

    u, delta = normal(batch, length, channels), normal(batch, length, channels) - 1
    A = -normal(channels, d_state).abs()
    B, C = normal(batch, length, groups, d_state), normal(batch, length, groups, d_state)
    D, bias, state = normal(channels), normal(channels), normal(batch, channels, d_state)
    sizes = (ctypes.c_long * 5)(*shape)
    operands = pointers([u, delta, A, B, C, D, bias, state])
    exact = [x.double() for x in (u, delta, A, B, C, D, bias)]
    exact_args = (*exact, True, state.double())

    y, last = torch.empty_like(u), torch.empty_like(state)
    core.scan(sizes, operands, *(ctypes.c_void_p(t.data_ptr()) for t in (y, last)))
    for actual, expected in zip((y, last), selective_scan.reference(*exact_args), strict=True):
        close(actual, expected)

    dy, dlast = normal(*u.shape), normal(*state.shape)
    per_batch = [torch.empty(batch, *x.shape) for x in (A, D, bias)]
    grads = [torch.empty_like(u), torch.empty_like(u), *per_batch, *(torch.empty_like(x) for x in (state, B, C))]
    core.scan_gradient(sizes, operands, *(ctypes.c_void_p(t.data_ptr()) for t in (dy, dlast)), pointers(grads))
    du, ddelta, dA, dD, dbias, dstate, dB, dC = grads
    results = (du, ddelta, dA.sum(0), dB, dC, dD.sum(0), dbias.sum(0), dstate)
    expected_grads = selective_scan_backward.reference(dy.double(), dlast.double(), *exact_args)
    for actual, expected in zip(results, expected_grads, strict=True):
        close(actual, expected)

    taps = d_state
    weight, conv_state = normal(channels, taps), normal(batch, taps - 1, channels)
    conv_last = torch.empty_like(conv_state)
    core.conv(sizes, pointers([u, weight, D, conv_state]), *(ctypes.c_void_p(t.data_ptr()) for t in (y, conv_last)))
    conv_exact = [x.double() for x in (u, weight, D, conv_state)]
    for actual, expected in zip((y, conv_last), causal_conv1d.reference(*conv_exact, "silu"), strict=True):
        close(actual, expected)


@pytest.mark.parametrize(
    "shape", [(2, 80, 4, 2, 16, 24), (1, 1, 20, 1, 16, 8), (2, 70, 6, 3, 5, 7), (1, 20, 3, 1, 33, 70)]
)
def test_ssd_core_matches_the_reference(core: ctypes.CDLL, shape: tuple[int, ...]) -> None:
    batch, length, heads, groups, d_state, headdim = shape
    gen = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=gen)

    x, dt, A = normal(batch, length, heads, headdim), normal(batch, length, heads) - 1, -normal(heads).abs()
    B, C = normal(batch, length, groups, d_state), normal(batch, length, groups, d_state)
    D, bias, state = normal(heads), normal(heads), normal(batch, heads, headdim, d_state)
    operands = [x, dt, A, B, C, D, bias, state]
    y, last = torch.empty_like(x), torch.empty_like(state)
    core.ssd((ctypes.c_long * 6)(*shape), pointers(operands), *(ctypes.c_void_p(t.data_ptr()) for t in (y, last)))
    *exact, exact_state = (t.double() for t in operands)
    expected = ssd_scan.reference(*exact, True, 0.0, 2.0, exact_state)
    for actual, wanted in zip((y, last), expected, strict=True):
        close(actual, wanted)


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1, 16, 5), (2, 1, 4, 2, 32, 70), (1, 1, 8, 2, 48, 2500), (1, 2, 8, 1, 20, 3), (2, 30, 6, 2, 64, 100)],
)
def test_attention_core_matches_the_reference(core: ctypes.CDLL, shape: tuple[int, ...]) -> None:
    batch, length, heads, groups, width, past = shape
    gen = torch.Generator().manual_seed(0)
    query = torch.randn(batch, heads, length, width, generator=gen)
    past_key, past_value = torch.randn(2, past, batch, groups, width, generator=gen)
    key, value = torch.randn(2, length, batch, groups, width, generator=gen)
    operands = [query, past_key, past_value, key, value]
    y = torch.empty(batch, length, heads, width)
    core.attention((ctypes.c_long * 6)(*shape), pointers(operands), ctypes.c_void_p(y.data_ptr()))
    exact = [t.double() for t in operands]
    close(y, cached_attention.reference(exact[0], exact[3], exact[4], 0.5, exact[1], exact[2]))
