"""Costs of nodes against numbers worked out by hand, and what is predicted from them."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mq_ao import MqAoError
from mq_ao.lowering.cuda.decode_graph import one_token
from mq_ao.lowering.language_graphs import states_of
from mq_ao.models import MambaConfig
from mq_ao.models.config import Mamba2Config
from mq_ao.models.mamba2 import language_model
from mq_ao.ops import gpu_tuning
from mq_ao.recipes import RECIPES
from mq_ao.roofline import DEVICES, SHAPES, Cost, Device, Line, at_run_time, count_model, get_device, get_shape, predict
from mq_ao.roofline.cost import RULES, moved, rotation
from mq_ao.roofline.extrapolate import count, role_of
from mq_ao.roofline.fusing import Kernel, kernels
from mq_ao.roofline.lowered import float_graph, integer_graph
from mq_ao.roofline.values import record, values
from tests.conftest import CommandLine, error

aten = torch.ops.aten
mq = torch.ops.mq_ao

MAMBA = MambaConfig(vocab_size=1536, d_model=64, n_layer=4)
MAMBA2 = Mamba2Config(vocab_size=1536, d_model=64, n_layer=4, d_state=16, headdim=32, ngroups=2, norm_groups=2)
TOY = Device("toy", 64, bandwidth=100.0, fp16=40.0, int8=80.0, fp32=10.0, special=5.0, launch=2.0)


def kernels_of(function: Callable[..., Any], *inputs: Tensor) -> list[Kernel]:
    graph = torch.fx.symbolic_trace(function)
    return kernels(graph, record(graph, *inputs), TOY)


def only(function: Callable[..., Any], *inputs: Tensor) -> Cost:
    (kernel,) = kernels_of(function, *inputs)
    return kernel.cost


def cost_of_call(operator: Any, *args: Any) -> Cost:
    """Of a graph of one call; tensors among the arguments are its inputs."""
    graph = torch.fx.Graph()
    nodes = [graph.placeholder(f"x{i}") if isinstance(arg, Tensor) else arg for i, arg in enumerate(args)]
    graph.output(graph.call_function(operator, tuple(nodes)))
    module = torch.fx.GraphModule({}, graph)
    (kernel,) = kernels(module, record(module, *(arg for arg in args if isinstance(arg, Tensor))), TOY)
    return kernel.cost


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def test_linear_rows() -> None:
    m, k, n = 3, 128, 32
    x, tokens, weight = empty(m, k, dtype=torch.int8), empty(m, 1), empty(n, k, dtype=torch.int8)
    cost = cost_of_call(mq.linear_rows.default, x, tokens, weight, empty(n))
    # Activations, their scales, weights, their scales, and a float32 result.
    assert cost.moved == 3 * 128 + 3 * 4 + 32 * 128 + 32 * 4 + 3 * 32 * 4
    assert (cost.kernels, cost.int8, cost.fp16) == (1, 2 * 3 * 32 * 128, 0)
    rounded = cost_of_call(mq.linear_rows.default, x, tokens, weight, empty(n), None, None, 0.1, 0)
    assert cost.moved - rounded.moved == 3 * 32 * 3  # a byte for each of the results' four


def test_int4_weights_are_half_as_large_and_their_groups_cost_arithmetic() -> None:
    m, k, n, group = 3, 128, 32, 64
    x, weight, scale = empty(m, k, dtype=torch.int8), empty(n, k // 2, dtype=torch.uint8), empty(n, k // group)
    tokens = empty(m, 1)
    cost = cost_of_call(mq.linear_rows.default, x, tokens, weight, scale, None, None, None, 0, group)
    assert cost.moved == 3 * 128 + 3 * 4 + 32 * 64 + 32 * 2 * 4 + 3 * 32 * 4
    assert cost.int8 == 2 * 3 * 32 * 128
    assert cost.fp32 == 4 * 3 * 32 * 2 + 4 * 32 * 128  # two groups of each result, and every weight unpacked


def test_linear_rows_weight_only_has_a_kernel_for_few_rows_and_rounds_x_for_many() -> None:
    k, n = 128, 32
    weight, scale = empty(n, k, dtype=torch.int8), empty(n)
    few, many = (cost_of_call(mq.linear_rows_weight_only.default, empty(rows, k), weight, scale) for rows in (16, 17))
    assert few.moved == 16 * 128 * 4 + 32 * 128 + 32 * 4 + 16 * 32 * 4
    assert few.kernels == 1 and few.fp32 == 2 * 16 * 32 * 128 + 16 * 4 * 32 * 128
    bfloat16 = 2 * 2 * 17 * 128  # of x: written, and read again
    assert many.moved == 17 * 128 * 4 + 32 * 128 + 32 * 4 + 17 * 32 * 4 + bfloat16
    assert many.kernels == 2 and many.fp16 == 2 * 17 * 32 * 128 and many.fp32 == 4 * 32 * 128
    assert few.int8 == few.fp16 == many.int8 == 0


@pytest.mark.parametrize(
    ("dtype", "unit"), [(torch.float16, "fp16"), (torch.bfloat16, "fp16"), (torch.float32, "fp32")]
)
def test_float_linear(dtype: torch.dtype, unit: str) -> None:
    cost = cost_of_call(aten.linear.default, empty(2, 5, 64, dtype=dtype), empty(96, 64, dtype=dtype))
    assert getattr(cost, unit) == cost.operations == 2 * 10 * 96 * 64
    assert cost.moved == (10 * 64 + 96 * 64 + 10 * 96) * dtype.itemsize


def test_scan_of_one_step_and_in_chunks() -> None:
    def cost(length: int, channels: int = 64) -> Cost:
        x, matrix = empty(1, length, channels, dtype=torch.float16), empty(1, length, 16, dtype=torch.float16)
        operands = (x, x, empty(channels, 16), matrix, matrix, None, None, True, empty(1, channels, 16))
        return cost_of_call(mq.selective_scan.default, *operands)

    step, prompt = cost(1), cost(128)
    assert step.kernels == 1
    # u, delta, y; B, C; A, state in and out.
    assert step.moved == 3 * 64 * 2 + 2 * 16 * 2 + 3 * 64 * 16 * 4
    assert step.special == 64 * (16 + 2)  # of each state an exponential, of each channel a softplus
    assert step.fp32 == 64 * (16 * 6 + 12)
    # 4 chunks of 32: u, delta and B once more, and states of chunks four times.
    once = 128 * (3 * 64 + 2 * 16) * 2 + 3 * 64 * 16 * 4
    assert prompt.moved == once + 128 * (2 * 64 + 16) * 2 + 4 * 4 * 64 * 16 * 4
    assert (prompt.kernels, prompt.special) == (3, 2 * 128 * step.special)
    # With 256 threads for each of 64 multiprocessors, four a channel, all at once.
    assert [cost(128, channels).kernels for channels in (4095, 4096)] == [3, 1]
    assert cost(128, 4096).special == 128 * 4096 * (16 + 2)


def test_costs_follow_the_sizes_that_kernels_choose_by(monkeypatch: pytest.MonkeyPatch) -> None:
    x, matrix = empty(1, 128, 64), empty(1, 128, 16)
    chunks = [cost_of_call(mq.selective_scan.default, x, x, empty(64, 16), matrix, matrix).moved]
    for name, value in (("SHORTEST_CHUNK", 16), ("ENOUGH_THREADS", 4)):
        monkeypatch.setattr(gpu_tuning, name, value)
        chunks.append(cost_of_call(mq.selective_scan.default, x, x, empty(64, 16), matrix, matrix).moved)
    four, eight, whole = chunks
    assert eight - four == 4 * 4 * 4 * 64 * 16 and whole < four


def test_the_cost_model_needs_no_triton() -> None:
    script = "import sys; sys.modules['triton'] = None; import mq_ao.roofline, mq_ao.ops.gpu_tuning"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)


def test_ssd_scan_is_a_recurrence_for_one_step_and_products_for_many() -> None:
    def cost(length: int) -> Cost:
        x, dt = empty(1, length, 4, 8), empty(1, length, 4)
        matrix = empty(1, length, 2, 16)
        return cost_of_call(mq.ssd_scan.default, x, dt, empty(4), matrix, matrix)

    step, prompt = cost(1), cost(256)
    assert step.fp32 == 32 * (5 * 16 + 12) and step.fp16 == 0
    # Scores of 2 groups, products of 4 heads within chunks of 64, states in and out.
    assert prompt.fp16 == 2 * 256 * 64 * 2 * 16 + 2 * 256 * 64 * 4 * 8 + 4 * 256 * 4 * 8 * 16


def test_rotation_counts_additions_and_the_base() -> None:
    assert rotation(1024) == 10
    assert rotation(12 * 64) == 6 + 2 * 12
    cost = cost_of_call(mq.hadamard.default, empty(3, 64))
    assert cost == Cost(kernels=1, moved=2 * 3 * 64 * 4, fp32=3 * 64 * 6)


def test_a_broadcast_value_is_read_once() -> None:
    assert moved(empty(1, 5).expand(7, 5)) == 5 * 4


def test_a_chain_is_one_kernel_of_its_inputs_and_outputs() -> None:
    def chain(x: Tensor, y: Tensor, w: Tensor) -> Any:
        total = aten.add.Tensor(x, y)
        normalised = aten.rms_norm.default(total, [64], w, 1e-5)
        return total, aten.mul.Tensor(normalised, 2.0)

    cost = only(chain, empty(3, 64), empty(3, 64), empty(64))
    assert cost == Cost(kernels=1, moved=(2 * 3 * 64 + 64 + 2 * 3 * 64) * 4, fp32=3 * 64 * (1 + 4 + 1))


def test_chains_end_at_kernels_and_the_activated_gate_waits_for_the_other_factor() -> None:
    def block(x: Tensor, w: Tensor, v: Tensor) -> Any:
        u, z = aten.split.Tensor(aten.linear.default(aten.mul.Tensor(x, 2.0), w), 64, -1)
        return aten.mul.Tensor(aten.linear.default(u, v), aten.silu.default(z))

    found = kernels_of(block, empty(3, 64), empty(128, 64), empty(64, 64))
    assert sorted(kernel.operators for kernel in found) == [
        ("aten.linear",),
        ("aten.linear",),
        ("aten.mul",),
        ("aten.silu", "aten.mul"),
    ]
    gate = next(kernel for kernel in found if len(kernel.operators) == 2)
    assert gate.cost == Cost(kernels=1, moved=3 * 3 * 64 * 4, fp32=2 * 3 * 64, special=2 * 3 * 64)
    assert role_of(gate) == "gate"


def test_gathers_read_only_what_they_give() -> None:
    cost = cost_of_call(aten.embedding.default, empty(1000, 8), empty(1, 3, dtype=torch.int64))
    assert cost.moved == 2 * 3 * 8 * 4 + 3 * 8


def test_views_are_free_and_copies_are_not() -> None:
    assert kernels_of(lambda x: aten.reshape.default(x, [6, 2]), empty(3, 4)) == []
    cost = only(lambda x: aten.reshape.default(aten.t.default(x), [12]), empty(3, 4))
    assert cost == Cost(kernels=1, moved=2 * 12 * 4)


def test_operators_of_unknown_cost_are_named() -> None:
    with pytest.raises(MqAoError, match=r"no cost of operator aten.sort \(sort_default\).* add a rule to"):
        cost_of_call(aten.sort.default, empty(3))


@pytest.mark.parametrize("name", [None, "mambaquant-w8a8"])
@pytest.mark.parametrize("length", [8, 40])
def test_products_of_many_rows_add_what_norms_follow(name: str | None, length: int) -> None:
    graph = float_graph(MAMBA) if name is None else integer_graph(MAMBA, at_run_time(RECIPES[name]))
    found = kernels(graph, values(graph, 1, length), TOY)
    _, norm, *_ = [kernel for kernel in found if role_of(kernel) == "norm"]
    x, d_model, many = 2 if name is None else 4, MAMBA.d_model, length > 16
    # The sum alone is read, or its two operands, and it is written; normed, it is fp16, or int8 with a scale a row.
    each = (1 if many else 3) * x * d_model + (2 * d_model if name is None else d_model + 4)
    assert norm.cost.moved == length * each + (2 * d_model if name is None else 0)
    out_proj = next(kernel for kernel in found if role_of(kernel) == "out_proj")
    weight = (2 if name is None else 1) * d_model * 2 * d_model + (0 if name is None else 4 * d_model)
    given = (2 if name is None else 1) * 2 * d_model + (0 if name is None else 4)
    assert out_proj.cost.moved == weight + length * (given + (2 if many else 1) * x * d_model)


@pytest.mark.parametrize(("batch", "each"), [(16, 1), (17, 2)])
def test_steps_of_many_rows_are_two_kernels(batch: int, each: int) -> None:
    whole = integer_graph(MAMBA, at_run_time(RECIPES["mambaquant-w8a8"]))
    graph = one_token(whole, states_of(whole))
    counted = count(graph, batch, 1, TOY)
    for key in (("in_proj", "mq_ao.int8_conv_step_"), ("dt_proj", "mq_ao.int8_scan_step_")):
        assert counted[key].kernels == each * MAMBA.n_layer


@pytest.mark.parametrize(
    ("config", "name"),
    [(MAMBA, None), (MAMBA, "mambaquant-w8a8"), (MAMBA, "rtn-w4a8"), (MAMBA2, "mambaquant-w4a16")],
    ids=["mamba-fp16", "mamba-w8a8", "mamba-w4a8", "mamba2-w4a16"],
)
def test_few_layers_say_the_cost_of_many(config: Any, name: str | None) -> None:
    recipe = None if name is None else at_run_time(RECIPES[name])
    whole = float_graph(config) if recipe is None else integer_graph(config, recipe)
    counted = count_model(config, recipe, 2, 40, TOY)
    assert counted.prefill == count(whole, 2, 40, TOY)
    assert counted.decode == count(one_token(whole, states_of(whole)), 2, 1, TOY)


@pytest.mark.parametrize("name", ["rtn-w8a8-dynamic", "mambaquant-paper-w8a8", "quarot-w4a8", "mambaquant-w8a16"])
def test_kernels_have_roles(name: str) -> None:
    counts = count(integer_graph(replace(MAMBA, n_layer=1), at_run_time(RECIPES[name])), 1, 40, TOY)
    roles = {role for role, _ in counts}
    assert {"in_proj", "conv1d", "x_proj", "dt_proj", "scan", "gate", "out_proj", "head", "states"} <= roles
    assert "linear" not in roles


def test_passes_that_change_values_alone_do_not_change_the_cost() -> None:
    name = "mambaquant-w4a8"
    config = replace(MAMBA, n_layer=1)
    recipe = RECIPES[name]
    rounded = replace(at_run_time(recipe), passes=recipe.passes)
    assert count(integer_graph(config, rounded), 1, 40, TOY) == count(
        integer_graph(config, at_run_time(recipe)), 1, 40, TOY
    )


def test_decode_moves_the_weights_once() -> None:
    config = replace(MAMBA, n_layer=1)
    parameters = sum(parameter.numel() for parameter in language_model(config).parameters())
    graphs = {
        name: integer_graph(config, at_run_time(RECIPES[name])) for name in ("rtn-w8a8", "rtn-w8a16", "rtn-w4a16")
    }
    totals = {
        name: sum(cost.moved for cost in count(graph, 1, 1, TOY).values())
        for name, graph in {"fp16": float_graph(config), **graphs}.items()
    }
    states = 4 * (16 + 3) * 128 * 4  # read and written by kernels, then stacked
    assert 2 * parameters < totals["fp16"] - states < 2.5 * parameters
    assert parameters < totals["rtn-w8a8"] - states < 1.5 * parameters
    assert totals["rtn-w4a16"] < totals["rtn-w8a16"]


def test_time_is_the_longest_of_memory_and_units_and_a_launch() -> None:
    def line(**cost: int) -> Line:
        return Line.of("head", "aten.linear", Cost(kernels=3, **cost), TOY)

    assert line(moved=850, fp16=30).seconds == pytest.approx(850 / (100 * 0.85) + 3 * 2)
    assert line(moved=850, fp16=30).bound == "memory"
    assert line(moved=85, fp16=300).seconds == pytest.approx(300 / (40 * 0.75) + 6)
    assert line(moved=85, int8=480).seconds == pytest.approx(480 / (80 * 0.6) + 6)
    assert line(moved=85, fp32=50, special=5).bound == "fp32"
    assert line(moved=85, fp32=5, special=50).seconds == pytest.approx(50 / (5 * 0.5) + 6)
    counts = {("head", "aten.linear"): Cost(1, 85), ("norm", "fused"): Cost(2, 850, fp32=5)}
    prediction = predict(counts, TOY)
    assert [item.role for item in prediction.lines] == ["norm", "head"]
    assert prediction.seconds == pytest.approx(10 + 4 + 1 + 2)
    assert prediction.cost == Cost(3, 935, fp32=5)


def test_devices_and_shapes() -> None:
    assert {"h100", "h200", "a100", "a5000", "orin"} == set(DEVICES)
    for device in DEVICES.values():
        assert device.int8 == pytest.approx(2 * device.fp16, rel=1e-3)  # dense, both
    counts = {
        name: sum(value.numel() for value in _on_meta(config).state_dict(keep_vars=False).values())
        for name, config in SHAPES.items()
    }
    billions = {"1.4b": 1.4, "2.8b": 2.8, "mamba2-2.7b": 2.7, "mamba2-8b": 8.3}
    for name, size in billions.items():
        tied = 0 if name == "mamba2-8b" else SHAPES[name].vocab_size * SHAPES[name].d_model
        assert (counts[name] - tied) / 1e9 == pytest.approx(size, rel=0.03)


def _on_meta(config: Any) -> torch.nn.Module:
    with torch.device("meta"):
        return language_model(config)


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MqAoError, match="unknown device 'v100': the devices are h100, h200, a100, a5000, orin"):
        get_device("v100")
    with pytest.raises(MqAoError, match=r"unknown model '7b': give demo, 130m, .*mamba2-8b, or a folder with a config"):
        get_shape("7b")
    with pytest.raises(MqAoError, match=r"has no config.json"):
        get_shape(str(tmp_path))


def test_a_folder_needs_only_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mq_ao.mamba", **MAMBA.to_dict()}))
    assert get_shape(str(tmp_path)) == MAMBA


def test_command_line(mq_ao: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mq_ao.mamba", **MAMBA.to_dict()}))
    target = tmp_path / "prediction.json"
    options = ("--device", "a5000", "--recipe", "rtn-w8a8", "--recipe", "smoothquant-w8a8", "--tokens", 32)
    run = mq_ao("roofline", tmp_path, *options, "--json", target)
    assert run.code == 0, run
    tables = [line for line in run.out.splitlines() if "rtn-w8a8, " in line or "fp16, " in line]
    assert len(tables) == 4 and all(line.startswith("PREDICTED, not measured") for line in tables)
    written = json.loads(target.read_text())
    assert written["predicted"] is True and written["batch"] == 1 and written["tokens"] == 32
    assert list(written["predictions"]) == ["fp16", "rtn-w8a8", "smoothquant-w8a8"]
    assert written["predictions"]["fp16"]["decode"]["speedup"] == 1
    prefill = written["predictions"]["rtn-w8a8"]["prefill"]
    assert prefill["predicted"] is True
    assert prefill["seconds"] == pytest.approx(math.fsum(line["seconds"] for line in prefill["kernels"]))
    fp16 = written["predictions"]["fp16"]["prefill"]["seconds"]
    assert prefill["speedup"] == pytest.approx(fp16 / prefill["seconds"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("130m", "--device", "tpu"), "unknown device 'tpu'"),
        (("13b", "--device", "h100"), "unknown model '13b'"),
        (("130m", "--device", "h100", "--recipe", "w1a1"), "unknown recipe 'w1a1'"),
        (("130m", "--device", "h100", "--json", "/none/such.json"), "/none"),
    ],
)
def test_bad_input(mq_ao: CommandLine, args: tuple[str, ...], message: str) -> None:
    assert message in error(mq_ao("roofline", *args))


def test_rules_are_for_operators_that_exist() -> None:
    for name in RULES:
        namespace, _, operator = name.partition(".")
        assert hasattr(getattr(torch.ops, namespace), operator), name


def test_a_faster_device_is_predicted_to_be_faster() -> None:
    counts = {("head", "aten.linear"): Cost(1, 10**9, fp16=10**9)}
    slow = predict(counts, DEVICES["orin"]).seconds
    assert slow > predict(counts, replace(DEVICES["orin"], memory_fraction=1.0)).seconds
    assert slow > predict(counts, DEVICES["h100"]).seconds
