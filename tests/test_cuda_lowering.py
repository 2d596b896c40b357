"""The CUDA lowering without a GPU: CPU tensors against the q/dq simulation, fake CUDA tensors for what it calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import mq_ao
from mq_ao import MqAoError
from mq_ao.api import QuantizedProgram, capture, compile_float
from mq_ao.graph import Role, walk
from mq_ao.lowering import cuda
from mq_ao.lowering.patterns import Q_STATIC
from mq_ao.models import MambaLM, Vim, VimConfig
from mq_ao.ops.int8_mm import int8_mm, padded_mm
from mq_ao.ops.qlinear import quantize_per_token
from mq_ao.quantizer import Activation, MambaQuantizer, RoleSpec, w8a8
from mq_ao.recipes import RECIPES, Recipe
from tests.conftest import CommandLine, error, tokens

aten = torch.ops.aten
mq = torch.ops.mq_ao
NAMES = ["rtn-w8a8", "rtn-w8a8-dynamic", "quarot-w8a8", "mambaquant-w8a8", "mambaquant-static-w8a8"]
# The simulation sums up to 128 float32 products of a linear, each off by half of 1.2e-7 of itself, and the errors of
# single sums average out over a tensor; the integer product has no error but that of its scales.
ROUNDING = 1e-6


@pytest.fixture(scope="module")
def vim() -> Vim:
    torch.manual_seed(0)
    # dt_rank 2: torchao computes the scales of tokens of one channel over all tokens.
    config = VimConfig(image_size=12, patch_size=4, in_channels=2, num_classes=5, d_model=32, n_layer=2, d_state=4)
    return Vim(config).eval()


def images(count: int, seed: int) -> Tensor:
    return torch.randn(count, 2, 12, 12, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=[(name, kind) for name in NAMES for kind in ("lm", "vim")], ids="-".join)
def case(
    request: pytest.FixtureRequest, tiny: MambaLM, vim: Vim, calibration: list[Tensor]
) -> tuple[QuantizedProgram, tuple[Tensor, ...], int]:
    """A quantized model, inputs, and its number of linears."""
    name, kind = request.param
    if kind == "lm":
        quantized = mq_ao.quantize(tiny, calibration, name, backend="cuda")
        return quantized, (tokens(2, 19), *tiny.initial_states(2)), 2 * 4 + 1
    quantized = mq_ao.quantize(vim, [(images(8, seed=3),)], name, backend="cuda")
    return quantized, (images(3, seed=2),), 2 * 6 + 2


class Linears(Interpreter):
    """Runs a graph and keeps integers, float output and size of every linear, simulated or lowered, in graph order.

    With `given` outputs every linear is followed by those in the place of its own. The float work between linears then
    starts from the same bits in both graphs and ends in the same bits, and no linear inherits the rounding of another,
    which can carry a value over the border between two integers.
    """

    def __init__(self, module: GraphModule, given: list[Tensor] | None = None) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.integers: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.operations = 0
        self._given = given
        self._ends = {_end(node): node for node in walk.calls(module, walk.LINEAR | cuda.INTEGER_KERNELS)}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.target in walk.LINEAR:
            x = walk.argument(walk.argument(n, 0), 0)  # of the dequantize node: what the quantize node gave
            assert "quantize" in str(x.target), f"{n.name} reads floats"
            self._keep(self.env[x], self.env[n.args[1]])
        elif n.target in cuda.INTEGER_KERNELS:
            a, b = (self.env[arg] for arg in n.args)
            self._keep(a, b.t())
        if n in self._ends:
            self.outputs.append(result)
            if self._given is not None:
                return self._given[len(self.outputs) - 1]
        return result

    def _keep(self, a: Tensor, weight: Tensor) -> None:
        self.integers.append(a.flatten(0, -2))
        self.operations += a.numel() * weight.shape[0]


def _end(node: Node) -> Node:
    """The node with the output of a linear: of a lowered one, behind its epilogue."""
    epilogue = {aten.sub.Tensor, aten.mul.Tensor, aten.add.Tensor}
    while node.target not in walk.LINEAR and node.target != aten.reshape.default:
        following = walk.only_user(node)
        if following is None or following.target not in epilogue | {aten.reshape.default}:
            break
        if following.target == aten.add.Tensor and following.args[1].op != "get_attr":
            break  # no bias, but the residual
        node = following
    return node


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def test_every_linear_computes_what_the_simulation_does(
    case: tuple[QuantizedProgram, tuple[Tensor, ...], int],
) -> None:
    quantized, inputs, linears = case
    lowered = cuda.lower(quantized.converted)
    assert lowered.kernels == {"mq_ao.int8_mm.default": linears}
    assert lowered.simulated == []
    simulation = Linears(quantized.converted)
    with torch.no_grad():
        expected = _flat(simulation.run(*inputs))
        integer = Linears(lowered.module, simulation.outputs)
        got = _flat(integer.run(*inputs))
    assert len(integer.integers) == len(simulation.integers) == linears
    # All of the linears' work is done in integers.
    assert walk.calls(lowered.module, walk.LINEAR) == []
    assert integer.operations == simulation.operations > 0
    for mine, theirs in zip(integer.integers, simulation.integers, strict=True):
        assert mine.dtype == theirs.dtype == torch.int8
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(integer.outputs, simulation.outputs, strict=True):
        assert mine.dtype == torch.float32 and mine.shape == theirs.shape
        assert relative(mine, theirs) < ROUNDING
    # What is between the linears, and the embedding, has the same bits.
    for mine, theirs in zip(got, expected, strict=True):
        assert torch.equal(mine, theirs)


def test_the_whole_graph_stays_close_to_the_simulation(
    case: tuple[QuantizedProgram, tuple[Tensor, ...], int],
) -> None:
    quantized, inputs, _ = case
    module = cuda.lower(quantized.converted).module
    with torch.no_grad():
        for got, expected in zip(_flat(module(*inputs)), _flat(quantized.converted(*inputs)), strict=True):
            # Here a rounding error may carry an activation over the border between two integers: see test_recipes.
            assert relative(got, expected) < 2e-2


def _flat(outputs: Any) -> list[Tensor]:
    return list(outputs) if isinstance(outputs, tuple | list) else [outputs]


def test_lengths_and_batches_are_as_dynamic_as_before(tiny: MambaLM, calibration: list[Tensor]) -> None:
    quantized = mq_ao.quantize(tiny, calibration, backend="cuda")
    module = cuda.lower(quantized.converted).module
    for shape in [(1, 1), (1, 7), (3, 33)]:
        ids, states = tokens(*shape), tiny.initial_states(shape[0])
        with torch.no_grad():
            got, expected = module(ids, *states)[0], quantized.converted(ids, *states)[0]
        assert got.shape == expected.shape == (*shape, 256)
        assert relative(got, expected) < 2e-2


def test_what_is_read_by_several_linears_is_quantized_once(vim: Vim) -> None:
    quantized = mq_ao.quantize(vim, [(images(8, seed=3),)], "rtn-w8a8-dynamic", backend="cuda")
    graph = cuda.lower(quantized.converted).module.graph
    sources = [node.args[0] for node in graph.find_nodes(op="call_function", target=quantize_per_token)]
    assert len(sources) == len(set(sources)) > 0


@pytest.mark.parametrize("name", ["rtn-w8a8", "mambaquant-w8a8"])
def test_the_compiler_traces_it_whole_and_into_plain_operators(
    name: str, tiny: MambaLM, calibration: list[Tensor]
) -> None:
    module = cuda.lower(mq_ao.quantize(tiny, calibration, name, backend="cuda").converted).module
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
    assert len(walk.calls(graph, cuda.INTEGER_KERNELS)) == 9
    assert bool(walk.calls(graph, {aten.amax.default})) == (name == "mambaquant-w8a8")


def test_tied_embedding_and_head_share_their_integers(tiny: MambaLM, calibration: list[Tensor]) -> None:
    module = cuda.lower(mq_ao.quantize(tiny, calibration, "rtn-w8a8", backend="cuda").converted).module
    rows, _ = module.graph.find_nodes(op="call_function", target=aten.embedding.default)  # integers, and scales
    *_, head = walk.calls(module, cuda.INTEGER_KERNELS)
    assert rows.args[0].target == head.args[1].args[0].target
    # One buffer a weight, of what the simulation had: nothing is kept twice.
    assert sum(value.dtype == torch.int8 for value in module.buffers()) == 2 * 4 + 1


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
    module = cuda.lower(mq_ao.quantize(tiny, calibration, name, backend="cuda").converted).module
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
@pytest.mark.parametrize(("k", "n"), [(7, 5), (8, 16), (9, 16), (8, 3), (1, 1)])
def test_cuda_gets_shapes_that_it_takes_and_inductor_sees_them(m: int, k: int, n: int) -> None:
    with FakeTensorMode():
        a = torch.empty(m, k, dtype=torch.int8, device="cuda")
        b = torch.empty(n, k, dtype=torch.int8, device="cuda").t()
        graph = make_fx(int8_mm, decomposition_table=select_decomp_table())(a, b)
    (product,) = graph.graph.find_nodes(op="call_function", target=aten._int_mm.default)
    left, right = (arg.meta["val"] for arg in product.args)
    assert left.shape[0] == max(m, 17)
    assert left.shape[1] % 8 == 0 and right.shape[1] % 8 == 0
    assert left.is_contiguous() and right.t().is_contiguous()
    (output,) = graph.graph.find_nodes(op="output")
    assert output.args[0].meta["val"].shape == (m, n)
    if m >= 17 and k % 8 == n % 8 == 0:  # nothing between the product and what Inductor is to fuse
        assert output.args[0] is product


@pytest.mark.parametrize("m", [1, 16, 17])
@pytest.mark.parametrize(("k", "n"), [(7, 5), (8, 16), (31, 1), (1, 9)])
def test_padding_for_cuda_changes_no_product(m: int, k: int, n: int) -> None:
    gen = torch.Generator().manual_seed(m * k * n)
    a, b = (torch.randint(-128, 128, shape, dtype=torch.int8, generator=gen) for shape in ((m, k), (n, k)))
    got = padded_mm(a, b.t())
    assert got.dtype == torch.int32
    assert torch.equal(got, a.int() @ b.int().t())


def test_one_trace_serves_all_counts_of_rows_on_one_side_of_the_limit() -> None:
    gen = torch.Generator().manual_seed(0)
    b = torch.randint(-128, 128, (5, 8), dtype=torch.int8, generator=gen).t()
    for rows, others in ((40, (17, 100)), (3, (2, 16))):
        graph = make_fx(padded_mm, tracing_mode="symbolic")(torch.zeros(rows, 8, dtype=torch.int8), b)
        for m in others:
            a = torch.randint(-128, 128, (m, 8), dtype=torch.int8, generator=gen)
            assert torch.equal(graph(a, b), a.int() @ b.int())


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([1, 2, 16, 17, 33]), st.integers(1, 70), st.integers(1, 40), st.integers(0, 2**20))
def test_int8_mm_is_exact(m: int, k: int, n: int, seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    a = torch.randint(-128, 128, (m, 2 * k), dtype=torch.int8, generator=gen)[:, ::2]
    b = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=gen).t()
    got = int8_mm(a, b)
    assert got.dtype == torch.int32
    assert torch.equal(got, a.int() @ b.int())


def test_int8_mm_is_exact_at_its_limits() -> None:
    a = torch.full((1, 65536), -128, dtype=torch.int8)
    assert int8_mm(a, a.t()).item() == 128 * 128 * 65536
    torch.library.opcheck(mq.int8_mm.default, (a[:, :9], a[:, :9].t()))


def test_int8_mm_refuses_other_operands() -> None:
    a = torch.zeros(2, 3, dtype=torch.int8)
    with pytest.raises(MqAoError, match=r"takes two int8 matrices, not torch.float32 \(2, 3\)"):
        int8_mm(a.float(), a.t())
    with pytest.raises(MqAoError, match=r"takes matrices \(M, K\) and \(K, N\), not \(2, 3\) and \(2, 3\)"):
        int8_mm(a, a)
    with pytest.raises(MqAoError, match="sums up to 65536 products, not 65537"):
        wide = torch.zeros(1, 65537, dtype=torch.int8)
        int8_mm(wide, wide.t())


def test_what_has_no_kernel_yet_is_reported(tiny: MambaLM, calibration: list[Tensor]) -> None:
    quantized = mq_ao.quantize(tiny, calibration, "mambaquant-w8a8", backend="cuda")
    rejected = quantized.report().quantization.rejected
    reasons = {(item.role, item.detail) for item in rejected if item.role is not Role.GATE}
    assert reasons == {(role, "no integer kernel on cuda yet") for role in (Role.CONV1D, Role.SCAN)}
    assert {item.role for item in quantized.report().quantization.accepted} == {
        Role.IN_PROJ,
        Role.X_PROJ,
        Role.DT_PROJ,
        Role.OUT_PROJ,
        Role.HEAD,
        Role.EMBEDDING,
    }


def test_what_is_asked_for_by_name_is_refused(tiny: MambaLM) -> None:
    with pytest.raises(MqAoError, match="backend 'cuda' has no integer kernel for scan with activation static"):
        MambaQuantizer("cuda").set_role("scan", RoleSpec())
    with pytest.raises(MqAoError, match="backend 'cuda' has no integer kernel for conv1d"):
        mq_ao.quantize(tiny, iter(()), Recipe("mine", w8a8(Activation.PER_TOKEN, "min_max")), backend="cuda")
    for name, reason in {
        "rtn-w8a16": "in_proj with activation none: choose per_token or static",
        "rtn-w4a8": "in_proj with int4 weight in groups of 64: it takes int8, per channel",
        "mambaquant-paper-w8a8": "state with activation static: choose nothing, or leave the role out",
    }.items():
        with pytest.raises(MqAoError, match=f"backend 'cuda' has no integer kernel for {reason}"):
            mq_ao.quantize(tiny, iter(()), RECIPES[name], backend="cuda")


def test_a_graph_in_which_nothing_is_quantized_is_refused(tiny: MambaLM) -> None:
    with pytest.raises(MqAoError, match="no integer kernel in the lowered graph"):
        cuda.lower(capture(tiny, ()))


def test_integers_of_another_backend_are_named_as_simulated(
    tiny: MambaLM, calibration: list[Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    # Per-token linears are the same; the convolution's uint8 are not.
    quantized = mq_ao.quantize(tiny, calibration, "rtn-w8a8-dynamic", backend="inductor")
    lowered = cuda.lower(quantized.converted)
    assert lowered.kernels == {"mq_ao.int8_mm.default": 9}
    assert lowered.simulated and set(lowered.simulated) <= {node.name for node in lowered.module.graph.nodes}
    assert all("conv1d" in name for name in lowered.simulated)
    assert f"no integer kernel for the quantization of {lowered.simulated[0]}" in caplog.text


def test_static_inputs_are_quantized_by_the_usual_operator(tiny: MambaLM, calibration: list[Tensor]) -> None:
    module = cuda.lower(mq_ao.quantize(tiny, calibration, "rtn-w8a8", backend="cuda").converted).module
    quantizes = walk.calls(module, {Q_STATIC})
    assert len(quantizes) == 9
    assert all(node.args[3:] == (-128, 127, torch.int8) for node in quantizes)


def test_cuda_where_there_is_none_is_refused(
    monkeypatch: pytest.MonkeyPatch, tiny: MambaLM, calibration: list[Tensor]
) -> None:
    quantized = mq_ao.quantize(tiny, calibration, "rtn-w8a8", backend="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MqAoError, match="CUDA was asked for, but PyTorch sees no GPU"):
        cuda.lower(quantized.converted, "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(MqAoError, match=r"the GPU has compute capability 7.5: int8 graphs need 8.0 \(Ampere\)"):
        cuda.require_cuda()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    cuda.require_cuda()


def test_programs_are_not_saved(tiny: MambaLM, calibration: list[Tensor], mq_ao: CommandLine, tmp_path: Path) -> None:
    from mq_ao import quantize

    message = r"compiled on the machine with the GPU: .*mq_ao.lowering.cuda.lower\(q.converted, 'cuda'\)"
    with pytest.raises(MqAoError, match=message):
        quantize(tiny, calibration, "rtn-w8a8", backend="cuda").lower()
    with pytest.raises(MqAoError, match=message):
        compile_float(tiny, "cuda")
    # Before the model is opened, which does not exist.
    run = mq_ao("quantize", tmp_path / "none", "--backend", "cuda", "-o", tmp_path / "m.pt2")
    assert "mq_ao.lowering.cuda.lower(q.converted, 'cuda')" in error(run)
    run = mq_ao("bench", "--backend", "cuda")
    assert "mq_ao.lowering.cuda.lower(q.converted, 'cuda')" in error(run)
