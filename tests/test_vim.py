"""Vision Mamba: what it computes, how it is found in a graph, and that rewrites of shared layers stay exact."""

from __future__ import annotations

import argparse
import copy
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mq_ao
from mq_ao import MqAoError, passes
from mq_ao.graph import Role, match
from mq_ao.graph.residual import streams
from mq_ao.lowering import inductor
from mq_ao.models import VIM_SMALL, VIM_TINY, Vim, VimConfig
from mq_ao.models.mamba import scan
from mq_ao.ops.selective_scan import selective_scan
from mq_ao.passes import Status
from mq_ao.recipes import RECIPES

TINY = VimConfig(image_size=12, patch_size=4, in_channels=2, num_classes=5, d_model=16, n_layer=2, d_state=4)
# Rewrites are computed in float64; what is left is rounding of some thousand operations.
EXACT = 1e-9


@pytest.fixture
def vim() -> Vim:
    torch.manual_seed(0)
    model = Vim(TINY).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight") or name in ("norm_f.weight", "cls_token", "pos_embed"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def images(count: int, seed: int = 1, config: VimConfig = TINY) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(count, config.in_channels, config.image_size, config.image_size, generator=gen)


def expected_mixer(mixer: nn.Module, x: Tensor) -> Tensor:
    """The block as the paper writes it: each direction gated by itself, over a plain convolution."""
    scan = selective_scan.reference
    total = 0.0
    for suffix, a_log, backward in (("", "A_log", False), ("_b", "A_b_log", True)):
        u, z = mixer.in_proj(x.flip(1) if backward else x).chunk(2, dim=-1)
        conv = getattr(mixer, f"conv1d{suffix}")
        taps = nn.functional.pad(u.transpose(1, 2), (conv.weight.shape[-1] - 1, 0))
        u = nn.functional.silu(nn.functional.conv1d(taps, conv.weight, conv.bias, groups=u.shape[-1])).transpose(1, 2)
        dt, b, c = getattr(mixer, f"x_proj{suffix}")(u).split([1, 4, 4], dim=-1)
        delta = getattr(mixer, f"dt_proj{suffix}")(dt)
        a = -torch.exp(getattr(mixer, a_log))
        y, _ = scan(u, nn.functional.softplus(delta), a, b, c, getattr(mixer, f"D{suffix}"))
        y = y * nn.functional.silu(z)
        total = total + (y.flip(1) if backward else y)
    return mixer.out_proj(total / 2)


