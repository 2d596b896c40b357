"""Contenders compute the same thing, rounds interleave, failures stay in their row."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table

from mq_ao.bench import prepare, runner, shapes
from mq_ao.bench.contender import Contender, Eager, Program
from mq_ao.bench.prepare import FP32, FP32_EAGER, INT8, TRANSFORMERS_EAGER, Peer, int8_names, parse_peers, random_ids
from mq_ao.bench.quantizing import QuantizingCost, measure_quantizing
from mq_ao.bench.results import Measured, Results
from mq_ao.bench.runner import Bench, Plan
from mq_ao.bench.table import render, render_quantizing
from mq_ao.bench.worker import Kind, Memory, Spec, Start, Worker, call_alone
from mq_ao.errors import MqAoError
from mq_ao.lowering.inductor import InductorProgram
from mq_ao.models import Logits, MambaConfig, MambaLM, language_model
from mq_ao.models.saving import save_pretrained
from mq_ao.recipes import RECIPES

from .conftest import VOCAB, tokens


def check(contender: Contender, model: MambaLM, tolerance: float) -> None:
    """The contender's logits are those of the model, in a prefill, in steps after it, and in a second sequence."""
    ids = tokens(1, 20)
    with torch.no_grad():
        expected = model(ids)[0][0]
        for _ in range(2):
            assert_close(contender.prefill(ids[:, :12]), expected[11], tolerance)
            assert_close(contender.decode(ids[:, 12:]), expected[-1], tolerance)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).norm() / expected.norm() < tolerance


def random_model(**changes: Any) -> MambaLM:
    torch.manual_seed(1)
    return MambaLM(MambaConfig(vocab_size=VOCAB, d_model=64, n_layer=2, **changes)).eval()


def test_eager(tiny: MambaLM) -> None:
    contender = Eager(tiny)
    check(contender, tiny, 1e-5)  # float32, summed in another order
    assert contender.weight_bytes == 4 * sum(p.numel() for p in tiny.parameters())


def test_program(tiny: MambaLM, program: InductorProgram) -> None:
    contender = Program(program)
    check(contender, tiny, 0.2)  # int8 on random weights: the order of magnitude shows that it runs the same tokens
    assert contender.weight_bytes == program.weight_bytes


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False, "conv_bias": False, "d_state": 8}])
def test_transformers(changes: dict[str, Any]) -> None:
    pytest.importorskip("transformers")
    from mq_ao.bench.peer_transformers import Transformers

    model = random_model(**changes)
    contender = Transformers(model)
    check(contender, model, 1e-5)
    assert contender.weight_bytes == sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False, "conv_bias": False}])
def test_gguf(tmp_path: Path, changes: dict[str, Any]) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp")
    from mq_ao.bench.gguf_writer import write_f32
    from mq_ao.bench.peer_llama import Llama, quantize

    model = random_model(**changes)
    write_f32(model, tmp_path / "f32.gguf")
    for kind in ("Q8_0", "Q4_0"):
        quantize(tmp_path / "f32.gguf", tmp_path / f"{kind}.gguf", kind, threads=2)
    full = Llama(tmp_path / "f32.gguf", threads=2, longest=64)
    small, smaller = (Llama(tmp_path / f"{kind}.gguf", threads=2, longest=64) for kind in ("Q8_0", "Q4_0"))
    check(full, model, 1e-5)
    check(small, model, 0.1)  # 8-bit weights and activations
    check(smaller, model, 0.5)  # 4-bit weights of a random model
    assert full.weight_bytes > 2 * small.weight_bytes > 2 * smaller.weight_bytes


