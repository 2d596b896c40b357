"""Native programs: what runs without a compiler gives what its graph gives, from any file that is one of its own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule

import mq_ao
from mq_ao import MqAoError
from mq_ao.capture.stateful_export import export_with_states
from mq_ao.lowering import native, tensor_file
from mq_ao.lowering.native import file
from mq_ao.lowering.native.plan import Plan, Step, Value
from mq_ao.models import Mamba2Config, MambaLM, language_model
from mq_ao.quantized import QuantizedModel
from tests.conftest import VOCAB, CommandLine, error, tokens

pytestmark = pytest.mark.usefixtures("native_kernels")

# A value on the boundary of two integers may round either way where the norm before it sums in another order: one step
# of one activation. Everything else agrees to float32 rounding.
FLIPPED_STEP = 5e-3


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.fixture(scope="module", params=["rtn-w8a8", "mambaquant-w8a8", "mambaquant-static-w8a8", "mambaquant-w4a8"])
def lowered(
    request: pytest.FixtureRequest, tiny: MambaLM, calibration: list[Tensor]
) -> tuple[QuantizedModel, native.NativeProgram]:
    quantized = mq_ao.quantize(tiny, calibration, request.param)
    return quantized, quantized.lower("native")


def test_prefill_and_decode_equal_the_simulation(
    lowered: tuple[QuantizedModel, native.NativeProgram], tiny: MambaLM
) -> None:
    quantized, program = lowered
    for batch, length in ((1, 1), (2, 19), (3, 70)):
        ids = tokens(batch, length)
        with torch.no_grad():
            expected = quantized.converted(ids, *tiny.initial_states(batch))
        got = program(ids)
        for value, wanted in zip(got, expected, strict=True):
            assert relative(value, wanted) < FLIPPED_STEP
        last, *states = program.prefill(ids)
        assert torch.equal(last, got[0][:, -1:]) and all(map(torch.equal, states, got[1:]))
        following = tokens(batch, 1, seed=5)
        with torch.no_grad():
            expected = quantized.converted(following, *states)
        for value, wanted in zip(program.decode(following, *states), expected, strict=True):
            assert relative(value, wanted) < FLIPPED_STEP


def test_every_linear_convolution_norm_and_gate_is_an_integer_kernel(
    lowered: tuple[QuantizedModel, native.NativeProgram],
) -> None:
    _, program = lowered
    counts, called = program.integer_kernels, [step.target for step in program.saved.plan.steps]
    assert sum(count for name, count in counts.items() if "linear_packed" in name) == 5 * 2 + 1
    assert counts["mq_ao.qcausal_conv1d.default"] == 2
    # One before each block and one before the head.
    assert counts.get("mq_ao.qrms_norm.default", 3) == 3
    assert not any(name.startswith(("aten::linear", "aten::matmul", "aten::conv")) for name in called)
    # The layers write their states where they belong.
    assert "aten::stack.default" not in called and "aten::cat.default" not in called
    assert called.count("mq_ao::qcausal_conv1d_into.default") == 2


def test_states_of_earlier_steps_stay_as_they_are(lowered: tuple[QuantizedModel, native.NativeProgram]) -> None:
    _, program = lowered
    _, *first = program.prefill(tokens(2, 9))
    kept = [state.clone() for state in first]
    states, views = first, []
    for seed in range(12):  # more than the plan keeps memory for
        _, *states = program.decode(tokens(2, 1, seed=seed), *states)
        views.append((states[1][0].numpy(), states[1][0].clone()))
    assert all(map(torch.equal, first, kept))
    for view, value in views:
        assert torch.equal(torch.from_numpy(view), value)


def test_memory_of_states_is_used_again(lowered: tuple[QuantizedModel, native.NativeProgram]) -> None:
    _, program = lowered
    _, *states = program.prefill(tokens(2, 9))
    places = []
    for seed in range(6):
        _, *states = program.decode(tokens(2, 1, seed=seed), *states)
        places.append(states[1].data_ptr())
    assert places[2:] == places[:-2] and places[0] != places[1]


def test_a_program_in_a_file_is_the_same_program(
    lowered: tuple[QuantizedModel, native.NativeProgram], tmp_path: Path
) -> None:
    _, program = lowered
    path = tmp_path / "m.ptn"
    program.save(path)
    loaded = mq_ao.load(path)
    ids = tokens(2, 12)
    assert all(map(torch.equal, loaded(ids), program(ids)))
    assert loaded.info == program.info and loaded.weight_bytes == program.weight_bytes
    # The file is one of safetensors, whose tensors begin where a line of the cache does.
    from safetensors import safe_open

    with safe_open(path, "pt") as opened:
        assert set(opened.keys()) == set(program.saved.weights)
    assert min(tensor.data_ptr() for tensor in loaded.saved.weights.values()) % 64 == 0
    loaded.save(tmp_path / "again.ptn")
    assert (tmp_path / "again.ptn").read_bytes() == path.read_bytes()


def test_it_runs_without_a_compiler_and_what_makes_programs(
    lowered: tuple[QuantizedModel, native.NativeProgram], tmp_path: Path
) -> None:
    _, program = lowered
    program.save(tmp_path / "m.ptn")
    script = (
        "import sys, torch, mq_ao\n"
        "program = mq_ao.load(sys.argv[1])\n"
        "print(program.generate(torch.arange(5)[None], 6).tolist())\n"
        "print([name for name in ('torchao', 'torch._inductor.compile_fx', 'torch._dynamo') if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "m.ptn")], capture_output=True, text=True, check=True
    )
    ids, modules = done.stdout.splitlines()[-2:]
    assert json.loads(ids) == program.generate(torch.arange(5)[None], 6).tolist()
    assert modules == "[]"


def test_mamba2_and_float_models(calibration: list[Tensor]) -> None:
    config = Mamba2Config(vocab_size=VOCAB, d_model=32, n_layer=2, d_state=8, headdim=16)
    torch.manual_seed(0)
    model = language_model(config).eval()
    quantized = mq_ao.quantize(model, calibration, "mambaquant-w8a8", backend="native")
    program, ids = quantized.lower(), tokens(2, 21)
    with torch.no_grad():
        expected = quantized.converted(ids, *model.initial_states(2))
        float_expected = model(ids, *model.initial_states(2))
    assert program.integer_kernels["mq_ao.qssd_scan.default"] == 2
    for got, wanted in zip(program(ids), expected, strict=True):
        assert relative(got, wanted) < FLIPPED_STEP
    floats = mq_ao.api.compile_float(model, "native")
    assert floats.integer_kernels == {}
    for got, wanted in zip(floats(ids), float_expected, strict=True):
        assert relative(got, wanted) < 1e-5  # float32 sums in another order


@pytest.mark.parametrize("name", ["Bamba", "Jamba", "GraniteMoeHybrid"])
def test_hybrids(name: str) -> None:
    source = pytest.importorskip("tests.test_capture_transformers")
    model = source.build(name).eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, source.VOCAB, (2, 40), generator=generator)
    quantized = mq_ao.quantize(export_with_states(model).module(check_guards=False), [ids], "rtn-w8a8")
    program = quantized.lower("native")
    prompt = ids[:, :9]
    whole, *_ = program(prompt)
    compared = quantized.lower()(prompt)[0]
    assert relative(whole, compared) < 2e-2  # as of `test_families`: a value on a border, which the next layers follow
    _, *states = program.prefill(prompt[:, :-1])
    last, *_ = program.decode(prompt[:, -1:], *states)
    assert relative(last, whole[:, -1:]) < 2e-2


class Sizes(nn.Module):
    """Arithmetic on sizes, lists of sizes, pieces of which one is not read, dtypes and other constants."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (batch, length, 6)."""
        batch, length, _ = x.shape
        first, _, third = x.split([2, 1, 3], -1)
        joined = torch.cat([first.reshape(batch * length, 2), third.reshape(-1, 3)], -1)
        counts = torch.arange(length // 2 + 1, dtype=torch.float32) * (length - batch)
        return joined.to(torch.float64).sum(0), torch.full((batch, length % 3 + 1), 2.5) + counts.sum()


def plan_of(module: nn.Module, x: Tensor) -> Plan:
    axes = dict.fromkeys(range(2), torch.export.Dim.AUTO)
    exported = torch.export.export(module, (x,), dynamic_shapes=(axes,)).module(check_guards=False)
    assert isinstance(exported, GraphModule)
    return Plan.of(exported, 0)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 9))
