"""The page of a real quantization: every figure on it against what is computed here without the report's code."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

import mq_ao
from mq_ao.api import capture
from mq_ao.cli import main
from mq_ao.errors import MqAoError
from mq_ao.graph import match
from mq_ao.models import MambaLM, demo
from mq_ao.models.saving import save_pretrained
from mq_ao.passes.fold_norm import FoldNorm
from mq_ao.passes.rotate_dt import RotateDt
from mq_ao.passes.rotate_residual import RotateResidual
from mq_ao.quantized import QuantizedModel
from mq_ao.quantizer import RoleSpec, w8a8
from mq_ao.recipes import Recipe
from mq_ao.report import PageData, build, sqnr
from tests.conftest import tokens

RECIPE = Recipe(
    "rotated", w8a8().replaced(scan=RoleSpec(), gate=RoleSpec()), (FoldNorm(), RotateResidual(), RotateDt())
)


class Recorder(Interpreter):
    """Keeps the value of every node."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.values: dict[str, Any] = {}

    def run_node(self, n: Node) -> Any:
        value = self.values[n.name] = super().run_node(n)
        return value


@torch.no_grad()
def record(module: GraphModule, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The value of every node, the first of several."""
    recorder = Recorder(module)
    recorder.run(*batch)
    return {name: value[0] if isinstance(value, tuple) else value for name, value in recorder.values.items()}


@dataclass(frozen=True)
class Built:
    """A quantization, its page as data, and every value of both of its graphs on the page's sample."""

    program: QuantizedModel
    data: PageData
    before: dict[str, Tensor]
    after: dict[str, Tensor]


def data_of(program: QuantizedModel) -> PageData:
    return build.page_data(program.converted, program.report(), program._source)


@pytest.fixture(scope="module")
def built(tiny: MambaLM, calibration: list[Tensor]) -> Built:
    program = mq_ao.quantize(tiny, calibration, RECIPE)
    source = program._source
    before, after = record(source.graph, source.batch), record(program.converted, source.batch)
    return Built(program, data_of(program), before, after)


def test_sqnr_is_the_ratio_of_the_powers() -> None:
    reference = torch.tensor([3.0, 4.0])
    assert sqnr.sqnr(reference, torch.tensor([3.0, 4.5])) == pytest.approx(20.0)  # 25 / 0.25
    assert sqnr.sqnr(reference, torch.zeros(2)) == 0.0
    assert sqnr.sqnr(reference, reference) == math.inf
    assert math.isnan(sqnr.sqnr(torch.zeros(2), reference))


def test_sqnr_of_more_values_than_are_summed_at_once() -> None:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(3, 2**19 + 1, generator=generator)
    noise = 1e-3 * torch.randn(reference.shape, generator=generator)
    got = reference + noise
    error = (reference.double() - got.double()).square().sum()
    expected = 10 * math.log10(reference.double().square().sum() / error)
    # Sums of 1.6 million doubles in another order.
    assert sqnr.sqnr(reference, got) == pytest.approx(expected, rel=1e-12)


def test_every_quantized_node_has_the_sqnr_of_its_recorded_values(built: Built) -> None:
    accepted = {item.node: item for item in built.program.report().quantization.accepted}
    assert {node.node for node in built.data.nodes} == set(accepted)
    order = list(built.before)
    assert [node.node for node in built.data.nodes] == sorted(accepted, key=order.index)
    for node in built.data.nodes:
        before, after = built.before[node.node].double(), built.after[node.node].double()
        expected = 10 * math.log10(before.square().sum() / (before - after).square().sum())
        # The same kernels on the same inputs, summed in another order.
        assert node.sqnr == pytest.approx(expected, abs=1e-6)
        assert node.role == accepted[node.node].role
        assert node.shape == str(tuple(before.shape))


def test_nodes_are_paired_by_name_and_a_missing_one_is_named(built: Built) -> None:
    names = [node.node for node in built.data.nodes]
    source = built.program._source
    pairs = zip(
        sqnr.values(source.graph, source.batch, names),
        sqnr.values(built.program.converted, source.batch, names),
        strict=True,
    )
    assert all(a == b for (a, _), (b, _) in pairs)
    with pytest.raises(MqAoError, match="no node nowhere"):
        list(sqnr.values(source.graph, source.batch, ["nowhere"]))


def test_the_float_graph_that_is_kept_computes_the_model(built: Built, tiny: MambaLM) -> None:
    ids = tokens(2, 9, seed=3)
    with torch.no_grad():
        got, expected = built.program._source.graph(ids, *tiny.initial_states(2))[0], tiny(ids)[0]
    # Exact rewrites, rounded to float32 weights.
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    # What no pass touched is the model's own tensor, not a copy.
    shared = {parameter.data_ptr() for parameter in tiny.parameters()}
    kept = {parameter.data_ptr() for parameter in built.program._source.graph.parameters()}
    assert tiny.backbone.layers[0].mixer.A_log.data_ptr() in kept & shared


def test_sample_is_cut_where_the_graph_allows_it(tiny: MambaLM) -> None:
    ids = tokens(3, 300)
    cut = build.sample(capture(tiny, ()), (ids, *tiny.initial_states(3)))
    assert torch.equal(cut[0], ids[:2, :256])
    assert [state.shape for state in cut[1:]] == [state.shape for state in tiny.initial_states(2)]
    # A view would keep the whole batch in memory.
    assert cut[0].untyped_storage().nbytes() == 2 * 256 * 8
    short = build.sample(capture(tiny, ()), (ids[:1, :5], *tiny.initial_states(1)))
    assert torch.equal(short[0], ids[:1, :5])


def test_ranges_are_those_of_the_float_values(built: Built) -> None:
    blocks = match(built.program._source.graph).blocks
    rows = {(row.role, row.module): row for row in built.data.ranges}
    # in_proj, conv1d, x_proj with u, dt_proj, out_proj; delta, B, C; y and z: ten a layer, and the head.
    assert len(rows) == len(built.data.ranges) == 10 * len(blocks) + 1
    for block in blocks:
        (gate,), (direction,) = block.gates, block.directions
        u, delta = direction.scan.args[:2]
        wanted = {
            ("x_proj, scan u", f"{block.name}.x_proj"): u,
            ("scan delta", block.name): delta,
            ("scan B", block.name): direction.b,
            ("scan C", block.name): direction.c,
            ("gate y", block.name): gate.y,
            ("gate z", block.name): gate.z,
            ("conv1d", f"{block.name}.conv1d"): direction.conv_input,
            ("out_proj", f"{block.name}.out_proj"): block.out_input,
        }
        for key, node in wanted.items():
            assert isinstance(node, Node)
            value, row = built.before[node.name], rows[key]
            assert (row.low, row.high) == (float(value.min()), float(value.max()))
            assert torch.equal(row.maxima, value.abs().flatten(0, 1).amax(0))
            ordered = value.abs().flatten().sort().values
            assert row.p999 == float(ordered[math.ceil(0.999 * len(ordered)) - 1])


def test_what_stays_in_float_has_no_range_and_no_sqnr(tiny: MambaLM, calibration: list[Tensor]) -> None:
    data = data_of(mq_ao.quantize(tiny, calibration, "rtn-w8a8"))
    roles = {row.role for row in data.ranges}
    assert roles == {"in_proj", "conv1d", "x_proj", "dt_proj", "out_proj", "head"}
    assert {node.role for node in data.nodes} == {*roles, "embedding"}
    assert data.variances == ()


def test_variances_are_flat_after_klt(built: Built) -> None:
    stream, *layers = built.data.variances
    assert stream.where.startswith("stream of")
    assert len(layers) == 2
    assert stream.rotated is not None
    # docs/method.md, section 3: an equal share of the trace for every channel, up to rounding in float64.
    torch.testing.assert_close(stream.rotated, stream.before.mean().expand_as(stream.rotated), rtol=1e-6, atol=0)


def test_sizes_add_up_to_the_model_and_to_its_integers(built: Built, tiny: MambaLM) -> None:
    sizes = {size.part: size for size in built.data.sizes}
    assert sum(size.float_bytes for size in sizes.values()) == sum(item.nbytes for item in tiny.parameters())
    mixer, embedding = tiny.backbone.layers[0].mixer, tiny.backbone.embedding.weight
    for part in ("in_proj", "x_proj", "out_proj"):
        weight = getattr(mixer, part).weight
        assert sizes[part].float_bytes == 2 * 4 * weight.numel()
        # A byte a weight and a float32 scale a row.
        assert sizes[part].quantized_bytes == 2 * (weight.numel() + 4 * len(weight))
    # One tensor in float; the rotation took them apart.
    tied = sizes["head + embedding"]
    assert tied.float_bytes == 4 * embedding.numel()
    assert tied.quantized_bytes == 2 * (embedding.numel() + 4 * len(embedding))
    assert sizes["scan"].quantized_bytes == sizes["scan"].float_bytes
    # fold_norm leaves norms without weights.
    assert sizes["other"].float_bytes == 3 * 4 * tiny.config.d_model
    assert sizes["other"].quantized_bytes == 0


def test_four_bit_weights_count_half_a_byte_and_their_groups(tiny: MambaLM, calibration: list[Tensor]) -> None:
    scheme = w8a8().replaced(in_proj=RoleSpec(bits=4, group_size=32))
    data = data_of(mq_ao.quantize(tiny, calibration, Recipe("int4", scheme)))
    sizes = {size.part: size for size in data.sizes}
    weights = tiny.backbone.layers[0].mixer.in_proj.weight.numel()
    assert sizes["in_proj"].quantized_bytes == 2 * (weights // 2 + 4 * weights // 32)


def test_carried_states_are_no_values_of_the_scan(tiny: MambaLM, calibration: list[Tensor]) -> None:
    scheme = w8a8().replaced(carried_state=RoleSpec())
    program = mq_ao.quantize(tiny, calibration, Recipe("carried", scheme))
    assert sum(item.role == "carried_state" for item in program.report().quantization.accepted) == 2
    data = data_of(program)
    assert "selective_scan" not in {node.node for node in data.nodes}
    assert not any(row.role.startswith("scan") for row in data.ranges)


@pytest.mark.parametrize("recipe", ["mambaquant-paper-w8a8", "mambaquant-w4a16"])
def test_page_of_exposed_states_and_of_weights_alone(tiny: MambaLM, calibration: list[Tensor], recipe: str) -> None:
    data = data_of(mq_ao.quantize(tiny, calibration, recipe))
    assert all(math.isfinite(node.sqnr) for node in data.nodes)
    roles = {row.role for row in data.ranges}
    assert {"state h", "state C"} <= roles if "paper" in recipe else "conv1d" not in roles


def test_report_writes_the_page_and_returns_the_text(built: Built, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    report = built.program.report(html=path)
    assert report is built.program.report()
    text = path.read_text(encoding="utf-8")
    assert "<h1>MambaLM</h1>" in text
    assert "calibration batches: 4, tokens: 256" in text  # 4 of 2 x 32
    assert "2 x 32 calibration tokens" in text
    for name in ("rotated", "rotate_residual (R1)", "backbone.layers.1.mixer.out_proj", torch.__version__):
        assert name in text
    built.program.report(html=str(path), title="a < b")
    assert "<h1>a &lt; b</h1>" in path.read_text(encoding="utf-8")
    with pytest.raises(MqAoError, match=r"page\.txt must end in \.html"):
        built.program.report(html=tmp_path / "page.txt")


def test_a_model_that_is_no_language_model_has_a_page_too(tiny: MambaLM, tmp_path: Path) -> None:
    states = tiny.initial_states(2)
    program = mq_ao.quantize(tiny.backbone, [(tokens(2, 8), *states)], "rtn-w8a8")
    program.report(html=tmp_path / "page.html", title="a backbone")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<h1>a backbone</h1>" in text
    assert "calibration batches: 1, tokens: 16</dd>" in text
    # Its outputs are no logits: nothing that generates.
    batches = [(tokens(2, 8), *states)]
    assert "vocab_size" not in mq_ao.quantize(tiny.backbone, batches, "rtn-w8a8", backend="cuda").lower().info


def test_command_line_writes_the_page_before_it_compiles(
    tiny: MambaLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lower(*_: object, **__: object) -> None:
        raise MqAoError("compilation was not wanted.")

    def run(*args: object) -> str:
        monkeypatch.setattr(sys, "argv", ["mq-ao", "quantize", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 2
        return capsys.readouterr().err

    monkeypatch.setattr(QuantizedModel, "lower", lower)
    model, page = tmp_path / "model", tmp_path / "page.html"
    save_pretrained(tiny, model)
    options = (model, "-o", tmp_path / "p.pt2", "--calibration", demo.CALIBRATION, "--tokens", 64, "--report")
    assert "must end in .html" in run(*options, tmp_path / "page.md")
    assert "compilation was not wanted" in run(*options, page)
    assert f"<h1>{model}</h1>" in page.read_text(encoding="utf-8")
