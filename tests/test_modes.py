"""Modes of torch that a thread is in, of the caller's or of the data's, and parts of a model in a mode of their own."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mq_ao
from mq_ao import MqAoError
from mq_ao.api import capture
from mq_ao.capture import mode_wrappers
from mq_ao.capture.replacing import replaced
from mq_ao.models import MambaLM
from tests.blocks import Blocks, X, output
from tests.conftest import tokens

BATCHES = [tokens(2, 12, seed=seed) for seed in range(2)]


@pytest.fixture(scope="module")
def blocks() -> Blocks:
    return Blocks()


def bfloat16() -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("mode", [bfloat16, torch.inference_mode])
def test_captures_are_the_same_in_any_mode(mode: Callable[[], Any], tiny: MambaLM) -> None:
    with mode():
        program, graph = mq_ao.export(Blocks(), (X[0],)), capture(tiny, ())
    dtypes = {
        value.dtype
        for module in (program.graph_module, graph)
        for node in module.graph.nodes
        if isinstance(value := node.meta.get("val"), Tensor) and value.is_floating_point()
    }
    assert dtypes == {torch.float32}
    with torch.no_grad():
        torch.testing.assert_close(program.module()(X[0]), Blocks()(X[0]))


@pytest.mark.parametrize("mode", [bfloat16, torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("recipe", ["rtn-w8a8", "mambaquant-w8a8"])
def test_data_that_is_made_in_a_mode(mode: Callable[[], Any], recipe: str) -> None:
    def batches() -> Iterator[Tensor]:
        with mode():
            for x in X:
                yield x * 1

    quantized, expected = mq_ao.quantize(Blocks(), batches(), recipe), mq_ao.quantize(Blocks(), X, recipe)
    assert torch.equal(output(quantized, X[0]), output(expected, X[0]))
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")
    assert not torch.is_inference_mode_enabled()


def test_data_may_wait_for_another_thread_that_captures() -> None:
    with ThreadPoolExecutor(1) as other:

        def batches() -> Iterator[Tensor]:
            for x in X:
                other.submit(mq_ao.export, Blocks(), (x,)).result(timeout=60)
                yield x

        mq_ao.quantize(Blocks(), batches(), "rtn-w8a8")


def test_inference_mode(tiny: MambaLM, blocks: Blocks) -> None:
    with torch.inference_mode():
        torch.manual_seed(0)
        loaded = Blocks().eval()
        inside = mq_ao.quantize(loaded, [x.clone() for x in X], "mambaquant-w8a8")
    outside = mq_ao.quantize(loaded, X, "mambaquant-w8a8")
    expected = mq_ao.quantize(blocks, X, "mambaquant-w8a8")
    assert torch.equal(output(inside, X[0]), output(expected, X[0]))
    assert torch.equal(output(outside, X[0]), output(expected, X[0]))
    assert loaded.mixers[0].A_log.is_inference()


class Under(nn.Module):
    """Runs its inner model in a mode."""

    def __init__(self, inner: nn.Module, mode: Callable[[], Any]) -> None:
        super().__init__()
        self.inner, self.mode = inner, mode

    def forward(self, x: Tensor) -> Tensor:
        with self.mode():
            y = self.inner(x)
            with torch.enable_grad():
                return y + 0.5 * x


@pytest.mark.parametrize(
    "mode",
    [
        torch.enable_grad,
        torch.no_grad,
        lambda: torch.amp.autocast("cuda", enabled=False),
        lambda: torch.autocast("cpu", enabled=False),
    ],
)
def test_grad_modes_and_disabled_autocasts_are_inlined(blocks: Blocks, mode: Callable[[], Any]) -> None:
    model = Under(blocks, mode).eval()
    quantized = mq_ao.quantize(model, X, "rtn-w8a8")
    accepted = [item.role for item in quantized.report().quantization.accepted]
    assert len(accepted) == len(mq_ao.quantize(blocks, X, "rtn-w8a8").report().quantization.accepted)
    program = mq_ao.export(model, (X[0],))
    assert not [node for node in program.graph.nodes if "wrap" in str(node.target)]
    with torch.no_grad():
        torch.testing.assert_close(program.module()(X[0][:1, :3]), model(X[0][:1, :3]))


def test_an_enabled_autocast_is_left_out_and_named(blocks: Blocks, caplog: pytest.LogCaptureFixture) -> None:
    model = Under(blocks, lambda: torch.autocast("cpu", dtype=torch.bfloat16)).eval()
    program = mq_ao.export(model, (X[0],))
    assert "the model's own autocast to bfloat16 is left out" in caplog.text
    with torch.no_grad():
        torch.testing.assert_close(program.module()(X[0]), blocks(X[0]) + 0.5 * X[0])


class Kept(nn.Module):
    """Enters the same autocast at every call, and one by a decorator."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.mode = nn.Linear(4, 4), torch.autocast("cpu", dtype=torch.bfloat16)

    @torch.autocast("cpu", dtype=torch.bfloat16)
    def decorated(self, x: Tensor) -> Tensor:
        return self.linear(x)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with self.mode:
            y = self.linear(x)
        return y, self.decorated(x)


