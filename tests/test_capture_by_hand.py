"""Scans that a model writes out in Python: our operator in their place, or a refusal that says how to get it there."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import silu

import mq_ao
from mq_ao import MqAoError, export
from mq_ao.capture import SelectiveScan, unrolled, using_scans
from mq_ao.graph import match
from mq_ao.lowering import inductor
from tests import by_hand
from tests.by_hand import (
    Block,
    CumsumBlock,
    MinimalBlock,
    OwnBlock,
    PscanBlock,
    ReferenceBlock,
    Stack,
    WithoutDBlock,
    selective_scan_ref,
)
from tests.captured import difference, operators

AUTO = SelectiveScan()
OPAQUE = SelectiveScan(x="signal", dt="steps", A_log="decays", B="into", C="out")


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 24, shape, generator=torch.Generator().manual_seed(seed))


def refusal(model: nn.Module, scans: dict[Any, SelectiveScan] | None, *args: Any) -> str:
    with pytest.raises(MqAoError) as error:
        export(model, args or (ids(2, 10),), scans=scans)
    return str(error.value)


@pytest.mark.parametrize(
    ("kind", "key", "given"),
    [
        (MinimalBlock, "MinimalBlock.selective_scan", AUTO),
        (MinimalBlock, "tests.by_hand.MinimalBlock.selective_scan", AUTO),
        (MinimalBlock, MinimalBlock.selective_scan, SelectiveScan(x="u", dt="delta", A="A", B="B", C="C", D="D")),
        (PscanBlock, "PscanBlock.selective_scan", AUTO),
        (CumsumBlock, "CumsumBlock.selective_scan", AUTO),
        (ReferenceBlock, "tests.by_hand.selective_scan_ref", AUTO),
        (ReferenceBlock, "selective_scan_ref", SelectiveScan(layout="channel_first", BC_layout="channel_first")),
        (ReferenceBlock, selective_scan_ref, AUTO),
        (OwnBlock, "OwnBlock.scan", AUTO),
        (OwnBlock, "OwnBlock.mixed", AUTO),
        (OwnBlock, "OwnBlock.scan", SelectiveScan(A_log="self.A_log", D="self.D", dt_bias="self.dt_proj.bias")),
        (WithoutDBlock, "WithoutDBlock.run", OPAQUE),
        (WithoutDBlock, WithoutDBlock.run, OPAQUE),
    ],
)
def test_swapped(kind: type[Block], key: Any, given: SelectiveScan) -> None:
    model = Stack(kind)
    before = {owner: dict(vars(owner)) for owner in (by_hand, kind)}
    program = export(model, (ids(2, 10),), scans={key: given})
    assert {owner: dict(vars(owner)) for owner in (by_hand, kind)} == before
    assert operators(program)["selective_scan"] == 2
    for batch, length in ((1, 1), (3, 17), (1, 16)):
        x = ids(batch, length, seed=length)
        # float32: sums in another order.
        assert difference(program.module()(x), model(x)) < 1e-6


@pytest.mark.parametrize("kind", [OwnBlock, ReferenceBlock])
@pytest.mark.parametrize("length", [2 * by_hand.D_MODEL, by_hand.D_STATE])
def test_lengths_that_do_not_tell_axes_apart(kind: type[Block], length: int) -> None:
    model = Stack(kind)
    key: Any = OwnBlock.scan if kind is OwnBlock else selective_scan_ref
    program = export(model, (ids(2, length),), scans={key: AUTO})
    # float32: sums in another order.
    assert difference(program.module()(ids(3, 7)), model(ids(3, 7))) < 1e-6


def test_one_step_does_not_tell() -> None:
    with pytest.raises(MqAoError, match="a scan of one step does not show what it computes"):
        export(Stack(OwnBlock), (ids(2, 1),), dynamic_shapes=(None,), scans={"OwnBlock.scan": AUTO})


def test_of_one_part_each() -> None:
    model = Stack(OwnBlock)
    scans = {"layers.0.scan": AUTO, "layers.1.scan": SelectiveScan(dt_softplus=True, last_state=True)}
    assert operators(export(model, (ids(2, 10),), scans=scans))["selective_scan"] == 2
    assert not {"scan", "mixed"} & {name for layer in model.layers for name in vars(layer)}


class Recurrence(nn.Module):
    """A scan that is a module, with a buffer for what is usually a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("A", -torch.rand(2 * by_hand.D_MODEL, by_hand.D_STATE))

    def forward(self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, return_state: bool = True) -> Any:
        y, last = by_hand.loop(*by_hand.discretised(x, dt, self.A, B), C)
        return [y, last] if return_state else y


