"""Activations of 4 bits, scales a token: what the operators give, what recipes make of it, and who refuses it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mq_ao
from mq_ao import MqAoError
from mq_ao.graph import Role, walk
from mq_ao.lowering.native.plan import Plan, Step, Value
from mq_ao.models import Mamba2Config, MambaLM, language_model
from mq_ao.ops import linear_packed, qgate, qgated_norm, qrms_norm
from mq_ao.ops.linear_packed import TOKEN_LIMITS, TOKEN_REACH, TOKEN_ZERO_POINT, int8_per_token
from mq_ao.quantizer import Activation, MambaQuantizer, QuantizationConfig, RoleSpec
from mq_ao.recipes import RECIPES, Recipe
from tests.conftest import VOCAB, tokens

pytestmark = pytest.mark.usefixtures("native_kernels")
ops = torch.ops.mq_ao

# As in tests/test_native_programs.py: a value on the boundary of two integers may round either way. A step of 4 bits is
# 15 times one of 8.
FLIPPED_STEP = 15 * 5e-3


def rows(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from([(), (1,), (7,), (2, 3), (0, 2)]),
    st.sampled_from([(1, 0), (3, 0), (16, 4), (17, 0), (64, 64), (64, 16), (95, 19), (192, 64), (192, 0), (96, 12)]),
    st.sampled_from([4, 8]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([1e-37, 1.0, 1e36]),
    st.integers(0, 2**20),
)
def test_tokens_are_those_of_the_reference(
    lead: tuple[int, ...], row: tuple[int, int], bits: int, dtype: torch.dtype, size: float, seed: int
) -> None:
    n, group_size = row
    x = (rows((*lead, n), seed) * size).to(dtype)
    q, scale = ops.quantize_per_token(x, bits, group_size)
    want, want_scale = linear_packed.quantize_per_token.reference(x, bits, group_size)
    assert torch.equal(q, want) and torch.equal(scale, want_scale)
    assert scale.shape == (*lead, n // group_size if group_size else 1)
    steps = x.double() / scale.double().repeat_interleave(group_size or n, -1)
    reach, (low, high) = TOKEN_REACH[bits], TOKEN_LIMITS[bits]
    assert steps.abs().le(reach * (1 + 2**-22)).all()
    # Half a step, and the roundings of the reciprocal and of its product; what is beyond the integers is cut.
    assert ((q.double() - TOKEN_ZERO_POINT) - steps.clamp(low, high)).abs().le(0.5 + 2 * reach * 2**-22).all()


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from([(), (1,), (5,), (2, 33)]),
    st.sampled_from([1, 15, 64, 130]),
    st.sampled_from([(16, 4), (64, 64), (192, 64), (256, 32), (90, 32)]),
    st.sampled_from([4, 8]),
    st.sampled_from([None, 0.05]),
    st.integers(0, 2**20),
)
def test_products_of_groups_are_those_of_the_reference(
    lead: tuple[int, ...], n: int, row: tuple[int, int], bits: int, out_scale: float | None, seed: int
) -> None:
    """Each group of a row has its own scale, in the activations as in the weights."""
    k, size = row
    gen = torch.Generator().manual_seed(seed)
    low, high = (-8, 8) if bits == 4 else (-127, 128)
    weight = torch.randint(low, high, (n, k), dtype=torch.int8, generator=gen)
    groups = -(-k // size)
    q = torch.randint(0, 256, (*lead, k), dtype=torch.uint8, generator=gen)
    scale, weight_scale = torch.rand(*lead, groups, generator=gen), torch.rand(n, groups, generator=gen) * 1e-3
    args = (q, scale, ops.linear_prepack(weight, bits, size), weight_scale, torch.rand(n), out_scale, 3, bits, size)
    y = ops.linear_packed_per_token(*args)
    assert torch.equal(y, linear_packed.linear_packed_per_token.reference(*args))
    if out_scale is None:
        spread = [part.double().repeat_interleave(size, -1)[..., :k] for part in (scale, weight_scale)]
        exact = ((q.double() - TOKEN_ZERO_POINT) * spread[0]) @ (weight.double() * spread[1]).t() + args[4].double()
        # A few roundings of 2^-24 for each group, of sums that are below 128 * 127 * k * 1e-3.
        assert (y.double() - exact).abs().max() <= 2**-22 * groups * (17 * k + 1)


@pytest.mark.parametrize("size", [0, 32])
def test_gates_and_norms_round_their_rows_to_four_bits(size: int) -> None:
    # As in tests/test_ops_qgate.py, the kernels round the very floats that are known here.
    y = torch.randint(-1000, 1000, (50, 256), generator=torch.Generator().manual_seed(0)).float()
    z = torch.full_like(y, 256.0)
    want, want_scale = int8_per_token(y * 256, 4, size)
    q, scale = ops.qgate_per_token(y, 1.0, 0, z, 1.0, 0, None, False, 4, size)
    assert torch.equal(q.int(), want.int() + TOKEN_ZERO_POINT) and torch.equal(scale, want_scale)
    x, weight = rows((50, 96), 1), torch.rand(96) + 0.5
    norm, gated, gate = (x, None, weight, 1e-5, None, 0), (x, x, weight, 1e-5, True, None, 0), (x, 1.0, 0, x, 1.0, 0)
    for operator, args in (
        (qrms_norm.qrms_norm, norm),
        (qgated_norm.qgated_norm, gated),
        (qgate.qgate_per_token, (*gate, weight, True)),
    ):
        got, wanted = operator(*args, 4, size), operator.reference(*args, 4, size)
        off = (got[0].int() - wanted[0].int()).abs()
        # Errors of about 1e-5 steps move as many values over one boundary; ten times that is allowed for.
        assert off.max() <= 1 and off.double().mean() < 1e-4
        low, high = (limit + TOKEN_ZERO_POINT for limit in TOKEN_LIMITS[4])
        assert (int(got[0].min()), int(got[0].max())) == (low, high)
        torch.testing.assert_close(got[1], wanted[1], rtol=1e-5, atol=0)
        assert got[1].shape == (50, 96 // size if size else 1)


def test_the_reach_is_that_of_least_error_in_groups() -> None:
    """Of values as a rotation leaves them, in groups as the recipes have them (docs/low_bits.md)."""
    x = rows((4000, 64), 0)

    def error(reach: float) -> float:
        scale = x.abs().amax(-1, keepdim=True) / reach
        return float(((x / scale).round().clamp(*TOKEN_LIMITS[4]) * scale - x).square().mean())

    q, scale = int8_per_token(x, 4)
    assert float((q * scale - x).square().mean()) == pytest.approx(error(TOKEN_REACH[4]), rel=1e-5)
    # 7 cuts nothing.
    assert all(error(TOKEN_REACH[4]) < error(other) for other in (7, 7.5, 8.5, 9, 10))


def test_infinities_and_zeros_in_four_bits() -> None:
    x = torch.ones(4, 20)
    x[1, 3], x[2, 5], x[3] = float("nan"), float("inf"), 0.0
    for q, scale in (ops.quantize_per_token(x, 4), linear_packed.quantize_per_token.reference(x, 4)):
        assert scale.isnan().flatten().tolist() == [False, True, True, False]
        assert q[0].eq(TOKEN_ZERO_POINT + TOKEN_LIMITS[4][1]).all() and q[1:].eq(TOKEN_ZERO_POINT).all()


@pytest.mark.parametrize(
    "call",
    [
        lambda x: ops.quantize_per_token(x, 5),
        lambda x: ops.qgate_per_token(x, 1.0, 0, x, 1.0, 0, None, False, 5),
        lambda x: ops.qrms_norm(x, None, None, 1e-5, None, 0, 5),
        lambda x: ops.qgated_norm(x, x, None, 1e-5, False, None, 0, 5),
    ],
)
def test_other_widths_are_refused(call: Callable[[Tensor], Any]) -> None:
    with pytest.raises(MqAoError, match="tokens are quantized to 8 or 4 bits, not to 5"):
        call(torch.ones(2, 16))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: ops.quantize_per_token(x, 4, 5),
        lambda x: ops.qgate_per_token(x, 1.0, 0, x, 1.0, 0, None, False, 4, 5),
        lambda x: ops.qrms_norm(x, None, None, 1e-5, None, 0, 4, 5),
        lambda x: ops.qgated_norm(x, x, None, 1e-5, False, None, 0, 4, 5),
    ],
)
def test_groups_that_do_not_divide_a_row_are_refused(call: Callable[[Tensor], Any]) -> None:
    with pytest.raises(MqAoError, match="groups of 5 values do not divide rows of 16"):
        call(torch.ones(2, 16))


@pytest.mark.parametrize("backend", ["native", "inductor"])
def test_programs_hold_tokens_of_four_bits(backend: str, tiny: MambaLM, calibration: list[Tensor]) -> None:
    quantized = mq_ao.quantize(tiny, calibration, "mambaquant-w4a4", backend=backend)
    assert "int4 per token and group input; inputs are held in 8 bits" in str(quantized.report())
    program = quantized.lower(backend)
    ids = tokens(2, 19)
    with torch.no_grad():
        expected = quantized.converted(ids, *tiny.initial_states(2))
    for got, wanted in zip(program(ids), expected, strict=True):
        assert float((got - wanted).norm() / wanted.norm()) < FLIPPED_STEP


def test_norms_and_gates_give_four_bits_in_native_programs(tiny: MambaLM, calibration: list[Tensor]) -> None:
    program = mq_ao.quantize(tiny, calibration, "mambaquant-w4a4").lower("native")
    calls = [(step.target, tuple(step.arguments[-2:])) for step in program.saved.plan.steps]
    # One norm of 64 channels and one gate of 128 in each of two blocks; the head reads 8 bits.
    assert sorted(options for target, options in calls if "qrms_norm" in target) == [(4, 0), (4, 0), (8, 0)]
    assert [options for target, options in calls if "qgate_per_token" in target] == [(4, 64), (4, 64)]


def test_gated_norms_of_mamba2_in_four_bits() -> None:
    torch.manual_seed(0)
    model = language_model(Mamba2Config(vocab_size=VOCAB, d_model=64, n_layer=2, d_state=16, headdim=16)).eval()
    quantized = mq_ao.quantize(model, [tokens(2, 32, seed=seed) for seed in (1, 2)], "quarot-w4a4")
    program = quantized.lower("native")
    norms = [step.arguments for step in program.saved.plan.steps if "qgated_norm" in step.target]
    assert [tuple(arguments[-2:]) for arguments in norms] == [(4, 64), (4, 64)]
    ids = tokens(1, 19)
    with torch.no_grad():
        expected = quantized.converted(ids, *model.initial_states(1))[0]
    assert float((program(ids)[0] - expected).norm() / expected.norm()) < FLIPPED_STEP


def test_the_simulation_reaches_as_far_as_the_kernels(tiny: MambaLM, calibration: list[Tensor]) -> None:
    module = mq_ao.quantize(tiny, calibration, "mambaquant-w4a4").converted
    chosen = list(walk.calls(module, {torch.ops.torchao.choose_qparams_affine}))
    four = [node for node in chosen if node.args[5] == TOKEN_REACH[4]]
    assert len(four) == 4 and [node.args[5] for node in chosen if node not in four] == [TOKEN_REACH[8]]
    assert {tuple(node.args[2]) for node in four} == {(1, 1, 64)}
    limits = {tuple(node.args[5:7]) for node in walk.calls(module, {torch.ops.torchao.quantize_affine})}
    assert limits == {TOKEN_LIMITS[4], TOKEN_LIMITS[8]}


def test_groups_that_do_not_divide_the_channels_leave_one_scale_a_token(
    tiny: MambaLM, calibration: list[Tensor]
) -> None:
    spec = RoleSpec(Activation.PER_GROUP, bits=4, group_size=48, activation_bits=4)
    recipe = Recipe("groups", QuantizationConfig({Role.IN_PROJ: spec}))
    program = mq_ao.quantize(tiny, calibration, recipe).lower("native")
    assert sum(count for name, count in program.integer_kernels.items() if "per_token" in name) == 4


def test_plans_of_earlier_versions_have_fewer_arguments() -> None:
    """Files that were saved before an operator got another argument, with a default, still run."""
    x = rows((3, 16), 0)
    for arguments, bits in (((Value(0),), 8), ((Value(0), 4), 4), ((Value(0), 4, 0), 4)):
        plan = Plan(1, (Step("mq_ao::quantize_per_token.default", arguments, (1, 2)),), (1, 2)).bound([])
        assert all(map(torch.equal, plan.run([x]), ops.quantize_per_token(x, bits)))
    with pytest.raises(RuntimeError, match="mq_ao::quantize_per_token takes 3 arguments"):
        Plan(1, (Step("mq_ao::quantize_per_token.default", (), (1, 2)),), (1, 2)).bound([])


@pytest.mark.parametrize("backend", ["executorch", "cuda"])
def test_backends_without_such_kernels_refuse_them(backend: str) -> None:
    spec = RoleSpec(Activation.PER_TOKEN, activation_bits=4)
    with pytest.raises(MqAoError, match=f"'{backend}' has no kernel for out_proj with int4 per token input: it takes"):
        MambaQuantizer(backend).set_role(Role.OUT_PROJ, spec)
    grouped = replace(spec, activation=Activation.PER_GROUP, group_size=64)
    with pytest.raises(MqAoError, match=f"'{backend}' has no integer kernel for out_proj with activation per_group"):
        MambaQuantizer(backend).set_role(Role.OUT_PROJ, grouped)


def test_keys_and_values_stay_in_eight_bits() -> None:
    with pytest.raises(MqAoError, match="keys and values are held in 8 bits"):
        MambaQuantizer().set_role(Role.KV_CACHE, RoleSpec(Activation.PER_TOKEN, activation_bits=4))


def test_training_rounds_as_the_program_does(tiny: MambaLM, calibration: list[Tensor]) -> None:
    grouped = RoleSpec(Activation.PER_GROUP, group_size=32, activation_bits=4)
    whole = RoleSpec(Activation.PER_TOKEN, activation_bits=4)
    scheme = QuantizationConfig({Role.IN_PROJ: grouped, Role.OUT_PROJ: whole})
    trained = mq_ao.prepare_qat(tiny, calibration, Recipe("a4", scheme)).eval()
    quantized = mq_ao.quantize(tiny, calibration, Recipe("a4", scheme))
    ids, states = tokens(2, 19), tiny.initial_states(2)
    with torch.no_grad():
        got, expected = trained(ids, *states)[0], quantized.converted(ids, *states)[0]
    assert float((got - expected).norm() / expected.norm()) < FLIPPED_STEP


def test_rotations_are_what_four_bits_need() -> None:
    """On the bundled model and its own text, with outliers as larger models have them: the purpose of it all."""
    from mq_ao.models import demo
    from mq_ao.passes.plant_outliers import PlantOutliers

    model = MambaLM.from_pretrained("demo")
    text = torch.tensor(list(demo.CALIBRATION.read_bytes()))
    batches, ids = text[: 8 * 512].view(8, 512).split(2), text[-4 * 256 :].view(4, 256)
    states = model.initial_states(4)

    def divergence(recipe: Recipe) -> float:
        with torch.no_grad():
            log_q = mq_ao.quantize(model, batches, recipe).converted(ids, *states)[0].log_softmax(-1)
            log_p = model(ids)[0].log_softmax(-1)
        return float(torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)) / 256

    def planted(name: str) -> float:
        return divergence(replace(RECIPES[name], passes=(PlantOutliers(30), *RECIPES[name].passes)))

    rtn, ours = planted("rtn-w4a4"), planted("mambaquant-w4a4")
    assert ours < 0.1
    assert rtn > 5 * ours