def test_a_block_is_the_mean_of_two_gated_directions(vim: Vim) -> None:
    mixer = vim.double().layers[0].mixer
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x), expected_mixer(mixer, x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("stride", [4, 2])
def test_patches_are_those_of_a_strided_convolution(stride: int) -> None:
    config = VimConfig(image_size=12, patch_size=4, stride=stride, d_model=8, n_layer=1)
    embed = Vim(config).double().patch_embed
    pixels = images(2, config=config).double()
    expected = embed.proj(pixels).flatten(2).transpose(1, 2)
    assert expected.shape[1] == config.patches
    torch.testing.assert_close(embed(pixels), expected, rtol=1e-10, atol=1e-10)


def test_the_class_token_lies_in_the_middle_and_is_what_is_classified(vim: Vim) -> None:
    tokens = []
    hook = vim.layers[0].register_forward_pre_hook(lambda _, args: tokens.append(args[0]))
    x = images(1)
    with torch.no_grad():
        vim(x)
    hook.remove()
    expected = vim.patch_embed(x)
    expected = torch.cat([expected[:, :4], vim.cls_token, expected[:, 4:]], 1) + vim.pos_embed
    torch.testing.assert_close(tokens[0], expected)
    vim.head.register_forward_pre_hook(lambda _, args: tokens.append(args[0]))
    vim.norm_f.register_forward_hook(lambda *args: tokens.append(args[2][:, 4]))
    with torch.no_grad():
        vim(x)
    assert torch.equal(tokens[-1], tokens[-2])


def test_the_matcher_finds_both_directions_as_one_block(vim: Vim) -> None:
    found = match(mq_ao.export(vim, (images(2),)).module(check_guards=False))
    assert [block.name for block in found.blocks] == ["layers.0.mixer", "layers.1.mixer"]
    assert [len(block.directions) for block in found.blocks] == [2, 2]
    assert len({direction.name for direction in found.directions}) == 4
    assert found.rejected == ()
    assert Counter(role for role, _ in found.by_role()) == {
        Role.IN_PROJ: 2,
        Role.CONV1D: 4,
        Role.X_PROJ: 4,
        Role.DT_PROJ: 4,
        Role.OUT_PROJ: 2,
        Role.LINEAR: 1,
        Role.HEAD: 1,
    }
    assert "patch_embed" in found.describe()


ALONE = [
    ("fold_norm",),
    ("smooth_norm",),
    ("smooth_gate",),
    ("smooth_state",),
    ("smooth_dt",),
    ("smooth_conv",),
    ("shift_dt",),
    ("fold_norm", "rotate_residual"),
    ("rotate_dt",),
    ("rotate_out_proj",),
    ("expose_state", "rotate_state"),
    ("plant_outliers",),
    RECIPES["mambaquant-w8a8"].passes,
    RECIPES["mambaquant-paper-w8a8"].passes,
]


@pytest.mark.parametrize("names", ALONE, ids=lambda names: "+".join(str(getattr(n, "name", n)) for n in names))
def test_every_rewrite_is_exact_and_applied_everywhere(names: tuple[str, ...], vim: Vim) -> None:
    vim = vim.double()
    graph = mq_ao.export(vim, (images(2).double(),)).module(check_guards=False)
    before, x = copy.deepcopy(graph.state_dict()), images(3, seed=2).double()
    rewrite = passes.apply(graph, names, [(images(8, seed=3).double(),)])
    # d_model 16 has a dt_rank of 1: a matrix of order 1 rotates nothing, but is one.
    assert [str(item) for item in rewrite.transforms if item.status is Status.LEFT_OUT] == []
    with torch.no_grad():
        got, expected = graph(x), vim(x)
    assert float((got - expected).norm() / expected.norm()) < EXACT
    after = graph.state_dict()
    assert before.keys() != after.keys() or any(not torch.equal(before[k], after[k]) for k in before)


def test_the_residual_stream_runs_from_the_patches_to_the_head(vim: Vim) -> None:
    graph = mq_ao.export(vim, (images(2),)).module(check_guards=False)
    (stream,) = streams(graph, match(graph).blocks)
    assert stream.problem is None
    # The patch embedding and two out_proj write; two in_proj and the head read; class token and positions are added.
    assert (len(stream.writers), len(stream.readers), len(stream.constants)) == (3, 3, 2)


@pytest.mark.parametrize("recipe", ["rtn-w8a8", "quarot-w8a8", "mambaquant-w8a8", "mambaquant-static-w4a8"])
def test_quantized_it_runs_in_integers_and_equals_its_simulation(recipe: str, vim: Vim) -> None:
    quantized = mq_ao.quantize(vim, [(images(8, seed=3),)], recipe)
    integer = inductor.rewrite(quantized.converted)
    # Patch embedding, head; in_proj, out_proj, 2 x_proj, 2 dt_proj a block (d_inner 32 is not wide enough for halves).
    assert sum(count for kernel, count in integer.kernels.items() if "linear" in kernel) == 2 + 2 * 6
    assert integer.kernels["mq_ao.qcausal_conv1d.default"] == 4
    assert integer.simulated == []
    x = images(3, seed=2)
    with torch.no_grad():
        got, expected = integer.module(x), quantized.converted(x)
    # An activation on the border between two integers may fall to either side where sums are formed in another order.
    assert float((got - expected).norm() / expected.norm()) < 2e-2


def test_public_checkpoints_load_by_their_names_and_shapes(vim: Vim, tmp_path: Path) -> None:
    state = vim.state_dict()
    # The names of the public files; a training script's options lie beside the weights.
    assert {"layers.0.mixer.A_b_log", "layers.1.mixer.conv1d_b.weight", "patch_embed.proj.weight"} <= state.keys()
    assert state["layers.0.mixer.conv1d_b.weight"].shape == (32, 1, 4)
    torch.save({"model": state, "args": argparse.Namespace(lr=1e-3)}, tmp_path / "vim.pth")
    loaded = Vim.from_pretrained(tmp_path / "vim.pth", image_size=12)
    assert loaded.config == TINY or loaded.config.to_dict() == {**TINY.to_dict(), "dt_rank": 1}
    x = images(2)
    with torch.no_grad():
        assert torch.equal(loaded(x), vim(x))


def test_a_checkpoint_of_overlapping_patches_needs_its_stride(tmp_path: Path) -> None:
    config = VimConfig(image_size=12, patch_size=4, stride=2, in_channels=1, num_classes=3, d_model=8, n_layer=1)
    torch.save(Vim(config).state_dict(), tmp_path / "vim.pth")
    with pytest.raises(MqAoError, match="25 position embeddings.*stride of 4 has 9: give its image_size and stride"):
        Vim.from_pretrained(tmp_path / "vim.pth", image_size=12)
    assert Vim.from_pretrained(tmp_path / "vim.pth", image_size=12, stride=2).config.patches == 25


def test_saved_and_loaded_it_is_the_same(vim: Vim, tmp_path: Path) -> None:
    vim.save_pretrained(tmp_path)
    loaded = Vim.from_pretrained(tmp_path)
    assert loaded.config == vim.config and not loaded.training
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), vim.state_dict().values(), strict=True))
    with pytest.raises(MqAoError, match="do not give them"):
        Vim.from_pretrained(tmp_path, stride=2)


