"""The exact rewrites: equal to the float model to 1e-9 in float64, on random and trained weights, and of use."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import mq_ao
from mq_ao import MqAoError, passes
from mq_ao.api import capture
from mq_ao.models import MambaConfig, MambaLM, demo
from mq_ao.ops import hadamard_matrix
from mq_ao.passes import Status, parse_pass
from mq_ao.passes.balance import balance
from mq_ao.passes.klt import flatness
from mq_ao.passes.low_rank import requests_for_dt
from tests.conftest import tokens

# Rewrites are computed in float64; what is left is rounding of some thousand operations.
EXACT = 1e-9

ALONE = [
    ("fold_norm",),
    ("smooth_norm",),
    ("smooth_gate",),
    ({"smooth_gate": {"alpha": 0.25, "size": "power"}},),
    ("smooth_state",),
    ({"smooth_state": {"partner": "input"}},),
    ("smooth_dt",),
    ("smooth_conv",),
    ("shift_dt",),
    ("fold_norm", "rotate_residual"),
    ("fold_norm", {"rotate_residual": {"basis": "hadamard"}}),
    ("rotate_dt",),
    ({"rotate_dt": {"basis": "hadamard"}},),
    ("rotate_out_proj",),
    ("expose_state",),
    ("expose_state", "rotate_state"),
    ("plant_outliers",),
]
EVERYTHING = (
    "plant_outliers",
    "fold_norm",
    "smooth_gate",
    "smooth_state",
    "smooth_dt",
    "smooth_conv",
    "shift_dt",
    "rotate_residual",
    "rotate_dt",
    "rotate_out_proj",
    "expose_state",
    "rotate_state",
)


def random_model(**changes: object) -> MambaLM:
    torch.manual_seed(3)
    shape = {"vocab_size": 256, "d_model": 48, "n_layer": 2, "d_state": 8, "dt_rank": 4}
    return MambaLM(MambaConfig(**(shape | changes))).eval().double()


def trained_model(layers: int = 1) -> MambaLM:
    """The bundled model's first layers: float64 scans run step by step in Python."""
    model = MambaLM.from_pretrained("demo").double()
    model.config = dataclasses.replace(model.config, n_layer=layers)
    model.backbone.layers = model.backbone.layers[:layers]
    return model


def batches(model: MambaLM, count: int = 2) -> list[tuple[Tensor, ...]]:
    return [(tokens(16, 24, seed=50 + i), *model.initial_states(16)) for i in range(count)]


def real_batches(model: MambaLM) -> list[tuple[Tensor, ...]]:
    ids = torch.tensor(list(demo.CALIBRATION.read_bytes()[: 32 * 24])).view(32, 24)
    return [(ids, *model.initial_states(32))]


def logits(module: Callable[..., tuple[Tensor, ...]], model: MambaLM) -> Tensor:
    """Of 11 tokens at once, and of 7 more from the carried states."""
    ids = tokens(2, 18, seed=7)
    with torch.no_grad():
        first, *states = module(ids[:, :11], *model.initial_states(2))
        return torch.cat([first, module(ids[:, 11:], *states)[0]], 1)


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("names", [*ALONE, EVERYTHING], ids=lambda names: "+".join(map(str, names))[-60:])
def test_every_pass_is_exact_on_random_weights(names: tuple[str, ...]) -> None:
    model = random_model()
    before = copy.deepcopy(model.state_dict())
    rewrite = passes.apply(capture(model, ()), [parse_pass(item) for item in names], batches(model))
    assert relative(logits(rewrite.module, model), logits(model, model)) < EXACT
    assert all(item.status is Status.APPLIED for item in rewrite.transforms)
    # The user's model keeps its weights.
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_all_passes_together_are_exact_on_trained_weights() -> None:
    model = trained_model(2)
    rewrite = passes.apply(capture(model, ()), EVERYTHING, real_batches(model))
    assert relative(logits(rewrite.module, model), logits(model, model)) < EXACT


@pytest.mark.parametrize("names", ALONE, ids=lambda names: "+".join(map(str, names))[-60:])
def test_every_pass_is_exact_on_trained_weights(names: tuple[str, ...]) -> None:
    model = trained_model()
    rewrite = passes.apply(capture(model, ()), [parse_pass(item) for item in names], real_batches(model))
    assert relative(logits(rewrite.module, model), logits(model, model)) < EXACT