class ModularBlock(Block):
    def __init__(self) -> None:
        super().__init__()
        self.recurrence = Recurrence()

    def mixed(self, u: Tensor, dt: Tensor, B: Tensor, C: Tensor, z: Tensor) -> Tensor:
        y: Tensor = self.recurrence(u, torch.sigmoid(dt), B, C)[0]
        return y * silu(z)


@pytest.mark.parametrize(
    "scans", [{"Recurrence.forward": AUTO}, dict.fromkeys(("layers.0.recurrence", "layers.1.recurrence"), AUTO)]
)
def test_a_scan_that_is_a_module(scans: dict[Any, SelectiveScan]) -> None:
    model = Stack(ModularBlock)
    program = export(model, (ids(2, 10),), scans=scans)
    assert operators(program)["selective_scan"] == 2
    # float32: sums in another order.
    assert difference(program.module()(ids(3, 5)), model(ids(3, 5))) < 1e-6


def test_in_double_precision() -> None:
    model = Stack(OwnBlock).double()
    program = export(model, (ids(2, 10),), scans={OwnBlock.scan: AUTO})
    assert difference(program.module()(ids(3, 5)), model(ids(3, 5))) < 1e-13


def test_in_half_precision() -> None:
    model = Stack(OwnBlock).bfloat16()
    program = export(model, (ids(2, 10),), scans={OwnBlock.scan: AUTO})
    # bfloat16 has 8 bits, and the loop rounds at every step.
    assert difference(program.module()(ids(3, 5)).float(), model(ids(3, 5)).float()) < 0.05


def test_a_model_that_does_not_run() -> None:
    message = refusal(Stack(OwnBlock), {OwnBlock.scan: AUTO}, ids(2, 10) + 24)
    assert "does not run on the example inputs: index out of range" in message
    assert "there is no such method" in refusal(Stack(OwnBlock), {"OwnBlock.no": AUTO}, ids(2, 10) + 24)


def test_a_loop_that_is_left_is_refused() -> None:
    message = refusal(Stack(OwnBlock), {"layers.0.scan": AUTO})
    assert "a Python loop over the sequence" in message
    assert "scans={'OwnBlock.scan': SelectiveScan()}" in message


class ScriptedBlock(MinimalBlock):
    """A scripted function, held by the module, that wants the initial state."""

    def __init__(self) -> None:
        super().__init__()
        self.function = scripted

    def mixed(self, u: Tensor, dt: Tensor, B: Tensor, C: Tensor, z: Tensor) -> Tensor:
        h0 = torch.zeros(u.shape[0], *self.A_log.shape)
        y, _ = self.function(u, torch.sigmoid(dt), -torch.exp(self.A_log), B, C, h0)
        return y * silu(z)


@torch.jit.script
def scripted(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
    h, ys = h0, []
    for t in range(x.shape[1]):
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * x[:, t])[:, :, None] * B[:, t, None]
        ys.append((h * C[:, t, None]).sum(-1))
    return torch.stack(ys, dim=1), h


class KeywordBlock(MinimalBlock):
    """A compiled method with operands among its keywords."""

    def mixed(self, u: Tensor, dt: Tensor, B: Tensor, C: Tensor, z: Tensor) -> Tensor:
        A = -torch.exp(self.A_log)
        y: Tensor = self.ssm(u, delta=torch.sigmoid(dt), A=A, B=B.unsqueeze(2), C=C.unsqueeze(2), z=z)
        return y

    @torch.compile
    def ssm(self, u: Tensor, **operands: Tensor) -> Tensor:
        x, B, C = (value.squeeze(2) if value.dim() == 4 else value for value in (u, operands["B"], operands["C"]))
        y, _ = by_hand.loop(*by_hand.discretised(x, operands["delta"], operands["A"], B), C)
        return y * silu(operands["z"])


class Pscan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        return by_hand.loop(*by_hand.discretised(x, dt, A, B), C)[0]


pscan_fn = Pscan.apply