def test_gguf_refuses_what_llama_cannot_compute(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from mq_ao.bench.gguf_writer import write_f32

    with pytest.raises(MqAoError, match="no bias in in_proj"):
        write_f32(random_model(bias=True), tmp_path / "f32.gguf")
    assert not (tmp_path / "f32.gguf").exists()


def test_llama_refuses_a_broken_file(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    from mq_ao.bench.peer_llama import Llama, quantize

    (tmp_path / "broken.gguf").write_bytes(b"GGUF and no more")
    with pytest.raises(MqAoError, match=r"could not load broken\.gguf"):
        Llama(tmp_path / "broken.gguf", threads=1, longest=8)
    with pytest.raises(MqAoError, match="could not quantize"):
        quantize(tmp_path / "broken.gguf", tmp_path / "q8_0.gguf", "Q8_0", threads=1)


@pytest.fixture(scope="module")
def folder(tiny: MambaLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "model"
    save_pretrained(tiny, folder)
    return folder


def test_a_worker_runs_the_model(tiny: MambaLM, folder: Path) -> None:
    ids = tokens(1, 12)
    with Worker(Spec("ours", Kind.EAGER, folder, threads=1, longest=12)) as worker:
        logits = torch.tensor(worker.logits(ids[0, :8].tolist(), ids[0, 8:].tolist()))
        assert worker.prefill(ids[0].tolist()) > 0
        assert worker.decode([1, 2], [3, 4]) > 0
        memory = worker.memory()
    with Worker(Spec("ours", Kind.EAGER, folder, threads=1, longest=12)) as worker:
        start = worker.start([1, 2], [3, 4])
    with torch.no_grad():
        assert_close(logits, tiny(ids)[0][0, -1], 1e-5)
    assert memory.peak >= memory.libraries > memory.weight_bytes > 0
    assert 0 < start.seconds < 60
    assert memory.weight_bytes <= start.peak < memory.peak


def test_a_workers_failures_name_it(folder: Path) -> None:
    spec = Spec("ours", Kind.EAGER, folder, threads=1, longest=12)
    with Worker(spec) as worker:
        with pytest.raises(MqAoError, match="ours: "):
            worker.prefill([VOCAB + 1])
        assert worker.prefill([1, 2]) > 0  # and it goes on
        worker._process.kill()
        with pytest.raises(MqAoError, match="ours: its process ended with code -9"):
            worker.prefill([1, 2])


def test_quantizing_costs_time_and_memory(folder: Path, tiny: MambaLM) -> None:
    cost = measure_quantizing(str(folder), "mambaquant-w8a8", 600, threads=1)
    weights = sum(parameter.nbytes for parameter in tiny.parameters())
    assert (cost.model, cost.recipe, cost.tokens) == (str(folder), "mambaquant-w8a8", 1024)  # whole windows
    assert cost.seconds > 0 and cost.float_bytes == weights
    # Statistics, ranges and graphs take more than the weights, and are counted.
    assert cost.peak - cost.libraries > weights
    content = json.loads(json.dumps(cost.to_dict()))
    assert content["peak_of_float"] == pytest.approx(cost.peak / weights)
    assert content["peak_without_libraries_of_float"] == pytest.approx((cost.peak - cost.libraries) / weights)
    with pytest.raises(MqAoError, match="none, rtn-w8a8: .*none"):
        measure_quantizing("none", "rtn-w8a8", 512, threads=1)


def test_the_cost_of_quantizing_as_text() -> None:
    text = as_text(render_quantizing([QuantizingCost("m", "rtn-w8a8", 16384, 12.34, 5 * 10**8, 10**8, 12 * 10**8)]))
    for wanted in ("rtn-w8a8", "16384", "12.3", "500.0", "1200 (100)", "2.40x", "2.20x"):
        assert wanted in text, wanted


def test_a_function_in_a_process_of_its_own() -> None:
    assert call_alone("sum", sum, [1, 2, 3]) == 6
    assert call_alone("where", os.getpid) != os.getpid()
    with pytest.raises(MqAoError, match="bad: ValueError: invalid literal"):
        call_alone("bad", int, "x")
    with pytest.raises(MqAoError, match="gone: its process ended with code 3 "):
        call_alone("gone", os._exit, 3)


class FakeWorker:
    """Answers at once, and notes who was asked for what."""

    log: list[tuple[str, str, int]] = []  # noqa: RUF012  (cleared by the test)

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    def __enter__(self) -> FakeWorker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.log.append((self.spec.name, "close", 0))

    def prefill(self, ids: list[int]) -> float:
        if self.spec.name == "weak" and len(ids) > 8:
            raise MqAoError("weak: out of breath")
        self.log.append((self.spec.name, "prefill", len(ids)))
        return 40.0 if self.spec.name == "slow" else 2.0

    def decode(self, prompt: list[int], ids: list[int]) -> float:
        self.log.append((self.spec.name, "decode", len(ids)))
        return 0.5

    def start(self, prompt: list[int], ids: list[int]) -> Start:
        self.log.append((self.spec.name, "start", len(ids)))
        return Start(0.25, 300)

    def logits(self, prompt: list[int], ids: list[int]) -> list[float]:
        return [3.0, 4.0 if self.spec.name != "slow" else 4.5]

    def memory(self) -> Memory:
        return Memory(100, 1000, 2000)


@contextmanager
def no_bar(what: str, total: int) -> Iterator[Any]:
    yield lambda *_: None


def test_rounds_interleave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "Worker", FakeWorker)
    FakeWorker.log.clear()
    specs = [Spec(name, Kind.EAGER, Path(), 1, 64) for name in ("first", "weak", "slow")]
    plan = Plan(lengths=(8, 16), repeats=3, decode_tokens=5, patience=60)
    results = Bench("model", specs, VOCAB, plan).run(nullcontext, no_bar)

    prefill = [name for name, what, size in FakeWorker.log if (what, size) == ("prefill", 8)]
    # The slow one has spent its patience after two rounds.
    assert prefill == ["first", "weak", "slow", "first", "weak", "slow", "first", "weak"]
    weak = results.contenders["weak"]
    assert weak.failure == "weak: out of breath"
    assert weak.prefill == {8: [2.0, 2.0, 2.0]}
    assert weak.decode == {}
    assert results.contenders["first"].prefill == {8: [2.0] * 3, 16: [2.0] * 3}
    assert results.contenders["first"].logits_error == 0.0
    assert results.contenders["slow"].logits_error == pytest.approx(0.1)
    # Each in a process of its own, which is closed before the next one starts.
    started = FakeWorker.log.index(("first", "start", 5))
    assert FakeWorker.log[started : started + 3] == [("first", "start", 5), ("first", "close", 0), ("weak", "start", 5)]
    assert results.contenders["weak"].starts == [Start(0.25, 300)] * 3
    closed = [name for name, what, _ in FakeWorker.log if what == "close"]
    assert set(closed) == {"first", "weak", "slow"}


def test_without_patience_everything_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "Worker", FakeWorker)
    specs = [Spec(name, Kind.EAGER, Path(), 1, 64) for name in ("first", "slow")]
    results = Bench("model", specs, VOCAB, Plan((8,), 3, 5, patience=0)).run(nullcontext, no_bar)
    assert [len(item.prefill[8]) for item in results.contenders.values()] == [1, 1]
    assert [len(item.decode[64]) for item in results.contenders.values()] == [1, 1]


def test_a_contender_that_does_not_open_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def worker(spec: Spec) -> FakeWorker:
        if spec.name == "absent":
            raise MqAoError("absent: no such file")
        return FakeWorker(spec)

    monkeypatch.setattr(runner, "Worker", worker)
    specs = [Spec(name, Kind.EAGER, Path(), 1, 64) for name in ("absent", "second")]
    results = Bench("model", specs, VOCAB, Plan((4,), repeats=1, decode_tokens=2)).run(nullcontext, no_bar)
    assert results.contenders["absent"].failure == "absent: no such file"
    assert results.contenders["second"].decode == {64: [0.5]}


@pytest.fixture
def results() -> Results:
    memory = Memory(400, 10_000_000, 90_000_000)
    contenders = {
        FP32_EAGER: Measured(FP32_EAGER, {100: [4.0], 400: [20.0]}, {64: [0.4]}, memory, 0.0),
        FP32: Measured(FP32, {100: [3.0, 9.0, 2.0], 400: [12.0]}, {64: [0.3]}, memory, 1e-6),
        INT8: Measured(INT8, {100: [1.0, 1.0, 5.0], 400: [4.0]}, {64: [0.1]}, Memory(120, 1, 200, 181), 0.02),
        "llama.cpp Q8_0": Measured("llama.cpp Q8_0", {100: [6.0]}, failure="llama.cpp Q8_0: it crashed"),
    }
    return Results("model", (100, 400), (64,), 64, contenders)


def as_text(parts: Sequence[Table | str]) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    for part in parts:
        console.print(part)
    return console.export_text()


def test_figures(results: Results) -> None:
    results.contenders[INT8].starts += [Start(0.1, 5), Start(0.5, 1), Start(0.2, 3)]
    results.contenders[FP32].starts += [Start(0.4, 9)]
    assert results.contenders[INT8].start_median() == Start(0.2, 3)
    figures = {figure.name: figure.value for figure in results.figures()}
    assert figures[f"{INT8} against {FP32}, first token"] == 2.0
    assert f"{INT8} against llama.cpp Q8_0, first token" not in figures
    assert figures[f"{INT8} against {FP32}, prefill of 100 tokens"] == 3.0
    assert figures[f"{INT8} against {FP32}, decode"] == pytest.approx(3.0)
    assert figures[f"{INT8} against llama.cpp Q8_0, prefill of 100 tokens"] == 6.0
    assert f"{INT8} against llama.cpp Q8_0, decode" not in figures
    assert figures[f"{FP32} against llama.cpp Q8_0, prefill of 100 tokens"] == 2.0
    assert figures[f"{INT8}: prefill time of 400 against 100 tokens"] == 4.0
    assert figures[f"resident weights of {INT8} against {FP32}"] == pytest.approx(0.3)
    # 180 bytes beyond the libraries for 120 of weights.
    overhead = f"memory of {INT8} while decoding, beyond libraries and weights, of its weights"
    assert figures[overhead] == pytest.approx(0.5)


def test_several_recipes(results: Results) -> None:
    first, second = int8_names([RECIPES["rtn-w8a8"], RECIPES["mambaquant-w8a8"]])
    assert (first, second) == ("int8 (rtn-w8a8)", "int8 (mambaquant-w8a8)")
    memory = Memory(120, 1, 2)
    # The second round was slow for both, and the second recipe did not run a third.
    ours = {
        first: Measured(first, {100: [1.0, 4.0, 1.0], 400: [4.0]}, {64: [0.1]}, memory),
        second: Measured(second, {100: [0.5, 2.2], 400: [3.0]}, {64: [0.12]}, Memory(240, 1, 2)),
    }
    others = {name: row for name, row in results.contenders.items() if name != INT8}
    results = Results("model", (100, 400), (64,), 64, others | ours)
    assert results.quantized == (first, second)
    figures = {figure.name: figure.value for figure in results.figures()}
    assert figures[f"time of {second} against {first}, prefill of 100 tokens"] == pytest.approx((0.5 + 0.55) / 2)
    assert figures[f"time of {second} against {first}, prefill of 400 tokens"] == 0.75
    assert figures[f"time of {second} against {first}, decode"] == pytest.approx(1.2)
    assert figures[f"{second} against {FP32}, prefill of 400 tokens"] == 4.0
    assert figures[f"{first}: prefill time of 400 against 100 tokens"] == 4.0
    assert figures[f"resident weights of {second} against {FP32}"] == pytest.approx(0.6)
    # Int8 programs are not set against each other, nor fp32 against them, as contenders of other kinds are.
    assert not any(name.startswith((f"{first} against {second}", f"{FP32} against int8")) for name in figures)
    text = as_text(render(results))
    for wanted in (f"times that of {first}", f"time of {second} against {first}, decode: 1.2x", "1350 (1.35x)"):
        assert wanted in text, wanted
    ours[second].failure = "it crashed"
    assert results.own_failure == "it crashed"


def test_names_are_shown_beside_many_figures() -> None:
    """Where the output is no terminal a table has 120 columns."""
    (name,) = int8_names([RECIPES["mambaquant-w8a8"]])
    lengths = (128, 1024, 4096)
    slow = {length: [33.4] for length in lengths}
    names = (name, FP32, "transformers eager")
    rows = [Measured(row, slow, {64: [0.0542]}, Memory(516_500_000, 1, 2)) for row in names]
    table = as_text(render(Results("mamba-130m", lengths, (64,), 64, {row.name: row for row in rows})))
    for row in rows:
        assert f"│ {row.name} " in table


def test_recipes_of_one_name_are_refused() -> None:
    with pytest.raises(MqAoError, match="two recipes are called rtn-w8a8: give each once"):
        int8_names([RECIPES["rtn-w8a8"]] * 2)
    assert int8_names([RECIPES["rtn-w8a8"]]) == [INT8]


def test_only_our_own_failures_are_failures_of_the_bench(results: Results) -> None:
    assert results.own_failure is None
    results.contenders[INT8].failure = "int8: it crashed"
    assert results.own_failure == "int8: it crashed"


def test_results_as_json_and_as_text(results: Results) -> None:
    content = json.loads(json.dumps(results.to_dict()))
    fp32 = content["contenders"][1]
    assert fp32["prefill"][0] == {
        "tokens": 100,
        "ms": 3000.0,
        "tokens_per_second": pytest.approx(100 / 3),
        "samples_ms": [3000.0, 9000.0, 2000.0],
    }
    assert fp32["memory_bytes"] == {"weight_bytes": 400, "libraries": 10_000_000, "peak": 90_000_000, "decoding": None}
    text = as_text(render(results))
    for wanted in (FP32, "3000 (3.00x)", "100 (1.00x)", "it crashed", "fewer rounds (1 at 100 tokens"):
        assert wanted in text, wanted


def test_peers() -> None:
    with pytest.raises(MqAoError, match=r"unknown peer 'onnx': the peers are transformers, llama\.cpp"):
        parse_peers(["onnx"])
    assert parse_peers([]) == []


def test_a_peer_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(prepare._MODULES, Peer.LLAMA, ("no_such_module",))
    with pytest.raises(MqAoError, match="peer llama.cpp needs no_such_module"):
        parse_peers(["llama.cpp"])
    assert Peer.LLAMA not in prepare.installed_peers()


def test_random_models_and_tokens_are_the_same_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.SHAPES, "small", partial(language_model, MambaConfig(VOCAB, 16, 1)))
    torch.manual_seed(5)
    first = prepare.open_model("small").state_dict()
    torch.manual_seed(6)
    second = prepare.open_model("small").state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert random_ids(VOCAB, 5) == random_ids(VOCAB, 9)[:5]


