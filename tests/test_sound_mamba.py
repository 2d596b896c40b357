"""The worked example of a network of one's own: both quantizers take their part, and what is left is one program."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

import mq_ao
from mq_ao.lowering import inductor
from mq_ao.recipes import get_recipe

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import sound_mamba


def test_sounds_are_reproducible_and_of_all_kinds() -> None:
    first, labels = sound_mamba.make_sounds(40, seed=3)
    assert torch.equal(first, sound_mamba.make_sounds(40, seed=3)[0])
    assert first.shape == (40, 1, 63, 128) and set(labels.tolist()) == set(range(len(sound_mamba.SOUNDS)))


@pytest.mark.filterwarnings("ignore")
def test_both_quantizers_take_their_part_and_the_program_equals_the_simulation() -> None:
    torch.manual_seed(0)
    model = sound_mamba.Recogniser().eval()
    sounds, _ = sound_mamba.make_sounds(8, seed=1)
    recipe = get_recipe("mambaquant-w8a8")
    graph = mq_ao.export(model, (sounds,)).module(check_guards=False)
    mq_ao.passes.apply(graph, recipe.passes, [(sounds,)])
    with torch.no_grad():
        # Rewrites leave the float network what it was.
        torch.testing.assert_close(graph(sounds), model(sounds), rtol=1e-4, atol=1e-5)
    prepared = prepare_pt2e(graph, sound_mamba.quantizers(recipe.scheme))
    with torch.no_grad():
        prepared(sounds)
    converted = convert_pt2e(prepared)
    integer = inductor.rewrite(converted)
    assert sum(count for name, count in integer.kernels.items() if "linear" in name) == 7
    assert integer.kernels["mq_ao.qcausal_conv1d.default"] == 1
    # The convolutions in front are Inductor's.
    assert integer.simulated == ["conv2d", "conv2d_1"]
    other, _ = sound_mamba.make_sounds(8, seed=2)
    with torch.no_grad():
        got, expected = inductor.compiled(converted, (other,))(other), converted(other)
    # A value on the border between two integers may fall to either side.
    assert float((got - expected).norm() / expected.norm()) < 2e-2