class AutogradBlock(MinimalBlock):
    def mixed(self, u: Tensor, dt: Tensor, B: Tensor, C: Tensor, z: Tensor) -> Tensor:
        y: Tensor = pscan_fn(u, torch.sigmoid(dt), -torch.exp(self.A_log), B, C)
        return y * silu(z)


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        (ScriptedBlock, scripted),
        (KeywordBlock, "KeywordBlock.ssm"),
        (AutogradBlock, "pscan_fn"),
        (AutogradBlock, "tests.test_capture_by_hand.Pscan.forward"),
    ],
)
def test_functions_of_other_kinds(kind: type[Block], key: Any) -> None:
    model = Stack(kind, count=1)
    program = export(model, (ids(2, 10),), scans={key: AUTO})
    assert operators(program)["selective_scan"] == 1
    with torch.compiler.set_stance("force_eager"):
        # float32: sums in another order.
        assert difference(program.module()(ids(3, 5)), model(ids(3, 5))) < 1e-6


@pytest.mark.parametrize(
    ("kind", "key", "given", "wanted"),
    [
        (
            MinimalBlock,
            "MinimalBlock.selective_scan",
            SelectiveScan(dt_softplus=True),
            "They agree with dt_softplus=False: the softplus is outside",
        ),
        (
            MinimalBlock,
            "MinimalBlock.selective_scan",
            SelectiveScan(D=None),
            "They agree with D='D': D x is added inside",
        ),
        (
            MinimalBlock,
            "MinimalBlock.selective_scan",
            SelectiveScan(A_log="A"),
            "They agree with A='A', A_log=None: A is given as it is",
        ),
        (
            MinimalBlock,
            "MinimalBlock.selective_scan",
            SelectiveScan(layout="channel_first"),
            "They agree with layout='channel_last': channels are the last axis",
        ),
        (
            MinimalBlock,
            "MinimalBlock.selective_scan",
            SelectiveScan(B="C", C="B", dt_softplus=True),
            "They agree with B='B', C='C', dt_softplus=False: B and C are the other way round, and the softplus is out",
        ),
        (
            WithoutDBlock,
            "WithoutDBlock.run",
            SelectiveScan(x="signal", dt="steps", A="decays", B="into", C="out"),
            "They agree with A=None, A_log='decays'",
        ),
        (OwnBlock, "OwnBlock.scan", SelectiveScan(dt_bias=None), "They agree with dt_bias='self.dt_proj.bias'"),
    ],
)
def test_wrong_readings(kind: type[Block], key: str, given: SelectiveScan, wanted: str) -> None:
    message = refusal(Stack(kind), {key: given})
    assert key in message
    assert wanted in message
    # How far they are apart, unless ours cannot take the shapes at all.
    assert re.search(r"(y|last state) by [01]\.\d+ of its largest value", message) or "must have shape" in message