def test_sizes_and_lists(batch: int, length: int) -> None:
    bound = _sizes_plan.bound([])
    x = torch.randn(batch, length, 6, generator=torch.Generator().manual_seed(batch * 10 + length))
    for got, expected in zip(bound.run([x]), Sizes()(x), strict=True):
        assert torch.equal(got, expected)


_sizes_plan = Plan.read(json.loads(json.dumps(plan_of(Sizes(), torch.randn(3, 7, 6)).described)))


def test_values_live_no_longer_than_they_are_read() -> None:
    class Chain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(40):
                x = x + 1
            return x

    plan = plan_of(Chain(), torch.zeros(2, 2))
    x = torch.zeros(2**9, 2**11)  # 4 MB, 160 MB if all were kept
    bound = plan.bound([])
    script = (
        "import json, resource, sys\n"
        "import torch\n"
        "import mq_ao.ops\n"
        "from mq_ao.lowering.native.plan import Plan\n"
        "mq_ao.ops.load_native()\n"
        "bound = Plan.read(json.loads(sys.stdin.read())).bound([])\n"
        "x = torch.zeros(2**9, 2**11)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "bound.run([x])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps(plan.described), capture_output=True, text=True, check=True
    )
    assert int(done.stdout.splitlines()[-1]) < 40 * 1024  # kB
    assert torch.equal(bound.run([x])[0], x + 40)