def test_a_hybrid_is_set_against_transformers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")

    def hybrid() -> Logits:
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "attn_layer_indices": [1]}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "mamba_n_heads": 4, "mamba_d_head": 16}
        state = {"mamba_d_state": 8, "mamba_n_groups": 1, "vocab_size": VOCAB}
        return Logits(transformers.BambaForCausalLM(transformers.BambaConfig(**shape, **heads, **state)))

    monkeypatch.setitem(shapes.SHAPES, "small", hybrid)
    model, recipe = prepare.open_model("small"), RECIPES["rtn-w8a8"]
    plan = Plan((16,), repeats=1, decode_tokens=4, contexts=(8, 32))
    specs = prepare.prepare(model, tmp_path, recipes=[recipe], peers=[], threads=1, longest=plan.longest)
    results = Bench("small", specs, VOCAB, plan).run(nullcontext, no_bar)
    first, *ours = results.contenders.values()
    assert (first.name, [row.name for row in ours]) == (TRANSFORMERS_EAGER, [FP32, INT8])
    assert results.own_failure is None and first.failure is None
    # The same positions, caches and states, in float32; then int8 on random weights.
    assert [row.logits_error < limit for row, limit in zip(ours, (1e-5, 0.2), strict=True)] == [True, True]  # type: ignore[operator]
    assert all(set(row.decode) == {8, 32} for row in results.contenders.values())
    figures = {figure.name for figure in results.figures()}
    assert {
        f"{INT8} against {TRANSFORMERS_EAGER}, decode after 32 tokens",
        f"{INT8}: decode time after 32 against 8 tokens",
    } <= figures
    assert "after" in as_text(render(results))