def test_other_files_are_refused(vim: Vim, tmp_path: Path) -> None:
    with pytest.raises(MqAoError, match="there is no file or folder"):
        Vim.from_pretrained(tmp_path / "missing")
    with pytest.raises(MqAoError, match="no config.json"):
        Vim.from_pretrained(tmp_path)
    torch.save({"layers.0.weight": torch.ones(2)}, tmp_path / "other.pth")
    with pytest.raises(MqAoError, match=r"layers.0.mixer.A_log.* missing: is it a Vim"):
        Vim.from_pretrained(tmp_path / "other.pth")
    state = {name: value for name, value in vim.state_dict().items() if "_b" not in name}
    torch.save(state, tmp_path / "one-way.pth")
    with pytest.raises(MqAoError, match="blocks have one direction"):
        Vim.from_pretrained(tmp_path / "one-way.pth", image_size=12)
    (tmp_path / "config.json").write_text('{"model_type": "mq_ao.mamba"}')
    with pytest.raises(MqAoError, match="model_type is 'mq_ao.mamba'"):
        Vim.from_pretrained(tmp_path)


def test_images_of_another_shape_are_refused(vim: Vim) -> None:
    with pytest.raises(MqAoError, match=r"takes images \(batch, 2, 12, 12\); got \(1, 3, 12, 12\)"):
        vim(torch.zeros(1, 3, 12, 12))


@pytest.mark.parametrize(("config", "parameters"), [(VIM_TINY, 7.1e6), (VIM_SMALL, 25.8e6)])
def test_public_shapes_have_the_published_number_of_parameters(config: VimConfig, parameters: float) -> None:
    with torch.device("meta"):
        model = Vim(config)
    # The paper gives 7 M and 26 M (Zhu et al., table 1).
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.03)


def test_impossible_shapes_are_refused() -> None:
    with pytest.raises(MqAoError, match="a patch of 16 pixels does not fit into an image of 8"):
        VimConfig(image_size=8)
    with pytest.raises(MqAoError, match="VimConfig.stride is 0"):
        VimConfig(stride=0)
    with pytest.raises(MqAoError, match='VimConfig.dt_rank is 0: give a whole number of at least 1, or "auto"'):
        VimConfig(dt_rank=0)


class GatedTwice(nn.Module):
    """The block as the paper writes it, each direction with a gate of its own."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, tokens, d_model) -> the same shape."""
        m = self.mixer
        total = None
        for suffix, a_log, backward in (("", m.A_log, False), ("_b", m.A_b_log, True)):
            u, z = m.in_proj(x.flip(1) if backward else x).chunk(2, dim=-1)
            y, _, _ = scan(u, *(getattr(m, part + suffix) for part in ("conv1d", "x_proj", "dt_proj")), a_log, m.D)
            y = y * nn.functional.silu(z)
            total = y if total is None else total + y.flip(1)
        return m.out_proj(total)


class OneProjection(GatedTwice):
    """... and one in_proj for both."""

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, tokens, d_model) -> the same shape."""
        m = self.mixer
        u, z = m.in_proj(x).chunk(2, dim=-1)
        y, _, _ = scan(u, m.conv1d, m.x_proj, m.dt_proj, m.A_log, m.D)
        back, _, _ = scan(u.flip(1), m.conv1d_b, m.x_proj_b, m.dt_proj_b, m.A_b_log, m.D_b)
        silu = nn.functional.silu
        return m.out_proj(y * silu(z) + (back * silu(z.flip(1))).flip(1))


@pytest.mark.parametrize("names", [("smooth_gate", "rotate_out_proj"), RECIPES["mambaquant-w8a8"].passes], ids=len)
def test_two_gates_of_one_block_are_smoothed_together(names: tuple[str, ...], vim: Vim) -> None:
    block = OneProjection(vim.layers[0].mixer).double().eval()
    x = torch.randn(4, 9, 16, dtype=torch.float64)
    graph = mq_ao.export(block, (x[:2],)).module(check_guards=False)
    (found,) = match(graph).blocks
    assert (len(found.gates), len(found.directions)) == (2, 2)
    rewrite = passes.apply(graph, names, [(torch.randn(8, 9, 16, dtype=torch.float64),)])
    applied = {item.name for item in rewrite.transforms if item.status is Status.APPLIED}
    assert {"smooth_gate", "rotate_out_proj"} <= applied
    with torch.no_grad():
        got, expected = graph(x), block(x)
    assert float((got - expected).norm() / expected.norm()) < EXACT


def test_directions_with_projections_of_their_own_are_left_out_with_a_reason(vim: Vim) -> None:
    block = GatedTwice(vim.layers[0].mixer).eval()
    found = match(mq_ao.export(block, (torch.randn(2, 9, 16),)).module(check_guards=False))
    assert found.blocks == ()
    assert any("both lead to" in item.reason for item in found.rejected)