def broken(plan: Plan, at: int, **changes: Any) -> Plan:
    steps = list(plan.steps)
    steps[at] = replace(steps[at], **changes)
    return replace(plan, steps=tuple(steps))


def test_plans_that_do_not_fit_together_are_refused() -> None:
    step = Step("aten::add.Tensor", (Value(0), Value(1), 1), (2,))
    plan = Plan(2, (step,), (2,))
    one = torch.ones(2)
    assert torch.equal(plan.bound([]).run([one, one])[0], one + one)
    for wrong in (
        broken(plan, 0, arguments=(Value(0), Value(7), 1)),
        broken(plan, 0, arguments=(Value(0), Value(2), 1)),
        broken(plan, 0, arguments=(Value(0),)),
        broken(plan, 0, results=(5,)),
        broken(plan, 0, results=()),
        broken(plan, 0, target="aten::no_such_operator.default"),
        replace(plan, outputs=(3,)),
        replace(plan, inputs=-1),
    ):
        with pytest.raises(RuntimeError):
            wrong.bound([])
    with pytest.raises(MqAoError, match=r"a plan calls prims::add.default, which is no operator of aten or mq_ao"):
        broken(plan, 0, target="prims::add.default").bound([])
    with pytest.raises(RuntimeError, match="takes 2 inputs, not 1"):
        plan.bound([]).run([one])


