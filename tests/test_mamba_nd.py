"""Mamba-ND: what it computes, how it is found in a graph, and that rewrites across changes of order stay exact."""

from __future__ import annotations

import dataclasses
import itertools
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
from mq_ao.models import MAMBA_2D_BASE, MAMBA_2D_SMALL, MAMBA_3D_SMALL, MambaND, MambaNDConfig
from mq_ao.ops.selective_scan import selective_scan
from mq_ao.passes import Status
from mq_ao.recipes import RECIPES

# A grid of 2 x 3 patches, blocks of every order and direction.
IMAGES = MambaNDConfig(
    image_size=(8, 12), patch_size=(4, 4), in_channels=2, num_classes=5, d_model=16, n_layer=4, d_state=4
)
# After block 1, 4 x 3 tokens become 2 x 2.
MERGED = dataclasses.replace(IMAGES, image_size=(16, 12), downsample=(1,))
# A grid of 2 x 2 x 3 patches.
VIDEOS = dataclasses.replace(
    IMAGES, image_size=(4, 8, 12), patch_size=(2, 4, 4), n_layer=6, final_norm=False, pooled_norm=False
)
# The usual residual, with the one final norm that R1 can pass.
USUAL = dataclasses.replace(IMAGES, residual_of_norm=False, final_norm=False)
USUAL_MERGED = dataclasses.replace(MERGED, residual_of_norm=False, pooled_norm=False)
USUAL_VIDEOS = dataclasses.replace(VIDEOS, residual_of_norm=False, pooled_norm=True)
CONFIGS = {
    "images": IMAGES,
    "merged": MERGED,
    "videos": VIDEOS,
    "usual": USUAL,
    "usual-merged": USUAL_MERGED,
    "usual-videos": USUAL_VIDEOS,
}
# Rewrites are computed in float64; what is left is rounding of some thousand operations.
EXACT = 1e-9


