"""The CUDA lowering without a GPU: CPU tensors against the q/dq simulation, fake CUDA tensors for what it calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node, symbolic_trace
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import mq_ao
from mq_ao import MqAoError
from mq_ao.api import capture
from mq_ao.graph import walk
from mq_ao.lowering import cuda
from mq_ao.lowering.cuda.compiled import norm_of_sum, product, products, summed
from mq_ao.lowering.cuda.rewriter import INTEGER_LINEARS, Rewriter
from mq_ao.lowering.patterns import Q_STATIC, Weight
from mq_ao.models import Mamba2Config, MambaLM, Vim, VimConfig, language_model
from mq_ao.ops.linear_packed import int8_per_token
from mq_ao.quantized import QuantizedModel
from mq_ao.quantizer import Activation, MambaQuantizer, RoleSpec, w8a8
from mq_ao.recipes import RECIPES, Recipe
from tests.conftest import tokens

aten = torch.ops.aten
mq = torch.ops.mq_ao
NAMES = [name for name in RECIPES if not name.endswith("a4")]  # activations of 4 bits are refused
# The simulation sums up to 128 float32 products of a linear, each off by half of 1.2e-7 of itself, and the errors of
# single sums average out over a tensor; the integer product has no error but that of its scales.
ROUNDING = 1e-6


@pytest.fixture(scope="module")
def vim() -> Vim:
    torch.manual_seed(0)
    # dt_rank 4: torchao computes the scales of tokens of one channel over all tokens.
    config = VimConfig(image_size=16, patch_size=8, in_channels=1, num_classes=5, d_model=64, n_layer=2, d_state=4)
    return Vim(config).eval()


@pytest.fixture(scope="module")
def mamba2() -> MambaLM:
    torch.manual_seed(0)
    config = Mamba2Config(vocab_size=256, d_model=64, n_layer=2, d_state=8, headdim=16)
    return language_model(config).eval()


def images(count: int, seed: int) -> Tensor:
    return torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(seed))


KINDS = [(name, kind) for name in NAMES for kind in ("lm", "vim")] + [("mambaquant-w8a8", "mamba2")]


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def case(
    request: pytest.FixtureRequest, tiny: MambaLM, vim: Vim, mamba2: MambaLM, calibration: list[Tensor]
) -> tuple[QuantizedModel, tuple[Tensor, ...]]:
    """A quantized model, and inputs."""
    name, kind = request.param
    if kind == "vim":
        return mq_ao.quantize(vim, [(images(8, seed=3),)], name, backend="cuda"), (images(3, seed=2),)
    model = tiny if kind == "lm" else mamba2
    return mq_ao.quantize(model, calibration, name, backend="cuda"), (tokens(2, 19), *model.initial_states(2))


class Simulation(Interpreter):
    """Runs a converted graph, keeps all values, and counts the products of its linears."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.products = 0

    def run_node(self, n: Node) -> Any:
        if n.target in walk.LINEAR:
            x, weight = (self.env[arg] for arg in n.args[:2])
            self.products += x.numel() * weight.shape[0]
        return super().run_node(n)


class Lowered(Interpreter):
    """Runs a lowered graph beside its simulation, and compares value by value.

    Every value that stands for one of the simulation is followed by the simulation's in its place. So each operator
    starts from the same bits in both graphs, and inherits no rounding of another, which can carry a value over the
    border between two integers.
    """

    def __init__(self, module: GraphModule, simulation: Simulation) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.simulation = simulation
        self.products = 0
        self.integers = 0
        self.floats = 0

    def run_node(self, n: Node) -> Any:
        if n.target in INTEGER_LINEARS:
            x, *rest = (self.env[arg] for arg in n.args if isinstance(arg, Node))
            weight = next(value for value in rest if value.dim() == 2 and value.dtype in (torch.int8, torch.uint8))
            self.products += x.numel() * weight.shape[0]
        result = super().run_node(n)
        tag = n.meta.get("tag")
        if tag is None or n.op == "output" or not isinstance(result, Tensor):
            return result
        source = self.simulation.env[tag]
        if result.dtype == torch.int8 and source.is_floating_point():
            return self._rounded(result, tag, source)
        assert result.dtype == source.dtype and result.shape == source.shape, n.name
        if result.is_floating_point():
            self.floats += 1
            assert relative(result, source) < ROUNDING, n.name
        else:
            self.integers += n.op == "call_function"
            assert torch.equal(result, source), n.name
        return source

    def _rounded(self, result: Tensor, tag: Node, source: Tensor) -> Tensor:
        """Integers that an operator rounds its own output to."""
        (quantize,) = tag.users
        assert quantize.target == Q_STATIC
        expected, scale = self.simulation.env[quantize], quantize.args[1]
        other = result != expected
        # The same, but for values within a float's error of the border between two.
        assert (result.int() - expected.int()).abs().max() <= 1
        steps = (source / scale)[other]
        assert ((steps - steps.floor() - 0.5).abs() < 1e-4).all()
        assert other.float().mean() < 1e-3
        self.integers += 1
        return expected


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm().clamp(min=1e-30))