class MaskedBlock(MinimalBlock):
    """Computes something else: steps are masked, by default none."""

    def selective_scan(self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        return self.masked(u, delta, A, B, C, D, torch.ones(u.shape[:2], dtype=torch.int64))

    def masked(
        self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        delta = delta if mask is None else delta * mask[..., None]
        return super().selective_scan(u, delta, A, B, C, D)


class ZohBlock(MinimalBlock):
    """B is discretised exactly, where Mamba takes dt B."""

    def selective_scan(self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        decay, _ = by_hand.discretised(u, delta, A, B)
        return by_hand.loop(decay, (decay - 1) / A * (u.unsqueeze(-1) * B.unsqueeze(2)), C)[0] + u * D


@pytest.mark.parametrize(("kind", "name"), [(MaskedBlock, "masked"), (ZohBlock, "selective_scan")])
def test_another_scan(kind: type[Block], name: str) -> None:
    message = refusal(Stack(kind), {f"{kind.__name__}.{name}": AUTO})
    assert "differ on random inputs: y by " in message
    assert "No other way to read its parameters agrees either: does it discretise in another way?" in message
    assert ("Its parameters mask are no operands" in message) == (kind is MaskedBlock)


class TwoWaysBlock(Block):
    """One method for both directions."""

    def mixed(self, u: Tensor, dt: Tensor, B: Tensor, C: Tensor, z: Tensor) -> Tensor:
        operands = (u, torch.sigmoid(dt), -torch.exp(self.A_log), B, C, self.D)
        return self.one_way(*operands) + self.one_way(*operands, reverse=True)

    def one_way(
        self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, reverse: bool = False
    ) -> Tensor:
        if reverse:
            u, delta, B, C = (value.flip(1) for value in (u, delta, B, C))
        y, _ = by_hand.loop(*by_hand.discretised(u, delta, A, B), C)
        y = y + u * D
        return y.flip(1) if reverse else y


def test_options_that_our_scan_does_not_know() -> None:
    message = refusal(Stack(TwoWaysBlock), {"TwoWaysBlock.one_way": AUTO})
    assert "differ on the model's own inputs of another call: y by" in message
    assert "does the function compute something else for other options?" in message


def test_sums_that_lose_accuracy_with_the_length() -> None:
    message = refusal(Stack(CumsumBlock), {"CumsumBlock.selective_scan": AUTO}, ids(2, 90))
    assert "differ on the model's own inputs" in message
    assert "loses accuracy with the length" in message


def test_of_discretised_operands() -> None:
    message = refusal(Stack(PscanBlock), {"tests.by_hand.pscan": AUTO})
    assert "one of (2, 10, 32, 4), are not those of Mamba-1's scan" in message
    assert "name the function around it that takes x, dt, A, B and C, which is 'PscanBlock.selective_scan'" in message


@pytest.mark.parametrize(
    ("key", "given", "wanted"),
    [
        ("MinimalBlock.nothing", AUTO, "there is no such method .*It calls .*MinimalBlock.selective_scan"),
        ("nowhere.at_all", AUTO, "there is no such method"),
        ("tests.by_hand.selective_scan_ref", AUTO, "is never called by the model.*MinimalBlock.selective_scan"),
        ("MinimalBlock.selective_scan", SelectiveScan(dt="step"), "it has no parameter 'step', only u, delta, A, B"),
        ("MinimalBlock.selective_scan", SelectiveScan(D="self.skip"), "there is no self.skip"),
        ("tests.by_hand.loop", AUTO, "If they are discretised"),
        ("tests.by_hand.discretised", SelectiveScan(C="B"), "returns 2 values|its y is"),
        ("MinimalBlock.mixed", SelectiveScan(x="z", z="u"), "differ on random inputs"),
        ("MinimalBlock.forward", AUTO, r"none of its parameters \(x\) is named like dt: give dt="),
        ("MinimalBlock.selective_scan", "auto", "give a mq_ao.capture.SelectiveScan"),
    ],
)
def test_keys_and_names(key: str, given: Any, wanted: str) -> None:
    with pytest.raises(MqAoError, match=wanted):
        export(Stack(MinimalBlock), (ids(2, 10),), scans={key: given})


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"layout": "bdl"}, "it is 'channel_last' or 'channel_first'"),
        ({"A": "A", "A_log": "A_log"}, "one of A and A_log"),
        ({"A": None, "A_log": None}, "one of A and A_log"),
        ({"x": None}, "x is None"),
        ({"D": True}, "D is True"),
        ({"dt": ""}, "dt is ''"),
        ({"dt_softplus": None}, "dt_softplus is None"),
    ],
)
def test_options(options: dict[str, Any], wanted: str) -> None:
    with pytest.raises(MqAoError, match=wanted):
        SelectiveScan(**options)


def test_put_back_after_an_error() -> None:
    class Breaks(MinimalBlock):
        def mixed(self, *operands: Tensor) -> Tensor:
            y = super().mixed(*operands)
            if torch.compiler.is_exporting():
                raise MqAoError("as it happens")
            return y

    before = MinimalBlock.selective_scan
    message = refusal(Stack(Breaks), {"MinimalBlock.selective_scan": AUTO})
    assert message == "layers.0 (Breaks) cannot be captured: as it happens"
    assert MinimalBlock.selective_scan is before