@pytest.mark.parametrize("changes", [{"bias": True}, {"conv_bias": False}, {"tie_embeddings": False}])
def test_variants_of_the_model(changes: dict[str, bool]) -> None:
    model = random_model(**changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))  # no zero biases
    rewrite = passes.apply(capture(model, ()), EVERYTHING, batches(model))
    assert relative(logits(rewrite.module, model), logits(model, model)) < EXACT


@pytest.mark.parametrize("name", passes.PASSES)
def test_a_second_application_is_refused(name: str) -> None:
    model = random_model()
    needs = {"rotate_residual": ["fold_norm"], "rotate_state": ["expose_state"]}
    graph = passes.apply(capture(model, ()), [*needs.get(name, []), name], batches(model)).module
    with pytest.raises(MqAoError, match=f"pass {name} was applied to this graph before"):
        passes.apply(graph, [name], batches(model))


def test_klt_makes_variances_flat_and_hadamard_does_not() -> None:
    model = trained_model(2)
    names = ["fold_norm", "rotate_residual", "rotate_dt"]
    rewrite = passes.apply(capture(model, ()), names, real_batches(model))
    assert len(rewrite.profiles) == 1 + 2
    for profile in rewrite.profiles:
        assert flatness(profile.after) <= 1.01
        assert flatness(profile.hadamard) > 1.2
    # Measured afresh on the rewritten graph, and not only computed from the covariance.
    requests = requests_for_dt(rewrite, covariance=True)
    again = passes.collect(rewrite.module, requests, real_batches(model))
    for request in requests:
        assert flatness(again[request.node].covariance().diagonal()) <= 1.01
    (stream,) = rewrite.streams
    requests = [passes.Request(node.name, covariance=True) for node in stream.inputs]
    values = list(passes.collect(rewrite.module, requests, real_batches(model)).values())
    pooled = values[0]
    for item in values[1:]:
        pooled = pooled.merged(item)
    assert flatness(pooled.covariance().diagonal()) <= 1.01


