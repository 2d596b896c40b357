"""Mamba-2: what it computes, what it loads, exact rewrites, and integer programs of it."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mq_ao
from mq_ao import MqAoError, passes
from mq_ao.api import capture
from mq_ao.graph import Role, match
from mq_ao.lowering import inductor
from mq_ao.models import MAMBA2_130M, Mamba2Config, Mamba2LM, MambaLM
from mq_ao.passes import Status
from mq_ao.recipes import RECIPES
from tests.conftest import tokens

SMALL = Mamba2Config(vocab_size=61, d_model=32, n_layer=2, d_state=8, headdim=16, ngroups=2, norm_groups=2)
# Rewrites are computed in float64; what is left is rounding of some thousand operations.
EXACT = 1e-9


def build(config: Mamba2Config = SMALL) -> Mamba2LM:
    torch.manual_seed(0)
    model = Mamba2LM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith(".D"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return tokens(batch, length, seed=seed) % SMALL.vocab_size


VARIANTS = [
    {},
    {"ngroups": 1, "norm_groups": 1},
    {"norm_before_gate": True},
    {"D_has_hdim": True, "dt_min": 1e-3, "dt_max": 0.1},
    {"bias": True, "conv_bias": False, "tie_embeddings": False},
]


@pytest.mark.parametrize("change", VARIANTS, ids=str)
def test_a_sequence_in_two_parts_gives_what_it_gives_in_one(change: dict[str, Any]) -> None:
    model = build(Mamba2Config(**{**SMALL.to_dict(), **change})).double()
    given = ids(2, 11)
    with torch.no_grad():
        whole, *states = model(given)
        first, *carried = model(given[:, :4])
        second, *last = model(given[:, 4:], *carried)
    assert torch.allclose(torch.cat([first, second], 1), whole, rtol=EXACT, atol=EXACT)
    assert all(torch.allclose(a, b, rtol=EXACT, atol=EXACT) for a, b in zip(states, last, strict=True))
    assert states[1].shape == (2, 2, 4, 16, 8)


def test_the_matcher_finds_every_role() -> None:
    found = match(capture(build(), ()))
    assert [block.name for block in found.blocks] == ["backbone.layers.0.mixer", "backbone.layers.1.mixer"]
    assert found.rejected == ()
    assert Counter(role for role, _ in found.by_role()) == {
        Role.IN_PROJ: 2,
        Role.CONV1D: 2,
        Role.OUT_PROJ: 2,
        Role.HEAD: 1,
        Role.EMBEDDING: 1,
    }
    assert all(len(block.norms) == len(block.gates) == 1 for block in found.blocks)


# Which rewrites carry over to Mamba-2; the others need a low-rank dt, or B and C that are linear in a weight.
APPLIED = {
    ("fold_norm",): True,
    ("smooth_norm",): True,
    ("smooth_gate",): True,
    ("fold_norm", "smooth_gate"): True,
    ("smooth_conv",): True,
    ("fold_norm", "rotate_residual"): True,
    ("rotate_out_proj",): True,
    ("smooth_gate", "rotate_out_proj"): True,
    ("smooth_state",): False,
    ("smooth_dt",): False,
    ("shift_dt",): False,
    ("rotate_dt",): False,
    ("expose_state",): False,
    RECIPES["mambaquant-w8a8"].passes: False,
}


@pytest.mark.parametrize("change", VARIANTS[:3], ids=str)
@pytest.mark.parametrize("names", APPLIED, ids=lambda names: "+".join(str(getattr(n, "name", n)) for n in names))
def test_rewrites_are_exact_and_say_what_they_leave_out(names: tuple[str, ...], change: dict[str, Any]) -> None:
    model = build(Mamba2Config(**{**SMALL.to_dict(), **change})).double()
    graph = capture(model, ())
    batches = [(ids(4, 32, seed), *model.initial_states(4)) for seed in (1, 2)]
    rewrite = passes.apply(graph, names, batches)
    left_out = [item for item in rewrite.transforms if item.status is Status.LEFT_OUT]
    # A grouped norm ends with a multiplication, which passes on norms leave where it is.
    folding = {"fold_norm", "smooth_norm"} & {str(getattr(item, "name", item)) for item in names}
    grouped = model.config.norm_groups > 1 and folding
    if APPLIED[names] and not grouped and not model.config.norm_before_gate:
        assert left_out == []
    if not APPLIED[names]:
        assert left_out and all(item.detail for item in left_out)
    given = (ids(3, 9, 3), *model.initial_states(3))
    with torch.no_grad():
        got, expected = graph(*given)[0], model(given[0])[0]
    assert float((got - expected).norm() / expected.norm()) < EXACT


def test_smoothing_out_proj_flattens_its_input() -> None:
    model = build(Mamba2Config(**{**SMALL.to_dict(), "ngroups": 1, "norm_groups": 1})).double()
    graph = capture(model, ())
    batches = [(ids(4, 32, seed), *model.initial_states(4)) for seed in (1, 2)]
    inputs = [passes.Request(block.out_input.name) for block in match(graph).blocks]
    before = passes.collect(graph, inputs, batches)
    passes.apply(graph, [{"smooth_gate": {"alpha": 1.0}}], batches)
    after = passes.collect(graph, [passes.Request(b.out_input.name) for b in match(graph).blocks], batches)

    def spread(statistics: Any) -> list[float]:
        return [float(item.maximum.max() / item.maximum.min()) for item in statistics.values()]

    # alpha 1 makes every channel's largest magnitude the same.
    assert all(new < 1 + 1e-6 < old for old, new in zip(spread(before), spread(after), strict=True))


@pytest.mark.parametrize("recipe", ["rtn-w8a8", "quarot-w8a8", "mambaquant-w8a8", "mambaquant-static-w4a8"])
def test_quantized_it_runs_in_integers_and_equals_its_simulation(recipe: str) -> None:
    model = build()
    quantized = mq_ao.quantize(model, [ids(4, 32, seed) for seed in (1, 2)], recipe)
    integer = inductor.rewrite(quantized.converted)
    assert sum(count for kernel, count in integer.kernels.items() if "linear" in kernel) >= 2 * 2 + 1
    assert integer.kernels["mq_ao.qcausal_conv1d.default"] == 2
    assert integer.simulated == []
    given = (ids(2, 19, 3), *model.initial_states(2))
    with torch.no_grad():
        for got, expected in zip(integer.module(*given), quantized.converted(*given), strict=True):
            # An activation on the border between two integers may fall to either side.
            assert float((got - expected).norm() / expected.norm()) < 2e-2


@pytest.mark.usefixtures("native_kernels")
def test_a_saved_program_prefills_and_decodes(tmp_path: Path) -> None:
    model = build()
    quantized = mq_ao.quantize(model, [ids(4, 32, seed) for seed in (1, 2)], "mambaquant-w8a8")
    quantized.lower("inductor").save(tmp_path / "m.pt2")
    program = mq_ao.load(tmp_path / "m.pt2")
    given = ids(1, 12, 3)
    with torch.no_grad():
        expected = quantized.converted(given, *model.initial_states(1))[0]
    logits, *states = program(given[:, :8])
    parts = [logits]
    for step in range(8, 12):
        logits, *states = program.decode(given[:, step : step + 1], *states)
        parts.append(logits)
    got = torch.cat(parts, 1)
    assert float((got - expected).norm() / expected.norm()) < 2e-2
    assert program.generate(given, 3).shape == (1, 15)


def test_the_public_shape_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        model = Mamba2LM(MAMBA2_130M)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(129e6, rel=0.01)


def test_mamba_ssm_checkpoints_load(tmp_path: Path) -> None:
    model = build()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    config = {
        "d_model": 32,
        "n_layer": 2,
        "vocab_size": 59,
        "pad_vocab_size_multiple": 61,
        "d_intermediate": 0,
        "ssm_cfg": {"layer": "Mamba2", "d_state": 8, "headdim": 16, "ngroups": 2, "rmsnorm": True},
        "rms_norm": True,
        "tie_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = MambaLM.from_pretrained(tmp_path)
    assert isinstance(loaded, Mamba2LM) and loaded.config == dataclasses.replace(SMALL, known_tokens=59)
    with torch.no_grad():
        assert torch.equal(loaded(ids(2, 5))[0], model(ids(2, 5))[0])
    config["ssm_cfg"] |= {"d_ssm": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(MqAoError, match="options ssm_cfg.d_ssm are not known"):
        MambaLM.from_pretrained(tmp_path)


def test_transformers_checkpoints_load(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Mamba2Config(
        num_heads=4,
        head_dim=16,
        vocab_size=61,
        hidden_size=32,
        state_size=8,
        num_hidden_layers=2,
        n_groups=2,
        time_step_limit=(1e-3, 0.5),
        chunk_size=4,
    )
    theirs = transformers.Mamba2ForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = MambaLM.from_pretrained(tmp_path)
    assert isinstance(ours, Mamba2LM) and ours.config.norm_groups == 2
    given = ids(2, 13) % 60
    with torch.no_grad():
        expected, got = theirs(given).logits, ours(given)[0]
    # Both in float32, with other orders of summation.
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path)
    loaded = MambaLM.from_pretrained(tmp_path)
    assert isinstance(loaded, Mamba2LM) and loaded.config == model.config
    with torch.no_grad():
        assert torch.equal(loaded(ids(2, 5))[0], model(ids(2, 5))[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"headdim": 24}, "d_inner 64 cannot be divided into heads of 24"),
        ({"ngroups": 3}, "ngroups is 3, which does not divide 4"),
        ({"dt_max": 0.0}, "dt_max is 0.0: give a number above dt_min"),
        ({"dt_min": -1.0}, "dt_min is -1.0"),
    ],
)
def test_impossible_shapes_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(MqAoError, match=message):
        Mamba2Config(**{**SMALL.to_dict(), **change})
