"""mamba_ssm's models, captured as they are, against mamba_ssm's own reference functions."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mq_ao import MqAoError, export
from mq_ao.capture import import_mamba_ssm, layout, replacing, scans
from mq_ao.capture import mamba_ssm as adapter
from mq_ao.graph.matcher import match
from tests.captured import changed, difference, operators, randomise, references

# Both sides compute in float32, in another order: some units in the last place of sums over tens of terms.
CLOSE = 1e-5
OTHER_SHAPES = ((1, 1), (3, 1), (1, 11), (3, 8))


@contextmanager
def package() -> Iterator[ModuleType]:
    """mamba_ssm; forgotten afterwards, since transformers' models call its CUDA kernels where it is imported."""
    before = set(sys.modules)
    try:
        yield import_mamba_ssm()
    finally:
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in ("mamba_ssm", "selective_scan_cuda"):
                del sys.modules[name]


@pytest.fixture(scope="module")
def mamba_ssm() -> Iterator[ModuleType]:
    try:
        with package() as module:
            yield module
    except MqAoError as error:
        pytest.skip(str(error))


def conv_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    padded = functional.pad(x, (weight.shape[1] - 1, 0))
    y = functional.conv1d(padded, weight.unsqueeze(1), bias, groups=x.shape[1])
    return y if activation is None else functional.silu(y)


@pytest.fixture
def eager(mamba_ssm: ModuleType) -> Callable[[nn.Module, Tensor], Tensor]:
    return by_references()


def by_references() -> Callable[[nn.Module, Tensor], Tensor]:
    """Runs a model of the package by the package's own references, none of which is ours."""
    from mamba_ssm.ops import selective_scan_interface as scan
    from mamba_ssm.ops.triton import layer_norm, layernorm_gated, ssd_combined

    def add_and_norm(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *rest: Any) -> Any:
        _, _, _, eps, _, _, prenorm, _, is_rms_norm, _ = rest
        reference = layer_norm.rms_norm_ref if is_rms_norm else layer_norm.layer_norm_ref
        return reference(x, weight, bias, residual=residual, eps=eps, prenorm=prenorm, upcast=True)

    def gated_norm(*args: Any) -> Tensor:
        *args, is_rms_norm = args
        assert is_rms_norm
        return layernorm_gated.rms_norm_ref(*args)

    def chunk_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *rest: Any) -> Tensor:
        _, D, z, dt_bias, _, _, _, dt_softplus, dt_limit, _, _ = rest
        return ssd_combined.ssd_selective_scan(x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit)

    theirs = [
        replacing.Replacement(scan.SelectiveScanFn, "apply", scan.selective_scan_ref),
        replacing.Replacement(layer_norm.LayerNormFn, "apply", add_and_norm),
        replacing.Replacement(layernorm_gated.LayerNormFn, "apply", gated_norm),
        replacing.Replacement(ssd_combined.MambaChunkScanCombinedFn, "apply", chunk_scan),
    ]

    def run(model: nn.Module, x: Tensor) -> Tensor:
        for part in model.modules():
            if hasattr(part, "use_mem_eff_path"):
                part.use_mem_eff_path = False
        with torch.no_grad(), replacing.replaced(theirs):
            result = model(x)
        return getattr(result, "logits", result)

    return run


MIXERS: dict[str, tuple[str, dict[str, Any]]] = {
    "fast path": ("Mamba", {}),
    "slow path": ("Mamba", {"use_fast_path": False}),
    "biases": ("Mamba", {"bias": True, "d_state": 4, "dt_rank": 3, "d_conv": 3}),
    "slow path, biases": ("Mamba", {"bias": True, "use_fast_path": False}),
    "no convolution bias": ("Mamba", {"conv_bias": False}),
    "Mamba2": ("Mamba2", {}),
    "Mamba2, slow path": ("Mamba2", {"use_mem_eff_path": False}),
    "Mamba2, groups": ("Mamba2", {"ngroups": 2, "bias": True}),
    "Mamba2, norm before gate": ("Mamba2", {"ngroups": 2, "norm_before_gate": True}),
    "Mamba2, no norm": ("Mamba2", {"rmsnorm": False}),
    "Mamba2, D a channel": ("Mamba2", {"D_has_hdim": True}),
    "Mamba2, limits": ("Mamba2", {"dt_limit": (0.01, 0.05)}),
    "Mamba2, gated MLP": ("Mamba2", {"d_ssm": 32}),
    "Mamba2, gated MLP, slow path": ("Mamba2", {"d_ssm": 32, "use_mem_eff_path": False}),
}