def test_statistics_follow_the_rewrites() -> None:
    model = trained_model()
    names = ["fold_norm", "smooth_gate", "smooth_dt", "smooth_conv", "shift_dt"]
    rewrite = passes.apply(capture(model, ()), names, real_batches(model))
    known = {name: value for name, value in rewrite.statistics.items() if not name.endswith("_states")}
    again = passes.collect(rewrite.module, [passes.Request(name) for name in known], real_batches(model))
    for name, value in known.items():
        torch.testing.assert_close(again[name].low, value.low, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(again[name].squares, value.squares, rtol=1e-9, atol=1e-9)


def test_smoothing_levels_outliers_that_were_planted() -> None:
    """One static range serves all channels well: the ratio of the largest to the median channel comes down."""
    model = trained_model()

    def spread(names: list[str]) -> list[float]:
        graph = passes.apply(capture(model, ()), names, real_batches(model)).module
        rewrite = passes.Rewrite(graph)
        nodes = [block.out_input.name for block in rewrite.blocks]
        nodes += [node.name for d in rewrite.directions for node in (d.dt, d.conv_input, d.c) if node is not None]
        found = passes.collect(graph, map(passes.Request, nodes), real_batches(model))
        return [float(found[name].maximum.max() / found[name].maximum.median()) for name in nodes]

    planted = spread(["plant_outliers"])
    smooth = spread(["plant_outliers", "smooth_gate", "smooth_state", "smooth_dt", "smooth_conv"])
    assert min(planted) > 10
    assert all(after < before / 5 for before, after in zip(planted, smooth, strict=True))


def test_balance() -> None:
    a, w = torch.tensor([8.0, 2.0, 0.5]), torch.tensor([1.0, 1.0, 4.0])
    scales = balance(a, w, 0.5)
    # At one half, activation and weight have the same share of every channel, up to the common factor.
    ratio = (a / scales) / (w * scales)
    torch.testing.assert_close(ratio, ratio[:1].expand(3))
    assert math.isclose(float(scales.log().sum()), 0, abs_tol=1e-6)
    flat = a / balance(a, w, 1.0)
    torch.testing.assert_close(flat, flat[:1].expand(3))


def test_balanced_powers_leave_a_rotation_the_least_to_carry() -> None:
    model = trained_model()

    def carried(names: list[object]) -> float:
        """Power of out_proj's input times that of its weight: what a rotation spreads over both of their grids."""
        given = [parse_pass(item) for item in names]
        graph = passes.apply(capture(model, ()), given, real_batches(model)).module
        rewrite = passes.Rewrite(graph)
        (block,) = rewrite.blocks
        found = passes.collect(graph, [passes.Request(block.out_input.name)], real_batches(model))
        power = float(found[block.out_input.name].power.square().sum())
        return power * float(rewrite.power_by_column(block.out_proj).square().sum())

    powers, largest = carried([{"smooth_gate": {"size": "power"}}]), carried(["smooth_gate"])
    # By Cauchy and Schwarz no scales do better than those that balance powers evenly.
    assert powers < min(largest, carried([]))
    assert powers == pytest.approx(
        carried([{"plant_outliers": {"factor": 10}}, {"smooth_gate": {"size": "power"}}]), rel=1e-6
    )


def test_dead_and_extreme_channels_are_bounded() -> None:
    scales = balance(torch.tensor([0.0, 1e-30, 1.0, 1e30]), torch.tensor([1.0, 1.0, 0.0, 1.0]), 0.5)
    assert scales[0] == scales[2] == 1
    assert scales.isfinite().all() and scales.min() >= 0.01 and scales.max() <= 100
    assert torch.equal(balance(torch.zeros(3), torch.ones(3), 0.5), torch.ones(3))


def test_a_model_with_dead_and_constant_channels() -> None:
    model = random_model()
    with torch.no_grad():
        mixer = model.backbone.layers[0].mixer
        mixer.in_proj.weight[5] = 0  # conv input and scan input constant
        mixer.x_proj.weight[1] = 0  # one channel of dt's low rank is 0
        mixer.out_proj.weight[:, 3] = 0
        model.backbone.layers[1].norm.weight[2] = 0
    rewrite = passes.apply(capture(model, ()), EVERYTHING[1:], batches(model))
    assert relative(logits(rewrite.module, model), logits(model, model)) < EXACT


def test_too_few_tokens_fall_back_to_hadamard(caplog: pytest.LogCaptureFixture) -> None:
    model = random_model()
    few = [(tokens(2, 8), *model.initial_states(2))]
    rewrite = passes.apply(capture(model, ()), ["fold_norm", "rotate_residual"], few)
    assert "too few for the covariance of 48 channels" in caplog.text
    (note,) = [item for item in rewrite.transforms if item.step == "R1"]
    assert note.status is Status.APPLIED and "Hadamard: 48 tokens are too few" in note.detail
    assert relative(logits(rewrite.module, model), logits(model, model)) < EXACT


def test_sizes_without_a_hadamard_matrix_are_left_out_and_named() -> None:
    model = random_model(d_model=46, dt_rank=3, d_state=6)
    names = ["fold_norm", "rotate_residual", "rotate_dt", "rotate_out_proj", "expose_state", "rotate_state"]
    rewrite = passes.apply(capture(model, ()), names, batches(model))
    reasons = {item.step: item.detail for item in rewrite.transforms if item.status is Status.LEFT_OUT}
    # d_model 46, dt_rank 3, d_inner 92 and d_state 6: no Paley order, nor a power of two times one.
    for step, size in {"R1": 46, "R5": 3, "R2": 92, "R4": 6}.items():
        assert f"no Hadamard matrix of order {size} " in reasons[step]
    assert relative(logits(rewrite.module, model), logits(model, model)) < EXACT


def test_tied_weights_come_apart_and_the_report_says_so() -> None:
    model = random_model()
    rewrite = passes.apply(capture(model, ()), ["fold_norm", "rotate_residual"], batches(model))
    (note,) = [item for item in rewrite.transforms if item.name == "untie"]
    assert note.where == "lm_head" and note.detail.startswith("shared with embedding before, now each has its own")


class Around(nn.Module):
    """A stream with a position embedding, changes of order, LayerNorms and a pooled head."""

    def __init__(self, spoil: str = "") -> None:
        super().__init__()
        self.lm = random_model(d_model=48)
        self.spoil = spoil
        self.position = nn.Parameter(torch.randn(1, 1, 48).double())
        self.norms = nn.ModuleList(nn.LayerNorm(48) for _ in range(3)).double()
        with torch.no_grad():
            for norm in self.norms:
                norm.weight.uniform_(0.5, 2)
                norm.bias.normal_()
        self.head = nn.Linear(48, 5).double()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.lm.backbone.embedding(ids) + self.position
        for index in range(2):
            conv, ssm = (state[index] for state in self.lm.initial_states(ids.shape[0]))
            ssm = ssm + x.new_zeros(x.shape[0], 1, 1)  # looks at the stream's shape alone
            if index == 0:
                y = self.norms[index](x.flip(-1 if self.spoil == "channels" else 1))
                x = x + self.lm.backbone.layers[index].mixer(y, conv, ssm)[0].flip(1)
            else:  # columns before rows, of the norm's output
                y = self.norms[index](x).unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
                y = self.lm.backbone.layers[index].mixer(y, conv, ssm)[0]
                if self.spoil == "mixed":
                    y = y.transpose(1, 2).reshape(y.shape)
                x = x + y.unflatten(1, (-1, 2)).permute(0, 2, 1, 3).reshape(x.shape)
            if self.spoil == "gelu":
                x = nn.functional.gelu(x)
        if self.spoil == "output":
            return x
        return self.head(self.norms[2](x).mean(1))


def test_smooth_norm_takes_layer_norms() -> None:
    model = Around().eval()
    ids = tokens(2, 16)
    graph = mq_ao.export(model, (ids,)).module(check_guards=False)
    rewrite = passes.apply(graph, ["smooth_norm"], [(tokens(16, 24, seed=1),)])
    assert sum(item.status is Status.APPLIED for item in rewrite.transforms) == 3
    with torch.no_grad():
        assert relative(rewrite.module(ids), model(ids)) < EXACT


def test_layer_norm_becomes_rms_norm() -> None:
    model = Around().eval()
    ids = tokens(2, 64)
    graph = mq_ao.export(model, (ids,)).module(check_guards=False)
    rewrite = passes.apply(graph, ["fold_norm", "rotate_residual"], [(tokens(16, 24, seed=1),)])
    targets = [node.target for node in rewrite.module.graph.nodes]
    assert torch.ops.aten.layer_norm.default not in targets
    assert targets.count(torch.ops.aten.rms_norm.default) == 3
    assert any(item.step == "R1" and item.status is Status.APPLIED for item in rewrite.transforms)
    with torch.no_grad():
        assert relative(rewrite.module(ids), model(ids)) < EXACT


SPOILT = [
    ("gelu", "gelu"),
    ("output", "output of the graph"),
    ("channels", "flip: it does not keep the channels in place"),
    ("mixed", "it does not keep the channels in place"),
]


@pytest.mark.parametrize(("spoil", "reason"), SPOILT)
def test_a_stream_that_cannot_be_followed_is_left_alone(spoil: str, reason: str) -> None:
    model = Around(spoil).eval()
    ids = tokens(2, 16)
    graph = mq_ao.export(model, (ids,)).module(check_guards=False)
    rewrite = passes.apply(graph, ["fold_norm", "rotate_residual"], [(tokens(16, 24, seed=1),)])
    notes = [item for item in rewrite.transforms if item.step == "R1"]
    assert notes and all(note.status is Status.LEFT_OUT for note in notes)
    assert any(reason in note.detail for note in notes)
    with torch.no_grad():
        assert relative(rewrite.module(ids), model(ids)) < EXACT


def test_r1_needs_folded_norms() -> None:
    model = random_model()
    rewrite = passes.apply(capture(model, ()), ["rotate_residual"], batches(model))
    (note,) = [item for item in rewrite.transforms if item.step == "R1"]
    assert note.status is Status.LEFT_OUT and "fold it with fold_norm first" in note.detail


def test_rotation_before_smoothing_is_refused() -> None:
    model = random_model()
    with pytest.raises(MqAoError, match="pass smooth_gate stands after rotate_out_proj: put it before rotate_out_proj"):
        passes.apply(capture(model, ()), ["rotate_out_proj", "smooth_gate"], batches(model))
    with pytest.raises(MqAoError, match="put expose_state before it"):
        passes.apply(capture(model, ()), ["rotate_state"], batches(model))


def test_bad_names_options_and_data() -> None:
    model = random_model()
    with pytest.raises(MqAoError, match="unknown pass 'r1': the passes are fold_norm"):
        passes.apply(capture(model, ()), ["r1"])
    with pytest.raises(MqAoError, match="pass smooth_gate has no option beta: it has alpha, size"):
        parse_pass({"smooth_gate": {"beta": 1}})
    with pytest.raises(MqAoError, match="option basis of pass rotate_dt is 'fft': it is one of klt, hadamard"):
        parse_pass({"rotate_dt": {"basis": "fft"}})
    with pytest.raises(MqAoError, match="option alpha of pass smooth_gate is 'x': it is a number from 0 to 1"):
        parse_pass({"smooth_gate": {"alpha": "x"}})
    with pytest.raises(MqAoError, match="calibration is empty"):
        passes.apply(capture(model, ()), ["smooth_dt"], [])


def test_rotations_use_the_published_sizes() -> None:
    for size in (192, 384, 768, 1024, 1536, 2048, 2560, 4, 12, 24, 48, 64, 96, 128, 160, 256):
        assert len(hadamard_matrix.matrix(size)) == size