@pytest.mark.parametrize(
    ("kind", "place", "key"),
    [
        (MinimalBlock, "in tests.by_hand.loop", "MinimalBlock.selective_scan"),
        (PscanBlock, "in tests.by_hand.pscan", "PscanBlock.selective_scan"),
        (ReferenceBlock, "in tests.by_hand.loop", "tests.by_hand.selective_scan_ref"),
        (OwnBlock, "in tests.by_hand.loop", "OwnBlock.scan"),
        (ScriptedBlock, "in ScriptedBlock.mixed", "ScriptedBlock.mixed"),
        (KeywordBlock, "in tests.by_hand.loop", "KeywordBlock.mixed"),
        (AutogradBlock, "in tests.by_hand.loop", "tests.test_capture_by_hand.Pscan.forward"),
    ],
)
def test_loops_are_refused_before_the_trace(
    kind: type[Block], place: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def traced(*args: Any, **kwargs: Any) -> None:
        pytest.fail("the loop is traced")

    monkeypatch.setattr(torch.export, "export", traced)
    message = refusal(Stack(kind), None, ids(2, 1024))
    assert f"{by_hand.__file__ if 'by_hand.' in place else __file__}:" in message
    assert place in message
    assert f"scans={{{key!r}: SelectiveScan()}}" in message


class OneLength(nn.Module):
    """Positions are learned: it runs on one length alone."""

    def __init__(self, kind: type[Block], length: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(length, by_hand.D_MODEL))
        self.layers = nn.ModuleList(kind() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.positions
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("kind", [MinimalBlock, ReferenceBlock])
def test_loops_of_models_of_one_length_are_refused(kind: type[Block]) -> None:
    message = refusal(OneLength(kind, 96).eval(), None, torch.randn(2, 96, by_hand.D_MODEL))
    assert "a Python loop over the sequence" in message
    assert f"{kind.__module__}" in message


class Deep(nn.Module):
    """70 layers, each of which takes the heads apart one by one: lines that run often, whatever the length."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(70))

    def forward(self, x: Tensor) -> Tensor:
        for index in range(len(self.layers)):
            x = x + self.layers[index](x) * 0.1
            x = torch.stack([x[..., head] * 1.01 for head in range(x.shape[-1])], dim=-1)
        return x


@pytest.mark.parametrize("positions", [False, True])
def test_many_layers_are_no_loop(positions: bool) -> None:
    model: nn.Module = Deep()
    if positions:
        model = nn.Sequential(OneLength(Block, 70), model)
        model[0].layers = nn.ModuleList([nn.Linear(by_hand.D_MODEL, 8)])
    unrolled.refuse_loops(model.eval(), (torch.randn(2, 70, by_hand.D_MODEL if positions else 8),), {})


def test_recurrent_layers_of_torch_are_no_loop() -> None:
    model = nn.LSTM(by_hand.D_MODEL, 8, batch_first=True).eval()
    unrolled.refuse_loops(model, (torch.randn(2, 70, by_hand.D_MODEL),), {})


def test_looking_for_loops_changes_nothing() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x * 2

    model = Counts().eval()
    unrolled.refuse_loops(model, (torch.randn(2, 8),), {})
    assert model.calls == 0


def test_a_scan_that_is_not_named_is_pointed_to() -> None:
    graph = export(Stack(CumsumBlock), (ids(2, 10),)).module()
    with pytest.raises(MqAoError, match=r"of a scan of your own, name the function: mq_ao\.export\(\.\.\., scans="):
        match(graph)


def test_quantized_it_runs_in_integers() -> None:
    model = Stack(ReferenceBlock)
    calibration = [(ids(4, 32, seed=seed),) for seed in range(4)]
    with using_scans({"tests.by_hand.selective_scan_ref": AUTO}):
        quantized = mq_ao.quantize(model, calibration, "rtn-w8a8")
    assert "2 Mamba block(s)" in quantized.report().match
    integer = inductor.rewrite(quantized.converted)
    # in_proj, conv1d, x_proj, dt_proj and out_proj of two blocks and the head.
    assert sum(count for kernel, count in integer.kernels.items() if "linear" in kernel) == 9
    assert sum(integer.kernels.values()) == 11
    assert integer.simulated == []
    for batch, length in ((4, 32), (1, 1), (3, 50)):
        x = ids(batch, length, seed=9)
        with torch.no_grad():
            got, simulated, wanted = integer.module(x), quantized.converted(x), model(x)
        # A value on the border between two integers may fall to either side where sums are formed in another order.
        assert float((got - simulated).norm() / simulated.norm()) < 1e-2
        # Rounding to 8 bits on the way through two random blocks: a few parts in a hundred.
        assert float((got - wanted).norm() / wanted.norm()) < 0.1
    with pytest.raises(MqAoError, match="a Python loop over the sequence"):
        export(model, calibration[0])