def tagged(converted: GraphModule) -> GraphModule:
    """The graph, whose nodes say who they are: the rewriter copies that to what takes their place."""
    for node in converted.graph.nodes:
        node.meta["tag"] = _Tag(node)
    return converted


class _Tag:
    """A node that copies of its graph share."""

    def __init__(self, node: Node) -> None:
        self.node = node

    def __deepcopy__(self, memo: object) -> _Tag:
        return self


def test_every_operator_computes_what_the_simulation_does(
    case: tuple[QuantizedModel, tuple[Tensor, ...]],
) -> None:
    quantized, inputs = case
    lowered = cuda.rewrite(tagged(quantized.converted))
    for node in lowered.module.graph.nodes:
        node.meta["tag"] = node.meta["tag"].node if "tag" in node.meta else None
    with torch.no_grad():
        simulation = Simulation(quantized.converted)
        simulation.run(*inputs)
        beside = Lowered(lowered.module, simulation)
        beside.run(*inputs)
    # All of the linears' work is done with integer weights, and where activations are integers, on those.
    assert walk.calls(lowered.module, walk.LINEAR) == []
    assert beside.products == simulation.products > 0
    recipe = quantized.report().recipe.name
    assert (beside.integers > 0) != recipe.endswith("a16")
    assert beside.floats > 5
    assert bool(lowered.simulated) == ("paper" in recipe)


def test_the_whole_graph_stays_close_to_the_simulation(
    case: tuple[QuantizedModel, tuple[Tensor, ...]],
) -> None:
    quantized, inputs = case
    module = cuda.rewrite(quantized.converted).module
    with torch.no_grad():
        for got, expected in zip(_flat(module(*inputs)), _flat(quantized.converted(*inputs)), strict=True):
            # Here a rounding error may carry an activation over the border between two integers: see test_recipes.
            assert relative(got, expected) < 2e-2


def _flat(outputs: Any) -> list[Tensor]:
    return list(outputs) if isinstance(outputs, tuple | list) else [outputs]


def test_lengths_and_batches_are_as_dynamic_as_before(tiny: MambaLM, calibration: list[Tensor]) -> None:
    quantized = mq_ao.quantize(tiny, calibration, backend="cuda")
    module = cuda.rewrite(quantized.converted).module
    for shape in [(1, 1), (1, 7), (3, 33)]:
        ids, states = tokens(*shape), tiny.initial_states(shape[0])
        with torch.no_grad():
            got, expected = module(ids, *states)[0], quantized.converted(ids, *states)[0]
        assert got.shape == expected.shape == (*shape, 256)
        assert relative(got, expected) < 2e-2


def test_what_is_read_by_several_linears_is_quantized_once(vim: Vim) -> None:
    quantized = mq_ao.quantize(vim, [(images(8, seed=3),)], "rtn-w8a8-dynamic", backend="cuda")
    graph = cuda.rewrite(quantized.converted).module.graph
    sources = [node.args[0] for node in graph.find_nodes(op="call_function", target=int8_per_token)]
    assert len(sources) == len(set(sources)) > 0


@pytest.mark.parametrize("name", ["rtn-w8a8", "mambaquant-w8a8", "mambaquant-w4a16"])
def test_the_compiler_traces_it_whole(name: str, tiny: MambaLM, calibration: list[Tensor]) -> None:
    module = cuda.rewrite(mq_ao.quantize(tiny, calibration, name, backend="cuda").converted).module
    graphs: list[GraphModule] = []

    def keep(graph: GraphModule, inputs: list[Tensor]) -> GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(module, backend=aot_autograd(fw_compiler=keep), fullgraph=True)
    inputs = (tokens(2, 19), *tiny.initial_states(2))
    with torch.no_grad():
        for got, expected in zip(compiled(*inputs), module(*inputs), strict=True):
            assert relative(got, expected) < 2e-2
    (graph,) = graphs
    names = {str(node.target).split(".")[0] for node in graph.graph.nodes if node.op == "call_function"}
    assert names <= {"aten", "mq_ao", "quantized_decomposed", "<built-in function getitem>"}
    assert len(walk.calls(graph, INTEGER_LINEARS)) == len(walk.calls(module, INTEGER_LINEARS)) >= 2 * 4 + 1


