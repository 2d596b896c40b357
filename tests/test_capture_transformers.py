"""transformers' Mamba models and hybrids, captured as they are, against their own eager forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mq_ao import MqAoError, export
from mq_ao.capture import norm_functions
from mq_ao.graph.matcher import match
from tests.captured import changed, difference, operators, randomise, references

transformers = pytest.importorskip("transformers", reason='needs pip install "mq-ao[hf]"')

# Both sides compute in float32, in another order: some units in the last place of sums over tens of terms.
CLOSE = 1e-5
VOCAB = 64
OTHER_SHAPES = ((1, 1), (3, 1), (1, 11), (3, 8))

ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2}
MAMBA = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
HYBRID = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, **ATTENTION}
JAMBA = {
    **HYBRID,
    "num_hidden_layers": 3,
    "attn_layer_period": 3,
    "attn_layer_offset": 1,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
}
SSD = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_state": 8, "mamba_chunk_size": 4}
MULTIPLIERS = {"ssm_multipliers": [0.9, 1.1, 0.8, 1.2, 0.7], "ssm_in_multiplier": 1.3, "lm_head_multiplier": 0.5}
FALCON_H1 = {**HYBRID, **SSD, **MULTIPLIERS, "num_hidden_layers": 2, "mamba_d_ssm": 64, "head_dim": 8}
GRANITE = {
    **HYBRID,
    **SSD,
    "num_hidden_layers": 3,
    "layer_types": ["mamba", "attention", "mamba"],
    "mamba_n_groups": 1,
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "shared_intermediate_size": 48,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "logits_scaling": 2.0,
}
NEMOTRON = {
    **HYBRID,
    "num_hidden_layers": 4,
    "layers_block_type": ["mamba", "attention", "mlp", "mamba"],
    "head_dim": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "ssm_state_size": 8,
    "chunk_size": 4,
}
NEMOTRON_EXPERTS = {
    "layers_block_type": ["mamba", "attention", "moe", "mamba"],
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 32,
}

# Name of the model: configuration, and the nodes that the graph must have.
MODELS: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "Mamba": (MAMBA, {"selective_scan": 2, "causal_conv1d": 2, "rms_norm": 3, "linear": 9}),
    "Mamba, biases": (
        {**MAMBA, "use_bias": True, "use_conv_bias": False, "tie_word_embeddings": False},
        {"selective_scan": 2, "causal_conv1d": 2, "rms_norm": 3, "linear": 9},
    ),
    # Three more norms a block: of B, C and what dt_proj reads.
    "FalconMamba": (MAMBA, {"selective_scan": 2, "causal_conv1d": 2, "rms_norm": 9, "linear": 9}),
    "Jamba": (
        {**JAMBA, "num_experts": 1, "num_experts_per_tok": 1},
        {"selective_scan": 2, "causal_conv1d": 2, "rms_norm": 13, "scaled_dot_product_attention": 1},
    ),
    "Jamba, experts": (
        {**JAMBA, "num_experts": 4},
        {"selective_scan": 2, "causal_conv1d": 2, "rms_norm": 13, "expert_linear": 2},
    ),
    # One more norm a block: the gated one.
    "Mamba2": (
        {**MAMBA, "head_dim": 16, "num_heads": 4, "n_groups": 2, "chunk_size": 4},
        {"ssd_scan": 2, "causal_conv1d": 2, "rms_norm": 5, "linear": 5},
    ),
    "Bamba": (
        {**HYBRID, **SSD, "num_hidden_layers": 3, "attn_layer_indices": [1]},
        {"ssd_scan": 2, "causal_conv1d": 2, "rms_norm": 9, "scaled_dot_product_attention": 1},
    ),
    "Zamba2": (
        {
            **HYBRID,
            "num_hidden_layers": 3,
            "layers_block_type": ["mamba", "hybrid", "mamba"],
            "num_mem_blocks": 1,
            "mamba_d_state": 8,
            "mamba_ngroups": 2,
            "n_mamba_heads": 4,
            "mamba_headdim": 16,
            "chunk_size": 4,
        },
        {"ssd_scan": 3, "causal_conv1d": 3, "rms_norm": 9, "scaled_dot_product_attention": 1},
    ),
    "FalconH1": (FALCON_H1, {"ssd_scan": 2, "causal_conv1d": 2, "rms_norm": 5, "scaled_dot_product_attention": 2}),
    "FalconH1, norm": (
        {**FALCON_H1, "mamba_rms_norm": True, "mamba_norm_before_gate": True},
        {"ssd_scan": 2, "causal_conv1d": 2, "rms_norm": 7, "scaled_dot_product_attention": 2},
    ),
    "GraniteMoeHybrid": (
        GRANITE,
        {"ssd_scan": 2, "causal_conv1d": 2, "rms_norm": 9, "scaled_dot_product_attention": 1},
    ),
    "GraniteMoeHybrid, experts": (
        {**GRANITE, "num_local_experts": 4, "num_experts_per_tok": 2},
        {"ssd_scan": 2, "causal_conv1d": 2, "rms_norm": 9, "expert_linear": 6},
    ),
    "NemotronH": (
        NEMOTRON,
        {"ssd_scan": 2, "causal_conv1d": 2, "rms_norm": 7, "scaled_dot_product_attention": 1},
    ),
    "NemotronH, experts": (
        {**NEMOTRON, **NEMOTRON_EXPERTS},
        {"ssd_scan": 2, "causal_conv1d": 2, "rms_norm": 7, "expert_linear": 2},
    ),
}
SCANS = {"selective_scan", "ssd_scan"}
SPELLED_OUT = {"rsqrt", "pow", "softplus", "cumsum_backward", "conv1d", "einsum", "matmul", "addmm", "bmm"}


def build(name: str) -> nn.Module:
    kind = name.partition(",")[0]
    if not hasattr(transformers, f"{kind}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**MODELS[name][0])
    return randomise(getattr(transformers, f"{kind}ForCausalLM")(config))


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(sum(shape)))


def check(model: nn.Module, program: torch.export.ExportedProgram) -> None:
    for shape in OTHER_SHAPES:
        ids = tokens(*shape)
        with torch.no_grad():
            wanted = model(ids, use_cache=False).logits
        assert difference(program.module()(ids).logits, wanted) < CLOSE


@pytest.mark.parametrize("name", MODELS)
def test_language_model(name: str) -> None:
    model = build(name)
    program = export(model, (tokens(2, 5),))
    found = operators(program)
    wanted = MODELS[name][1]
    assert {key: found[key] for key in wanted} == wanted
    assert sum(found[scan] for scan in SCANS) == wanted["causal_conv1d"]
    assert not SPELLED_OUT & set(found)
    check(model, program)


@pytest.mark.parametrize("name", MODELS)
def test_masks(name: str) -> None:
    """Padded in front and behind: what real tokens give is what the library gives them."""
    model = build(name)
    ids, mask = tokens(3, 8), torch.ones(3, 8, dtype=torch.int64)
    mask[0, :3] = 0
    mask[2, 6:] = 0
    with torch.no_grad():
        wanted = model(ids, attention_mask=mask, use_cache=False).logits
    program = export(model, (ids[:2, :5],), {"attention_mask": mask[:2, :5]})
    got = program.module()(ids, attention_mask=mask).logits
    assert difference(got[mask != 0], wanted[mask != 0]) < CLOSE


@pytest.mark.parametrize("name", ["Mamba", "Mamba, biases", "FalconMamba", "Mamba2"])
def test_blocks_are_matched(name: str) -> None:
    matched = match(export(build(name), (tokens(2, 5),)).module(check_guards=False))
    assert [block.name for block in matched.blocks] == ["backbone.layers.0.mixer", "backbone.layers.1.mixer"]
    assert len(matched.heads) == 1
    assert matched.rejected == ()


@pytest.mark.parametrize("name", ["Mamba", "FalconMamba", "Mamba2"])
def test_float64(name: str) -> None:
    """Without rounding: what is left is what the model itself computes in float32 (A, D, the norms and the gate)."""
    model = build(name).double()
    program = export(model, (tokens(2, 5),))
    assert operators(program)["rms_norm"] == MODELS[name][1]["rms_norm"]
    for shape in OTHER_SHAPES:
        with torch.no_grad():
            wanted = model(tokens(*shape), use_cache=False).logits
        assert difference(program.module()(tokens(*shape)).logits, wanted) < 1e-6


@pytest.mark.parametrize("name", ["Mamba", "Mamba2"])
def test_bfloat16(name: str) -> None:
    model = build(name)
    with torch.no_grad():
        wanted = model(tokens(2, 9), use_cache=False).logits
    program = export(model.bfloat16(), (tokens(2, 5),))
    assert operators(program)["rms_norm"] == MODELS[name][1]["rms_norm"]
    # bfloat16 has 8 bits: 2^-8 a rounding, and a dozen roundings on the way.
    assert difference(program.module()(tokens(2, 9)).logits.float(), wanted) < 0.05


def test_the_mixer_alone() -> None:
    mixer = build("Mamba").backbone.layers[0].mixer
    program = export(mixer, (torch.randn(2, 5, 32),))
    assert not {"transpose", "permute", "matmul", "reshape", "contiguous"} & set(operators(program))
    x = torch.randn(3, 7, 32)
    assert difference(program.module()(x), mixer(x)) < CLOSE


class Failing(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits = self.model(ids).logits
        return logits if logits.sum() > 0 else -logits


def test_everything_is_put_back() -> None:
    model = build("Mamba")
    before = references()
    export(model, (tokens(2, 5),))
    with pytest.raises(MqAoError, match=r"torch\.export cannot capture Failing"):
        export(Failing(model).eval(), (tokens(2, 5),))
    assert changed(before) == []
    assert model.config.use_cache
    assert all("forward" not in vars(part) for part in model.modules())
    assert model(tokens(1, 2)).cache_params is not None


def test_training_mode() -> None:
    with pytest.raises(MqAoError, match=r"MambaForCausalLM is in training mode: call \.eval\(\)"):
        export(build("Mamba").train(), (tokens(2, 5),))


def test_no_mamba_block() -> None:
    config = transformers.LlamaConfig(**HYBRID, num_hidden_layers=1)
    program = export(transformers.LlamaForCausalLM(config).eval(), (tokens(2, 5),))
    with pytest.raises(MqAoError, match="nothing to recognise as Mamba"):
        match(program.module(check_guards=False))


def test_an_activation_that_is_not_supported_names_its_module() -> None:
    torch.manual_seed(0)
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**MAMBA, hidden_act="gelu")).eval()
    with pytest.raises(MqAoError, match=r"backbone\.layers\.0\.mixer \(MambaMixer\) cannot be captured: .*'gelu'"):
        export(model, (tokens(2, 5),))


def test_a_version_without_functions_to_replace(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("Mamba")
    monkeypatch.delattr("transformers.models.mamba.modeling_mamba.mamba_selective_scan")
    with pytest.raises(MqAoError, match=r"backbone\.layers\.0\.mixer \(MambaMixer\) .* install transformers 5\.15"):
        export(model, (tokens(2, 5),))


class ShiftedRMSNorm(nn.Module):
    """As in Gemma: the weight is added to one."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8))
        self.variance_epsilon = 1e-5
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon * self.factor)
        return y * (1 + self.weight)


@pytest.mark.parametrize("shift", [0.0, 1.0])
@pytest.mark.parametrize("factor", [1.0, 100.0])
def test_a_norm_is_replaced_if_it_computes_the_same(shift: float, factor: float) -> None:
    norm = ShiftedRMSNorm(factor)
    same = shift == 1.0 and factor == 1.0
    if shift:
        norm.forward = lambda x: ShiftedRMSNorm.forward(norm, x) * norm.weight / (1 + norm.weight)  # type: ignore[method-assign]
    found = list(norm_functions.replacements(nn.Sequential(norm), "tests"))
    assert bool(found) == same
    if same:
        x = torch.randn(2, 3, 8)
        assert difference(found[0].value(x), norm(x)) < CLOSE