def mixer(package: ModuleType, name: str) -> nn.Module:
    torch.manual_seed(0)
    kind, options = MIXERS[name]
    if kind == "Mamba2":
        options = {"d_state": 8, "headdim": 16, "chunk_size": 4, **options}
    return randomise(getattr(package, kind)(32, **options))


@pytest.mark.parametrize("name", MIXERS)
def test_mixer(mamba_ssm: ModuleType, eager: Callable[..., Tensor], name: str) -> None:
    model = mixer(mamba_ssm, name)
    program = export(model, (torch.randn(2, 5, 32),))
    found = operators(program)
    second = isinstance(model, mamba_ssm.Mamba2)
    assert (found["selective_scan"], found["ssd_scan"]) == ((0, 1) if second else (1, 0))
    assert (found["causal_conv1d"], found["linear"]) == (1, 2 if second else 4)
    assert not {"matmul", "mm", "addmm", "conv1d", "transpose", "permute", "contiguous"} & set(found)
    if second:
        assert found["rms_norm"] == model.rmsnorm
    for batch, length in OTHER_SHAPES:
        x = torch.randn(batch, length, 32)
        assert difference(program.module()(x), eager(model, x)) < CLOSE


@pytest.mark.parametrize("name", [name for name in MIXERS if MIXERS[name][0] == "Mamba"])
def test_mixer_is_matched(mamba_ssm: ModuleType, name: str) -> None:
    program = export(mixer(mamba_ssm, name), (torch.randn(2, 5, 32),))
    found = match(program.module(check_guards=False))
    assert len(found.blocks) == 1
    assert found.rejected == ()


@pytest.mark.parametrize("layer", ["Mamba1", "Mamba2"])
@pytest.mark.parametrize(
    "options",
    [
        {"rms_norm": True, "fused_add_norm": True},
        {"rms_norm": True, "fused_add_norm": False},
        {"rms_norm": False, "fused_add_norm": True, "residual_in_fp32": False},
        {"rms_norm": False, "fused_add_norm": False},
        {"rms_norm": True, "fused_add_norm": True, "d_intermediate": 48, "tie_embeddings": False},
    ],
    ids=lambda options: "-".join(f"{name}={value}" for name, value in options.items()),
)
def test_language_model(
    mamba_ssm: ModuleType, eager: Callable[..., Tensor], layer: str, options: dict[str, Any]
) -> None:
    model = language_model(mamba_ssm, layer, **options)
    ids = torch.randint(0, 64, (2, 5))
    program = export(model, (ids,))
    found = operators(program)
    mlp = "d_intermediate" in options
    norm = found["rms_norm"] if options["rms_norm"] else found["layer_norm"]
    gated = 2 if layer == "Mamba2" and options["rms_norm"] else 0
    assert norm == (5 if mlp else 3) + gated
    assert found["selective_scan"] + found["ssd_scan"] == found["causal_conv1d"] == 2
    for shape in OTHER_SHAPES:
        ids = torch.randint(0, 64, shape)
        assert difference(program.module()(ids).logits, eager(model, ids)) < CLOSE
    if layer == "Mamba1":
        matched = match(program.module(check_guards=False))
        assert [block.name for block in matched.blocks] == ["backbone.layers.0.mixer", "backbone.layers.1.mixer"]
        assert len(matched.heads) == 1


def language_model(package: ModuleType, layer: str, **options: Any) -> nn.Module:
    from mamba_ssm.models.config_mamba import MambaConfig

    torch.manual_seed(0)
    ssm = {"layer": layer, "d_state": 8}
    if layer == "Mamba2":
        ssm |= {"headdim": 16, "chunk_size": 4}
    config = MambaConfig(d_model=32, n_layer=2, vocab_size=64, ssm_cfg=ssm, **options)
    model = randomise(package.MambaLMHeadModel(config))
    model.tie_weights()
    return model


def test_bfloat16(mamba_ssm: ModuleType) -> None:
    """The mixed dtypes of a half-precision model: float32 residual, A and D; bfloat16 elsewhere."""
    model = language_model(mamba_ssm, "Mamba1", rms_norm=True, fused_add_norm=True)
    ids = torch.randint(0, 64, (2, 9))
    wanted = export(model, (ids,)).module()(ids).logits
    program = export(model.bfloat16(), (ids,))
    assert operators(program)["rms_norm"] == 3
    # bfloat16 has 8 bits: 2^-8 a rounding, and a dozen roundings on the way.
    assert difference(program.module()(ids).logits.float(), wanted) < 0.05