def model_of(config: MambaNDConfig) -> MambaND:
    """A model whose norms, biases and positions all matter."""
    torch.manual_seed(0)
    model = MambaND(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.startswith(("ln", "pos_embed", "head")):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def pixels(config: MambaNDConfig, count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, config.in_channels, *config.image_size, generator=torch.Generator().manual_seed(seed))


def expected_order(layer: int, grid: tuple[int, ...]) -> list[int]:
    """Which token of the stream a block reads at each step, by counting through the grid."""
    if len(grid) == 2:
        height, width = grid
        rows_first = [(h, w) for h in range(height) for w in range(width)]
        columns_first = [(h, w) for w in range(width) for h in range(height)]
        visited = [h * width + w for h, w in (columns_first if layer % 4 >= 2 else rows_first)]
    else:
        frames, height, width = grid
        t, h, w = (range(size) for size in grid)
        points = [
            itertools.product(t, h, w),
            ((a, c, b) for a, b, c in itertools.product(t, w, h)),
            ((c, b, a) for a, b, c in itertools.product(w, h, t)),
        ][layer // 2 % 3]
        visited = [(frame * height + row) * width + column for frame, row, column in points]
        assert len(visited) == frames * height * width
    return visited[::-1] if layer % 2 else visited


def expected_mixer(mixer: nn.Module, x: Tensor) -> Tensor:
    """A Mamba-1 block over a plain convolution and the reference scan."""
    u, z = mixer.in_proj(x).chunk(2, dim=-1)
    taps = nn.functional.pad(u.transpose(1, 2), (mixer.conv1d.weight.shape[-1] - 1, 0))
    u = nn.functional.conv1d(taps, mixer.conv1d.weight, mixer.conv1d.bias, groups=u.shape[-1])
    u = nn.functional.silu(u).transpose(1, 2)
    n = mixer.A_log.shape[1]
    dt, b, c = mixer.x_proj(u).split([mixer.dt_proj.in_features, n, n], dim=-1)
    delta = nn.functional.softplus(mixer.dt_proj(dt))
    y, _ = selective_scan.reference(u, delta, -torch.exp(mixer.A_log), b, c, mixer.D)
    return mixer.out_proj(y * nn.functional.silu(z))


def expected_merging(layer: nn.Module, tokens: Tensor, grid: tuple[int, ...]) -> Tensor:
    """mmpretrain's PatchMerging: unfolds squares of an image of features that is filled up below and to the right."""
    height, width = grid
    features = tokens.transpose(1, 2).unflatten(2, grid)
    features = nn.functional.pad(features, (0, width % 2, 0, height % 2))
    return layer.reduction(layer.norm(nn.functional.unfold(features, 2, stride=2).transpose(1, 2)))


def expected(model: MambaND, x: Tensor) -> Tensor:
    """The model as the public code writes it, token orders by indexing."""
    c = model.config
    embedded = model.patch_embed.projection(x)
    grid = tuple(embedded.shape[2:])
    tokens = embedded.flatten(2).transpose(1, 2) + model.pos_embed
    for index, layer in enumerate(model.layers):
        order = expected_order(index, grid)
        normed = layer.norm(tokens)
        mixed = torch.empty_like(tokens)
        mixed[:, order] = expected_mixer(layer.mixer, normed[:, order])
        tokens = (normed if c.residual_of_norm else tokens) + mixed
        if index in c.downsample:
            tokens = expected_merging(layer.down_sample_layer, tokens, grid)
            grid = tuple((size + 1) // 2 for size in grid)
    if model.ln1 is not None:
        tokens = model.ln1(tokens)
    pooled = tokens.mean(1)
    return model.head(pooled if model.ln2 is None else model.ln2(pooled))


def difference(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_it_computes_what_the_public_code_does(config: MambaNDConfig) -> None:
    model, x = model_of(config).double(), pixels(config, 2).double()
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected(model, x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("config", [IMAGES, VIDEOS], ids=["images", "videos"])
def test_blocks_read_every_order_and_give_tokens_back_in_place(config: MambaNDConfig) -> None:
    model = model_of(config)
    tokens = torch.arange(config.patches).view(1, -1, 1)
    seen = []
    for index, layer in enumerate(model.layers):
        arranged = layer.order.arranged(tokens)
        seen.append(arranged.flatten().tolist())
        assert seen[-1] == expected_order(index, config.grid(0))
        assert torch.equal(layer.order.restored(arranged), tokens)
    # Two axes have 4 different orders, three have 6; then they repeat.
    assert len(set(map(tuple, seen))) == config.n_layer == 2 * len(config.image_size)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_it_exports_for_every_batch_and_its_blocks_are_found(config: MambaNDConfig) -> None:
    model = model_of(config)
    graph = mq_ao.export(model, (pixels(config, 2),)).module(check_guards=False)
    x = pixels(config, 5, seed=2)
    with torch.no_grad():
        torch.testing.assert_close(graph(x), model(x))
    found = match(graph)
    assert [block.name for block in found.blocks] == [f"layers.{index}.mixer" for index in range(config.n_layer)]
    assert found.rejected == ()
    assert Counter(role for role, _ in found.by_role()) == {
        **dict.fromkeys((Role.IN_PROJ, Role.CONV1D, Role.X_PROJ, Role.DT_PROJ, Role.OUT_PROJ), config.n_layer),
        Role.LINEAR: 1 + len(config.downsample),
        Role.HEAD: 1,
    }


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
    RECIPES["mambaquant-w8a8"].passes,
]


@pytest.mark.parametrize("names", ALONE, ids=lambda names: "+".join(str(getattr(n, "name", n)) for n in names))
@pytest.mark.parametrize("config", [USUAL, USUAL_VIDEOS], ids=["images", "videos"])
def test_with_the_usual_residual_every_rewrite_is_exact_and_applied(
    config: MambaNDConfig, names: tuple[str, ...]
) -> None:
    model = model_of(config).double()
    graph = mq_ao.export(model, (pixels(config, 2).double(),)).module(check_guards=False)
    rewrite = passes.apply(graph, names, [(pixels(config, 16, seed=3).double(),)])
    assert [str(item) for item in rewrite.transforms if item.status is Status.LEFT_OUT] == []
    assert any(item.status is Status.APPLIED for item in rewrite.transforms)
    x = pixels(config, 3, seed=2).double()
    with torch.no_grad():
        assert difference(graph(x), model(x)) < EXACT


@pytest.mark.parametrize("config", [IMAGES, MERGED, VIDEOS, USUAL_MERGED], ids=lambda c: str(c.image_size))
def test_other_residuals_keep_all_but_the_rotation_of_the_stream(config: MambaNDConfig) -> None:
    model = model_of(config).double()
    graph = mq_ao.export(model, (pixels(config, 2).double(),)).module(check_guards=False)
    calibration = [(pixels(config, 16, seed=3).double(),)]
    rewrite = passes.apply(graph, RECIPES["mambaquant-w8a8"].passes, calibration)
    left_out = {item.name for item in rewrite.transforms if item.status is Status.LEFT_OUT}
    assert "rotate_residual" in left_out <= {"rotate_residual", "fold_norm", "smooth_norm"}
    x = pixels(config, 3, seed=2).double()
    with torch.no_grad():
        assert difference(graph(x), model(x)) < EXACT


def test_the_stream_runs_from_the_patches_through_all_orders_to_the_head() -> None:
    graph = mq_ao.export(model_of(USUAL_VIDEOS), (pixels(USUAL_VIDEOS, 2),)).module(check_guards=False)
    (stream,) = streams(graph, match(graph).blocks)
    assert stream.problem is None
    # The patch embedding and six out_proj write; six in_proj and the head read; positions are added.
    assert (len(stream.writers), len(stream.readers), len(stream.constants)) == (7, 7, 1)


def test_merged_tokens_end_a_stream_and_the_next_is_rotated() -> None:
    config = USUAL_MERGED
    model = model_of(config).double()
    graph = mq_ao.export(model, (pixels(config, 2).double(),)).module(check_guards=False)
    rewrite = passes.apply(graph, ["fold_norm", "rotate_residual"], [(pixels(config, 16, seed=3).double(),)])
    notes = {item.where: item for item in rewrite.transforms if item.step == "R1"}
    after = notes.pop("stream of layers.1.down_sample_layer.reduction")
    assert after.status is Status.APPLIED
    assert notes and all("down_sample_layer" in note.detail for note in notes.values())


def test_between_two_final_norms_no_linear_takes_the_weight_of_the_first() -> None:
    config = dataclasses.replace(USUAL, final_norm=True)
    graph = mq_ao.export(model_of(config), (pixels(config, 2),)).module(check_guards=False)
    rewrite = passes.apply(graph, ["fold_norm", "rotate_residual"], [(pixels(config, 16, seed=3),)])
    left_out = [item for item in rewrite.transforms if item.status is Status.LEFT_OUT]
    assert {item.name for item in left_out} == {"fold_norm", "rotate_residual"}
    (ln1, *_) = left_out
    assert ln1.detail.startswith("layer_norm_4 is also read by layer_norm_5")


def test_with_a_residual_of_the_norm_the_stream_holds_its_weight() -> None:
    config = IMAGES
    graph = mq_ao.export(model_of(config), (pixels(config, 2),)).module(check_guards=False)
    rewrite = passes.apply(graph, ["fold_norm", "rotate_residual"], [(pixels(config, 16, seed=3),)])
    (note,) = [item for item in rewrite.transforms if item.step == "R1"]
    assert note.status is Status.LEFT_OUT
    reasons = [item.detail for item in rewrite.transforms if item.name == "fold_norm"]
    assert any("is also read by add" in reason for reason in reasons)


@pytest.mark.parametrize("config", [MERGED, USUAL, VIDEOS], ids=["merged", "usual", "videos"])
def test_quantized_it_runs_in_integers_and_equals_its_simulation(config: MambaNDConfig) -> None:
    quantized = mq_ao.quantize(model_of(config), [(pixels(config, 16, seed=3),)], "mambaquant-w8a8")
    integer = inductor.rewrite(quantized.converted)
    linears = sum(count for kernel, count in integer.kernels.items() if "linear" in kernel)
    # Patch embedding, head and mergings; in_proj, x_proj, dt_proj and out_proj a block.
    assert linears == 2 + len(config.downsample) + 4 * config.n_layer
    assert integer.kernels["mq_ao.qcausal_conv1d.default"] == config.n_layer
    assert integer.simulated == []
    x = pixels(config, 3, seed=2)
    with torch.no_grad():
        got, wanted = integer.module(x), quantized.converted(x)
    # An activation on the border between two integers may fall to either side where sums are formed in another order.
    assert difference(got, wanted) < 2e-2


def public(model: MambaND, head: str) -> dict[str, Tensor]:
    """The model's weights under the names of the public checkpoints."""
    return {
        name.replace("head", head, 1) if name.startswith("head.") else f"backbone.{name}": weight
        for name, weight in model.state_dict().items()
    }


@pytest.mark.parametrize(
    ("config", "head", "under"), [(MERGED, "head.fc", "state_dict"), (VIDEOS, "cls_head.fc_cls", "model")]
)
def test_public_checkpoints_load_by_their_names_and_shapes(
    config: MambaNDConfig, head: str, under: str, tmp_path: Path
) -> None:
    model = model_of(config)
    state = public(model, head)
    wanted = {
        "backbone.patch_embed.projection.weight": (16, 2, *config.patch_size),
        "backbone.pos_embed": (1, config.patches, 16),
        "backbone.layers.1.norm.bias": (16,),
        "backbone.layers.0.mixer.A_log": (32, 4),
        "backbone.layers.0.mixer.conv1d.weight": (32, 1, 4),
        f"{head}.weight": (5, 16),
    }
    if config.downsample:
        wanted |= {
            "backbone.layers.1.down_sample_layer.norm.weight": (64,),
            "backbone.layers.1.down_sample_layer.reduction.weight": (16, 64),
            "backbone.ln1.weight": (16,),
            "backbone.ln2.bias": (16,),
        }
    assert {name: tuple(state[name].shape) for name in wanted} == wanted
    torch.save({under: state, "meta": {"epoch": 3}}, tmp_path / "nd.pth")
    loaded = MambaND.from_pretrained(tmp_path / "nd.pth", image_size=config.image_size)
    assert loaded.config == dataclasses.replace(config, dt_rank=1) and not loaded.training
    x = pixels(config, 2)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


def test_the_position_of_an_unused_class_token_is_dropped(tmp_path: Path) -> None:
    model = model_of(USUAL)
    state = public(model, "head.fc")
    state["backbone.pos_embed"] = torch.cat([torch.full((1, 1, 16), 9.0), state["backbone.pos_embed"]], 1)
    torch.save(state, tmp_path / "nd.pth")
    loaded = MambaND.from_pretrained(tmp_path / "nd.pth", image_size=(8, 12), residual_of_norm=False)
    x = pixels(USUAL, 2)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    state["backbone.cls_token"] = torch.zeros(1, 1, 16)
    torch.save(state, tmp_path / "nd.pth")
    with pytest.raises(MqAoError, match="does not have: cls_token"):
        MambaND.from_pretrained(tmp_path / "nd.pth", image_size=(8, 12))


@pytest.mark.parametrize("config", [MERGED, USUAL_VIDEOS], ids=["merged", "usual-videos"])
def test_saved_and_loaded_it_is_the_same(config: MambaNDConfig, tmp_path: Path) -> None:
    model = model_of(config)
    model.save_pretrained(tmp_path)
    loaded = MambaND.from_pretrained(tmp_path)
    assert loaded.config == config and not loaded.training
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    )
    with pytest.raises(MqAoError, match="has image_size and residual_of_norm: do not give them"):
        MambaND.from_pretrained(tmp_path, residual_of_norm=False)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MqAoError, match="there is no file or folder"):
        MambaND.from_pretrained(tmp_path / "missing")
    with pytest.raises(MqAoError, match="no config.json"):
        MambaND.from_pretrained(tmp_path)
    torch.save({"layers.0.weight": torch.ones(2)}, tmp_path / "other.pth")
    with pytest.raises(MqAoError, match=r"patch_embed.projection.weight.* missing: is it a Mamba-ND"):
        MambaND.from_pretrained(tmp_path / "other.pth")
    state = public(model_of(IMAGES), "head.fc")
    torch.save({"state_dict": state}, tmp_path / "nd.pth")
    with pytest.raises(MqAoError, match=r"6 position embeddings.*\(224, 224\).*has 3136: give its image_size"):
        MambaND.from_pretrained(tmp_path / "nd.pth")
    without = {name: weight for name, weight in state.items() if "layers.0.mixer" not in name}
    torch.save({"state_dict": without}, tmp_path / "nd.pth")
    with pytest.raises(MqAoError, match=r"layers.0.mixer.A_log.* missing"):
        MambaND.from_pretrained(tmp_path / "nd.pth", image_size=(8, 12))
    (tmp_path / "config.json").write_text('{"model_type": "mq_ao.vim"}')
    with pytest.raises(MqAoError, match="model_type is 'mq_ao.vim', and a MambaND's"):
        MambaND.from_pretrained(tmp_path)


def test_pixels_of_another_shape_are_refused() -> None:
    with pytest.raises(MqAoError, match=r"takes pixels \(batch, 2, 8, 12\); got \(1, 2, 12, 8\)"):
        model_of(IMAGES)(torch.zeros(1, 2, 12, 8))


IMPOSSIBLE = [
    ({"patch_size": (5, 5)}, r"\(224, 224\) is no whole number of patches"),
    ({"patch_size": (2, 8, 8)}, "a size for each axis"),
    ({"image_size": (224,), "patch_size": (8,)}, "a size for each axis"),
    ({"image_size": 224}, "image_size is 224: give whole numbers"),
    ({"downsample": (24,)}, "different indices of blocks, below n_layer 24"),
    ({"downsample": (3, 3)}, "different indices of blocks"),
    ({"image_size": (4, 8, 8), "patch_size": (2, 8, 8), "downsample": (0,)}, "images alone"),
    ({"residual_of_norm": 1}, "residual_of_norm is 1: give true or false"),
    ({"dt_rank": 0}, "MambaNDConfig.dt_rank is 0"),
]


@pytest.mark.parametrize(("fields", "message"), IMPOSSIBLE)
def test_impossible_shapes_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(MqAoError, match=message):
        MambaNDConfig(**fields)


# What the public configurations give: patches of 8 in 224 pixels; 2 frames and 16 x 16 pixels in 32 x 224 x 224.
PUBLIC = [
    (MAMBA_2D_SMALL, 24, 384, {"pos_embed": (1, 784, 384), "layers.9.down_sample_layer.reduction.weight": (384, 1536)}),
    (MAMBA_2D_BASE, 24, 768, {"pos_embed": (1, 784, 768), "layers.9.down_sample_layer.norm.weight": (3072,)}),
    (MAMBA_3D_SMALL, 36, 384, {"pos_embed": (1, 3136, 384), "patch_embed.projection.weight": (384, 3, 2, 16, 16)}),
]


@pytest.mark.parametrize(("config", "n_layer", "d_model", "more"), PUBLIC)
def test_public_shapes(config: MambaNDConfig, n_layer: int, d_model: int, more: dict[str, tuple[int, ...]]) -> None:
    with torch.device("meta"):
        shapes = {name: tuple(weight.shape) for name, weight in MambaND(config).state_dict().items()}
    last = f"layers.{n_layer - 1}.mixer."
    wanted = {
        **more,
        last + "in_proj.weight": (4 * d_model, d_model),
        last + "x_proj.weight": (d_model // 16 + 32, 2 * d_model),
        last + "dt_proj.weight": (2 * d_model, d_model // 16),
        last + "out_proj.weight": (d_model, 2 * d_model),
    }
    assert {name: shapes.get(name) for name in wanted} == wanted
    assert not any(name.startswith(f"layers.{n_layer}.") for name in shapes)
    assert ("ln1.weight" in shapes) == ("ln2.weight" in shapes) == bool(config.downsample)