def test_what_no_plan_can_hold_is_named() -> None:
    class Python(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.quantized_decomposed.quantize_per_tensor.default(x, 0.1, 0, 0, 255, torch.uint8)

    with pytest.raises(MqAoError, match=r"quantize_per_tensor is quantized_decomposed.*native backend cannot run"):
        plan_of(Python(), torch.zeros(2, 2))


def test_files_that_are_not_ours_or_damaged_are_refused(
    lowered: tuple[QuantizedModel, native.NativeProgram], tmp_path: Path
) -> None:
    _, program = lowered
    path, other = tmp_path / "m.ptn", tmp_path / "other.ptn"
    program.save(path)
    content = path.read_bytes()
    with pytest.raises(MqAoError, match="there is no file"):
        mq_ao.load(other)
    for wrong in (b"", b"12345678", content[:100], content[:-1], b"\xff" * 8 + content[8:], b"PK" + content[2:]):
        other.write_bytes(wrong)
        with pytest.raises(MqAoError, match="not a program saved by mq_ao, or is damaged"):
            mq_ao.load(other)
    other.write_bytes(b"".join(tensor_file.parts({"a": torch.zeros(3)}, {"what": "weights"})))
    with pytest.raises(MqAoError, match="not a program saved by mq_ao"):
        mq_ao.load(other)
    other.write_bytes(content.replace(b'\\"format\\": %d,' % file.FORMAT, b'\\"format\\": 9,'))
    with pytest.raises(MqAoError, match=f"was saved in format 9, but this is {file.FORMAT}"):
        mq_ao.load(other)
    other.write_bytes(content.replace(b"qcausal_conv1d_into", b"qcausal_conv1d_onto"))
    with pytest.raises(MqAoError, match="does not fit this mq_ao and PyTorch"):
        mq_ao.load(other)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=4))
@example([(86, 32)])  # the name of an entry that every program has
def test_mutated_files_never_crash(mutations: list[tuple[int, int]]) -> None:
    content = bytearray(_small_file())
    for place, byte in mutations:
        content[place % len(content)] = byte
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mutated.ptn"
        path.write_bytes(bytes(content))
        try:
            program = native.load(path)
        except MqAoError:
            return
        with contextlib.suppress(RuntimeError):  # what a plan computes may be anything
            program._bound.run([torch.ones(2)])


def _small_file() -> bytes:
    plan = Plan(1, (Step("aten::mul.Tensor", (Value(1), Value(0)), (2,)),), (2,))
    info = {"states": [], "vocab_size": 2, "integer_kernels": {}}
    described = {"format": file.FORMAT, "info": info, "weights": ["w"], "plan": plan.described}
    return b"".join(tensor_file.parts({"w": torch.ones(2)}, {file._NAME: json.dumps(described)}))


def test_other_backends_graphs_are_refused(tiny: MambaLM, calibration: list[Tensor]) -> None:
    quantized = mq_ao.quantize(tiny, calibration, "rtn-w8a8", backend="cuda")
    with pytest.raises(MqAoError, match="quantized for cuda, whose integers are not those of native"):
        quantized.lower("native")


def test_the_commands_know_them(mq_ao: CommandLine, tmp_path: Path) -> None:
    path = str(tmp_path / "demo.ptn")
    made = mq_ao("quantize", "demo", "--recipe", "rtn-w8a8", "--tokens", "2048", "--backend", "native", "-o", path)
    assert made.code == 0, made.err
    text = mq_ao("generate", path, "-p", "import ", "-n", "8")
    assert text.code == 0 and text.out.startswith("import ")
    assert "qgate" in mq_ao("inspect", path).out
    assert "must end in .ptn" in error(mq_ao("quantize", "demo", "--backend", "native", "-o", tmp_path / "demo.pt2"))


def test_without_native_kernels_it_says_why(
    lowered: tuple[QuantizedModel, native.NativeProgram], tmp_path: Path
) -> None:
    _, program = lowered
    program.save(tmp_path / "m.ptn")
    script = (
        "import sys, mq_ao\ntry:\n    mq_ao.load(sys.argv[1])\nexcept mq_ao.MqAoError as error:\n    print(error)\n"
    )
    environment = {**os.environ, "CXX": "no-such-compiler", "MQ_AO_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(tmp_path / "m.ptn")],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    said = done.stdout.splitlines()[-1]
    assert said.startswith(
        "a native program needs the native kernels: no C++ compiler found (looked for no-such-compiler)"
    )