def test_block(mamba_ssm: ModuleType) -> None:
    from mamba_ssm.modules.block import Block

    torch.manual_seed(0)
    block = Block(32, mamba_ssm.Mamba, nn.Identity, norm_cls=nn.LayerNorm, fused_add_norm=True).eval()
    hidden, residual = torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    program = export(block, (hidden, residual))
    assert operators(program)["layer_norm"] == 1
    out, total = program.module()(hidden, residual)
    assert torch.equal(total, hidden + residual)
    assert torch.equal(out, export(block.mixer, (hidden,)).module()(block.norm(total)))


@pytest.mark.parametrize("groups", [None, 1, 2])
@pytest.mark.parametrize("parts", [(), ("D",), ("D", "z", "delta_bias")])
def test_selective_scan_fn(mamba_ssm: ModuleType, groups: int | None, parts: tuple[str, ...]) -> None:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn, selective_scan_ref

    torch.manual_seed(0)
    shape = (2, 6, 7)
    matrix = (2, 4, 7) if groups is None else (2, groups, 4, 7)
    operands = [torch.randn(shape), torch.randn(shape), -torch.rand(6, 4), torch.randn(matrix), torch.randn(matrix)]
    extra = {"D": torch.randn(6), "z": torch.randn(shape), "delta_bias": torch.randn(6)}
    options = {name: extra[name] for name in parts}

    class Scan(nn.Module):
        def forward(self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
            return selective_scan_fn(u, delta, A, B, C, **options, delta_softplus=True, return_last_state=True)

    y, state = export(Scan().eval(), tuple(operands)).module()(*operands)
    wanted, wanted_state = selective_scan_ref(*operands, **options, delta_softplus=True, return_last_state=True)
    assert y.shape == wanted.shape
    assert difference(y, wanted) < CLOSE
    assert difference(state, wanted_state) < CLOSE


def test_mamba_inner_fn(mamba_ssm: ModuleType) -> None:
    from mamba_ssm.ops import selective_scan_interface as interface

    torch.manual_seed(0)
    weights = [(12, 1, 4), (12,), (11, 12), (12, 3), (8, 12), (8,), (12, 4)]
    conv, conv_bias, x_proj, dt_proj, out_proj, out_bias, A = (torch.randn(shape) * 0.5 for shape in weights)
    operands = (torch.randn(2, 24, 7), conv, conv_bias, x_proj, dt_proj, out_proj, out_bias, -A.exp(), None, None)
    options = {"D": torch.randn(12), "delta_bias": torch.randn(12), "B_proj_bias": torch.randn(4)}
    references = [
        replacing.Replacement(interface, "causal_conv1d_fn", conv_reference),
        replacing.Replacement(interface.SelectiveScanFn, "apply", interface.selective_scan_ref),
    ]
    with replacing.replaced(references):
        wanted = interface.mamba_inner_ref(*operands, **options)
    assert difference(adapter.mamba_inner_fn(*operands, **options), wanted) < CLOSE


def test_mamba_inner_fn_norms(mamba_ssm: ModuleType) -> None:
    """The norms of FalconMamba, for which mamba_ssm has no reference: of B, C and of delta after dt_proj."""
    torch.manual_seed(0)
    xz, conv, x_proj, dt_proj, out_proj = (
        torch.randn(shape) for shape in [(2, 24, 7), (12, 1, 4), (11, 12), (12, 3), (8, 12)]
    )
    A, b, c, dt = -torch.rand(12, 4), torch.rand(4), torch.rand(4), torch.rand(12)
    got = adapter.mamba_inner_fn(
        *(xz, conv, None, x_proj, dt_proj, out_proj, None, A),
        b_rms_weight=b,
        c_rms_weight=c,
        dt_rms_weight=dt,
        b_c_dt_rms_eps=1e-3,
    )
    from mamba_ssm.ops.selective_scan_interface import selective_scan_ref
    from mamba_ssm.ops.triton.layer_norm import rms_norm_ref

    x, z = xz.chunk(2, dim=1)
    x = conv_reference(x, conv.squeeze(1), activation="silu")
    low, B, C = functional.linear(x.transpose(1, 2), x_proj).split([3, 4, 4], dim=-1)
    delta = rms_norm_ref(functional.linear(low, dt_proj), dt, None, eps=1e-3)
    B, C = rms_norm_ref(B, b, None, eps=1e-3), rms_norm_ref(C, c, None, eps=1e-3)
    y = selective_scan_ref(x, delta.mT, A, B.mT, C.mT, z=z, delta_softplus=True)
    assert difference(got, functional.linear(y.mT, out_proj)) < CLOSE


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("wide", [False, True])
def test_mamba_chunk_scan_combined(mamba_ssm: ModuleType, groups: int, wide: bool) -> None:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined, ssd_chunk_scan_combined_ref

    torch.manual_seed(0)
    x, z = torch.randn(2, 8, 4, 3), torch.randn(2, 8, 4, 3)
    dt, A = torch.randn(2, 8, 4), -torch.rand(4)
    B, C = torch.randn(2, 8, groups, 5), torch.randn(2, 8, groups, 5)
    options = {"D": torch.randn((4, 3) if wide else (4,)), "dt_bias": torch.randn(4), "dt_softplus": True}

    class Scan(nn.Module):
        def forward(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, z: Tensor) -> Tensor:
            return mamba_chunk_scan_combined(x, dt, A, B, C, 4, z=z, **options)

    operands = (x, dt, A, B, C, z)
    got = export(Scan().eval(), operands).module()(*operands)
    assert difference(got, ssd_chunk_scan_combined_ref(x, dt, A, B, C, 4, z=z, **options)) < CLOSE


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("group_size", [None, 4])
@pytest.mark.parametrize("bias", [None, torch.linspace(-1, 1, 12)])
def test_gated_norm(mamba_ssm: ModuleType, before: bool, group_size: int | None, bias: Tensor | None) -> None:
    from mamba_ssm.ops.triton.layernorm_gated import rms_norm_ref

    torch.manual_seed(0)
    x, z, weight = torch.randn(2, 3, 12), torch.randn(2, 3, 12), torch.rand(12)
    options = {"z": z, "eps": 1e-3, "group_size": group_size, "norm_before_gate": before}
    got = adapter.gated_norm_fn(x, weight, bias, **options, is_rms_norm=True)
    assert difference(got, rms_norm_ref(x, weight, bias, **options)) < CLOSE
    # No reference for layer norms: of zero-mean groups they are RMS norms.
    groups = x.unflatten(-1, (-1, group_size or 12))
    centred = (groups - groups.mean(-1, keepdim=True)).flatten(-2)
    if before:
        got = adapter.gated_norm_fn(centred, weight, bias, **options)
        assert difference(got, rms_norm_ref(centred, weight, bias, **options)) < CLOSE


class Copied(nn.Module):
    """A mixer as people copy it, with its own reference to the scan, channel-first."""

    def __init__(self, mixer: nn.Module, scan: Callable[..., Tensor]) -> None:
        super().__init__()
        self.mixer, self.scan = mixer, functools.partial(scan, delta_softplus=True)

    def forward(self, hidden: Tensor) -> Tensor:
        m = self.mixer
        length = hidden.shape[1]
        xz = m.in_proj(hidden).transpose(1, 2)
        x, z = xz.chunk(2, dim=1)
        x = torch.nn.functional.silu(x.contiguous())
        flat = x.permute(0, 2, 1).reshape(-1, m.d_inner)
        dt, B, C = m.x_proj(flat).split([m.dt_rank, m.d_state, m.d_state], dim=-1)
        delta = (m.dt_proj.weight @ dt.t()).reshape(m.d_inner, -1, length).permute(1, 0, 2)
        B, C = (v.reshape(-1, length, m.d_state).permute(0, 2, 1).contiguous() for v in (B, C))
        y = self.scan(x, delta, -m.A_log.float().exp(), B, C, m.D.float(), z=z, delta_bias=m.dt_proj.bias.float())
        return m.out_proj(y.permute(0, 2, 1))


def test_a_copied_mixer(mamba_ssm: ModuleType, eager: Callable[..., Tensor]) -> None:
    model = Copied(mixer(mamba_ssm, "fast path"), mamba_ssm.selective_scan_fn).eval()
    program = export(model, (torch.randn(2, 5, 32),))
    found = operators(program)
    assert (found["selective_scan"], found["linear"]) == (1, 4)
    assert not {"matmul", "transpose", "permute", "contiguous", "reshape"} & set(found)
    for batch, length in OTHER_SHAPES:
        x = torch.randn(batch, length, 32)
        assert difference(program.module()(x), eager(model, x)) < CLOSE


class Failing(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return y if y.sum() > 0 else -y


def test_everything_is_put_back(mamba_ssm: ModuleType) -> None:
    model = mixer(mamba_ssm, "fast path")
    before = references()
    export(model, (torch.randn(2, 5, 32),))
    assert changed(before) == []
    with pytest.raises(MqAoError, match=r"torch\.export cannot capture Failing"):
        export(Failing(model).eval(), (torch.randn(2, 5, 32),))
    assert changed(before) == []
    assert torch.overrides._get_current_function_mode_stack() == []


def test_nested_captures(mamba_ssm: ModuleType) -> None:
    model = mixer(mamba_ssm, "fast path")
    before = references()
    with replacing.replaced(adapter.replacements(model)), layout.ChannelLast():
        replaced = references()
        assert changed(before)
        assert operators(export(model, (torch.randn(2, 5, 32),)))["selective_scan"] == 1
        assert changed(replaced) == []
    assert changed(before) == []


class Model(nn.Module):
    """A model whose second layer has a scan that we do not have."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Unsupported(nn.Module):
    def __init__(self, scan: Callable[..., Tensor], kind: str) -> None:
        super().__init__()
        self.scan, self.kind = scan, kind

    def forward(self, x: Tensor) -> Tensor:
        A, B = -torch.ones(32, 4), x[..., :4].transpose(1, 2)
        A = torch.complex(A, A) if self.kind == "complex" else A
        C = torch.ones(32, 4) if self.kind == "constant C" else B
        return self.scan(x.transpose(1, 2), x.transpose(1, 2), A, B, C).transpose(1, 2)


@pytest.mark.parametrize(
    ("kind", "message"), [("complex", "the scan's A is complex"), ("constant C", r"the scan's C has shape \(32, 4\)")]
)
def test_a_scan_that_is_not_supported_names_its_module(mamba_ssm: ModuleType, kind: str, message: str) -> None:
    model = Model([mixer(mamba_ssm, "fast path"), Unsupported(mamba_ssm.selective_scan_fn, kind)]).eval()
    before = references()
    with pytest.raises(MqAoError, match=rf"layers\.1 \(Unsupported\) cannot be captured: {message}"):
        export(model, (torch.randn(2, 5, 32),))
    assert changed(before) == []


@pytest.mark.parametrize(
    ("function", "arguments", "options", "message"),
    [
        (scans.causal_conv1d_fn, 2, {"activation": "gelu"}, "activation 'gelu'"),
        (scans.causal_conv1d_fn, 2, {"seq_idx": torch.zeros(1)}, "packed sequences"),
        (scans.causal_conv1d_fn, 2, {"final_states_out": torch.zeros(1)}, "in place"),
        (scans.mamba_chunk_scan_combined, 6, {"cu_seqlens": torch.zeros(1)}, "packed sequences"),
        (adapter.layer_norm_fn, 3, {"x1": torch.zeros(1)}, "second input"),
        (adapter.layer_norm_fn, 3, {"dropout_p": 0.5}, "dropout"),
    ],
)
def test_options_that_are_not_supported(
    function: Callable[..., Any], arguments: int, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(MqAoError, match=message):
        function(*[torch.zeros(2, 2, 2)] * arguments, **options)


def test_training_mode(mamba_ssm: ModuleType) -> None:
    with pytest.raises(MqAoError, match=r"Mamba is in training mode: call \.eval\(\)"):
        export(mixer(mamba_ssm, "fast path").train(), (torch.randn(2, 5, 32),))


def test_without_the_extension_only_the_program_runs(mamba_ssm: ModuleType) -> None:
    if getattr(sys.modules["selective_scan_cuda"], "__file__", None):
        pytest.skip("mamba_ssm's CUDA extension is installed")
    with pytest.raises(
        AttributeError, match=r"CUDA extension is not installed.*: capture the model with mq_ao\.export"
    ):
        mixer(mamba_ssm, "slow path")(torch.randn(2, 5, 32))


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)  # As if it were not installed.
    monkeypatch.delitem(sys.modules, "selective_scan_cuda", raising=False)
    with pytest.raises(MqAoError, match=r"mamba_ssm cannot be imported .*: install it with"):
        import_mamba_ssm()
    assert "selective_scan_cuda" not in sys.modules