def test_a_capture_leaves_the_models_autocast_and_that_of_other_threads_on() -> None:
    model, x = Kept().eval(), torch.randn(2, 3, 4)
    assert [y.dtype for y in mq_ao.export(model, (x,)).module()(x)] == [torch.float32] * 2
    assert [y.dtype for y in model(x)] == [torch.bfloat16] * 2
    seen: list[torch.dtype] = []

    def other() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            seen.append((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)

    with replaced(mode_wrappers.replacements()):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert seen == [torch.bfloat16]


def test_an_autocast_around_quantize_changes_nothing(blocks: Blocks) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        quantized = mq_ao.quantize(blocks, X, "mambaquant-w8a8")
    expected = mq_ao.quantize(blocks, X, "mambaquant-w8a8")
    assert torch.equal(output(quantized, X[0]), output(expected, X[0]))


def test_a_generator_is_closed_when_its_data_is_refused() -> None:
    closed: list[bool] = []

    def batches() -> Iterator[Any]:
        try:
            with torch.no_grad():
                yield from [*X, "text"]
        finally:
            closed.append(True)

    held = batches()
    for data in (held, ((x, x) for x in X)):
        with pytest.raises(MqAoError):
            mq_ao.quantize(Blocks(), data, "rtn-w8a8")
        assert torch.is_grad_enabled()
    assert closed == [True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_default_dtype_of_half_precision_changes_nothing(dtype: torch.dtype) -> None:
    expected = mq_ao.quantize(Blocks(), X, "rtn-w8a8")
    model = Blocks()
    torch.set_default_dtype(dtype)
    try:
        quantized = mq_ao.quantize(model, X, "rtn-w8a8")
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(output(quantized, X[0]), output(expected, X[0]))


class Remembering(Blocks):
    """Goes on from what it kept of the call before, in attributes and in lists."""

    last: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.means = [torch.zeros(16)]

    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks(x + self.means[0])
        self.last, self.means[0] = y, x.mean((0, 1))
        return y


def test_what_a_model_keeps_is_put_back_and_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    model = Remembering()
    zeros = model.means[0]
    mq_ao.quantize(model, X, "rtn-w8a8")
    assert model.last is None and model.means[0] is zeros
    assert "the model keeps values in means, last while it runs" in caplog.text


class Scaling(Blocks):
    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x.mul_(2))


def test_a_model_that_writes_to_its_input_is_refused_and_the_data_unchanged() -> None:
    x = X[0].clone()
    with pytest.raises(MqAoError, match="writes to its buffer or input x while it runs"):
        mq_ao.quantize(Scaling(), [x])
    assert torch.equal(x, X[0])


class Dropping(Blocks):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.9)  # in training mode, as a new module is

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.dropout(x))


def test_a_part_in_training_mode_is_named() -> None:
    with pytest.raises(MqAoError, match=r"dropout \(Dropout\) is in training mode: call .eval\(\) on the model"):
        mq_ao.export(Dropping(), (X[0],))
    model = Blocks()
    model.mixers[1].train()
    with pytest.raises(MqAoError, match=r"mixers.1 \(MambaMixer\) is in training mode"):
        mq_ao.quantize(model, X)


class Counting(Blocks):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.blocks(x * self.calls)


def test_a_model_that_writes_to_a_buffer_is_refused_and_unchanged() -> None:
    model = Counting()
    with pytest.raises(MqAoError, match="writes to its buffer or input calls while it runs"):
        mq_ao.quantize(model, X)
    assert model.calls == 0


class Masked(Blocks):
    def __init__(self, fill: float = -torch.inf) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((8, 8), fill).triu(1))


def test_buffers_may_hold_inf_and_parameters_not() -> None:
    assert mq_ao.quantize(Masked(), X, "rtn-w8a8")
    with pytest.raises(MqAoError, match="weight mask holds NaN or Inf"):
        mq_ao.quantize(Masked(torch.nan), X)
    model = Blocks()
    with torch.no_grad():
        model.mixers[0].D[3] = -torch.inf
    with pytest.raises(MqAoError, match=r"weight mixers.0.D holds NaN or Inf"):
        mq_ao.quantize(model, X)


class Listed(Blocks):
    """Keeps tensors that are no parameters where `.to()` does not find them."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = {"scales": [torch.ones(16, 16, dtype=torch.bfloat16)]}

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x @ self.kept["scales"][0])


def test_tensors_in_lists_and_dictionaries_of_a_module_are_converted_and_come_back() -> None:
    model = Listed().bfloat16()
    kept = model.kept["scales"][0]
    wanted = copy.deepcopy(model).float()
    wanted.kept = {"scales": [kept.float()]}
    got, expected = mq_ao.quantize(model, X, "rtn-w8a8"), mq_ao.quantize(wanted, X, "rtn-w8a8")
    assert torch.equal(output(got, X[0]), output(expected, X[0]))
    assert model.kept["scales"][0] is kept
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