def test_tied_embedding_and_head_share_their_integers(tiny: MambaLM, calibration: list[Tensor]) -> None:
    module = cuda.rewrite(mq_ao.quantize(tiny, calibration, "rtn-w8a8", backend="cuda").converted).module
    rows, _ = module.graph.find_nodes(op="call_function", target=aten.embedding.default)  # integers, and scales
    *_, head = walk.calls(module, INTEGER_LINEARS)
    assert rows.args[0].target == head.args[2].target
    # One buffer a weight: nothing is kept twice.
    kept = [name for name, _ in module.named_buffers() if name.startswith(("int8_weight", "int8_rows"))]
    assert len(kept) == 2 * 4 + 1


class Devices(TorchDispatchMode):
    """Collects the devices of what operators give."""

    def __init__(self) -> None:
        super().__init__()
        self.devices: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in _flat(result):
            if isinstance(value, Tensor):
                self.devices.add(value.device.type)
        return result


@pytest.mark.parametrize("name", NAMES)
def test_moved_to_cuda_nothing_stays_behind(name: str, tiny: MambaLM, calibration: list[Tensor]) -> None:
    """On fake tensors: a constant left on the CPU would be an error there as on a GPU."""
    shapes = tiny.initial_states(2)
    module = cuda.rewrite(mq_ao.quantize(tiny, calibration, name, backend="cuda").converted).module
    with FakeTensorMode():
        for owner in module.modules():
            for kept in (owner._parameters, owner._buffers):
                for key, value in kept.items():
                    fake = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
                    kept[key] = nn.Parameter(fake, requires_grad=False) if kept is owner._parameters else fake
        states = [torch.empty(state.shape, device="cuda") for state in shapes]
        inputs = [torch.empty(2, 5, dtype=torch.int64, device="cuda"), *states]
        with torch.no_grad(), Devices() as seen:
            outputs = module(*inputs)
    assert {output.device.type for output in outputs} == {"cuda"}
    assert seen.devices == {"cuda"}


@pytest.mark.parametrize("m", [1, 16, 17, 40])
@pytest.mark.parametrize(("k", "n"), [(7, 5), (8, 16), (9, 16), (8, 3)])
@pytest.mark.parametrize("static", [True, False])
def test_compiled_only_what_int_mm_takes_goes_there(m: int, k: int, n: int, static: bool) -> None:
    with FakeTensorMode():
        q, weight = (torch.empty(rows, k, dtype=torch.int8, device="cuda") for rows in (m, n))
        scale, tokens = torch.empty(n, device="cuda"), torch.empty(m, 1, device="cuda")
        sums = torch.empty(n, dtype=torch.int32, device="cuda")
        epilogue = (sums, scale, 0.1, 3) if static else ()
        graph = make_fx(lambda q: product(q, None if static else tokens, weight, scale, *epilogue))(q)
    products = graph.graph.find_nodes(op="call_function", target=aten._int_mm.default)
    own = graph.graph.find_nodes(op="call_function", target=mq.linear_rows.default)
    fits = m > 16 and k % 8 == n % 8 == 0
    assert (len(products), len(own)) == ((1, 0) if fits else (0, 1))
    (output,) = graph.graph.find_nodes(op="output")
    assert output.args[0].meta["val"].shape == (m, n)
    assert output.args[0].meta["val"].dtype == (torch.int8 if static else torch.float32)


@pytest.mark.parametrize("out_scale", [None, 0.1])
@pytest.mark.parametrize("per_token", [True, False])
def test_what_the_compiler_makes_of_a_linear_has_the_bits_of_the_operator(
    out_scale: float | None, per_token: bool
) -> None:
    gen = torch.Generator().manual_seed(0)
    q, weight = (torch.randint(-128, 128, shape, dtype=torch.int8, generator=gen) for shape in ((2, 17, 16), (8, 16)))
    scale, bias, steps = (torch.rand(shape, generator=gen) for shape in ((8,), (8,), (2, 17, 1)))
    args = (q, steps if per_token else None, weight, scale, weight.sum(1, dtype=torch.int32) * 7, bias, out_scale, 2)
    assert torch.equal(product(*args), mq.linear_rows(*args))
    # So many outputs that the pieces are products of their own.
    pieces = ((160, 160), (out_scale or 0.0, 0.0), (2, 0))
    args = (q, args[1], weight.repeat(40, 1), scale.repeat(40), None, bias.repeat(40), *map(list, pieces))
    for got, expected in zip(products(*args), mq.linears_rows(*args), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(("name", "expected"), [("mambaquant-w8a8", 2), ("mambaquant-w4a8", 0)])
def test_sums_before_norms_are_left_to_products_that_can_add(
    name: str, expected: int, tiny: MambaLM, calibration: list[Tensor]
) -> None:
    module = cuda.rewrite(mq_ao.quantize(tiny, calibration, name, backend="cuda").converted).module
    norms = walk.calls(module, {mq.int8_rms_norm.default})
    # The first of three has no residual; int4 products in groups are kernels of ours.
    assert sum(summed(norm) is not None for norm in norms) == expected


@pytest.mark.parametrize("rows", [16, 17])
@pytest.mark.parametrize("out_scale", [None, 0.1])
def test_a_sum_outside_the_norm_has_the_bits_of_one_inside(rows: int, out_scale: float | None) -> None:
    gen = torch.Generator().manual_seed(0)
    x, residual = torch.randn(2, rows, 32, generator=gen).unbind(0)
    args = (x, residual, torch.rand(32, generator=gen), 1e-5, out_scale, 3)
    graph = make_fx(lambda *sides: norm_of_sum(*sides, *args[2:]))(*args[:2])
    assert len(walk.calls(graph, walk.ADD)) == (rows > 16)
    for got, expected in zip(graph(*args[:2]), mq.int8_rms_norm(*args), strict=True):
        assert torch.equal(got, expected)


def test_what_the_kernels_do_not_take_is_refused(tiny: MambaLM) -> None:
    with pytest.raises(MqAoError, match="backend 'cuda' has no integer kernel for conv1d with activation per_token"):
        mq_ao.quantize(
            tiny,
            iter(()),
            Recipe("mine", w8a8(Activation.PER_TOKEN).replaced(conv1d=RoleSpec(Activation.PER_TOKEN))),
            backend="cuda",
        )
    groups = RoleSpec(Activation.PER_TOKEN, bits=4, group_size=32)
    with pytest.raises(MqAoError, match="backend 'cuda' takes groups of 64, 128, 256 weights, not 32"):
        MambaQuantizer("cuda").set_role("in_proj", groups)


def test_groups_that_do_not_divide_the_inputs_are_refused() -> None:
    weight = Weight(torch.zeros(8, 96, dtype=torch.int8), torch.ones(8, 2), 4, 64)
    module = symbolic_trace(nn.Linear(96, 8))
    (x,) = module.graph.find_nodes(op="placeholder")
    with pytest.raises(MqAoError, match="groups of 64 weights do not divide its 96 inputs, which the GPU kernels need"):
        Rewriter(module).product(x, x, weight, None)


def test_a_graph_in_which_nothing_is_quantized_is_refused(tiny: MambaLM) -> None:
    with pytest.raises(MqAoError, match="no integer kernel in the lowered graph"):
        cuda.rewrite(capture(tiny, ()))


def test_integers_of_another_backend_are_named_as_simulated(
    tiny: MambaLM, calibration: list[Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    # Per-token linears are the same; the convolution's uint8 are not.
    quantized = mq_ao.quantize(tiny, calibration, "rtn-w8a8-dynamic", backend="inductor")
    lowered = cuda.rewrite(quantized.converted)
    assert lowered.kernels["mq_ao.linear_rows.default"] == 2 * 4 + 1
    assert "mq_ao.qcausal_conv1d.default" not in lowered.kernels
    assert lowered.simulated and set(lowered.simulated) <= {node.name for node in lowered.module.graph.nodes}
    assert all("conv1d" in name for name in lowered.simulated)
    assert f"no integer kernel for the quantization of {lowered.simulated[0]}" in caplog.text


def test_norms_and_gates_quantize_for_themselves(tiny: MambaLM, calibration: list[Tensor]) -> None:
    lowered = cuda.rewrite(mq_ao.quantize(tiny, calibration, "mambaquant-w8a8", backend="cuda").converted)
    # in_proj gives x in int8 and z in float, x_proj dt, B and C in int8, each from one kernel.
    counts = {"int8_rms_norm": 3, "int8_gate": 2, "qcausal_conv1d": 2, "qselective_scan": 2}
    counts |= {"linear_rows": 2 * 2 + 1, "linears_rows": 2 * 2}
    assert {name.split(".")[1]: count for name, count in lowered.kernels.items()} == counts
    # Of residual sums only the first one's operands stand apart: the others are made by the norms.
    assert len(walk.calls(lowered.module, walk.ADD)) < 2 * 2
    rotating = [node.args[7] for node in walk.calls(lowered.module, {mq.int8_gate.default})]
    assert rotating == [True, True]


def test_cuda_where_there_is_none_is_refused(
    monkeypatch: pytest.MonkeyPatch, tiny: MambaLM, calibration: list[Tensor]
) -> None:
    quantized = mq_ao.quantize(tiny, calibration, "rtn-w8a8", backend="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MqAoError, match="CUDA was asked for, but PyTorch sees no GPU"):
        cuda.rewrite(quantized.converted, "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(MqAoError, match="there is no GPU 1: PyTorch sees 1 here"):
        cuda.require_cuda("cuda:1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(MqAoError, match=r"the GPU has compute capability 7.5: int8 graphs need 8.0 \(Ampere\)"):
        cuda.require_cuda()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    cuda.require_cuda()
