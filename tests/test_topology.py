"""Scale groups: applying any scales must leave a decoder layer's float32 output unchanged."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from quantkit.experts import unfuse_experts
from quantkit.topology import FAMILIES, ScaleGroup, apply_scale, discover_groups, scale_groups

transformers = pytest.importorskip("transformers")

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "attn_implementation": "eager",
}
MOE = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
EXTRA = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**MOE, "decoder_sparse_step": 2},  # layer 0 dense, layer 1 sparse
    "qwen2_moe": {**MOE, "shared_expert_intermediate_size": 40},
    "qwen2": {"use_sliding_window": False},
    "llama": {"attention_bias": True, "mlp_bias": True},
    "gemma3_text": {"sliding_window": 16},
    "gemma2": {"sliding_window": 16},
    "mistral": {"sliding_window": None},
}


def tiny_model(model_type: str) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **{**TINY, **EXTRA.get(model_type, {})})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    assert unfuse_experts(model) == {}  # leaves the experts' weights unset
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn_like(p) * (0.3 if p.dim() == 1 else 0.15)
            p.copy_(noise if ".experts." in name else p + noise)
    return model


def capture_layers(model: nn.Module, ids: Tensor) -> list[tuple[nn.Module, tuple, dict]]:
    calls: list[tuple[nn.Module, tuple, dict]] = []
    hooks = [
        layer.register_forward_pre_hook(
            lambda m, a, k: calls.append((m, a, dict(k, past_key_values=None, use_cache=False))),
            with_kwargs=True,
        )
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return calls


def run_layer(call: tuple[nn.Module, tuple, dict]) -> Tensor:
    layer, args, kwargs = call
    with torch.no_grad():
        out = layer(*args, **kwargs)
    return out[0] if isinstance(out, tuple) else out


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


TYPES = sorted(set(FAMILIES) - {"gemma3"})  # "gemma3" is the vision model around gemma3_text


@pytest.mark.parametrize("model_type", TYPES)
def test_random_scales_leave_the_output_unchanged(model_type: str) -> None:
    model = tiny_model(model_type)
    ids = torch.randint(1, 64, (2, 12), generator=torch.Generator().manual_seed(1))
    for call in capture_layers(model, ids):
        layer = call[0]
        groups = scale_groups(layer, model_type)
        before = run_layer(call)
        covered = {c for g in groups for c in g.consumers}
        linears = {n for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
        assert linears - covered <= {"mlp.shared_expert_gate"}, (
            "every linear of these families is fed by a group"
        )
        for group in groups:
            scale = torch.exp2(torch.rand(group.width) * 4 - 2)
            apply_scale(layer, group, scale)
            assert distance(run_layer(call), before) < 1e-5, group
        assert distance(run_layer(call), before) < 1e-5


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "qwen3", "phi3"])
def test_a_wrong_scale_is_noticed(model_type: str) -> None:
    """The invariance test has teeth: forgetting one consumer changes the output."""
    model = tiny_model(model_type)
    call = capture_layers(model, torch.arange(1, 13)[None])[0]
    layer = call[0]
    before = run_layer(call)
    group = scale_groups(layer, model_type)[0]
    broken = ScaleGroup(group.producer, group.kind, group.consumers[:-1], group.width)
    apply_scale(layer, broken, torch.exp2(torch.rand(group.width) * 4 - 2))
    assert distance(run_layer(call), before) > 1e-3


def test_norm_rounding_is_compensated_exactly() -> None:
    model = tiny_model("gemma2")
    call = capture_layers(model, torch.arange(1, 13)[None])[0]
    layer = call[0]
    before = run_layer(call)
    group = scale_groups(layer, "gemma2")[0]
    asked = torch.exp2(torch.rand(group.width) * 4 - 2)
    used = apply_scale(layer, group, asked, store_dtype=torch.bfloat16)
    norm = layer.get_submodule(group.producer).weight
    assert torch.equal(norm, norm.to(torch.bfloat16).float())
    assert distance(run_layer(call), before) < 1e-5
    assert (used / asked - 1).abs().max() < 0.02


def test_zero_norm_weights_keep_scale_one() -> None:
    model = tiny_model("llama")
    call = capture_layers(model, torch.arange(1, 13)[None])[0]
    layer = call[0]
    with torch.no_grad():
        layer.input_layernorm.weight[3] = 0
    before = run_layer(call)
    used = apply_scale(layer, scale_groups(layer, "llama")[0], torch.full((32,), 4.0))
    assert used[3] == 1 and (used[:3] == 4).all()
    assert distance(run_layer(call), before) < 1e-5


@pytest.mark.parametrize(
    "model_type", ["llama", "qwen3", "gemma2", "phi3", "cohere", "gpt_neox", "phi", "olmo2"]
)
def test_discovery_finds_groups_by_experiment(model_type: str) -> None:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **TINY)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.3 if p.dim() == 1 else 0.15))
    base = model.base_model
    calls: list = []
    hook = base.layers[0].register_forward_pre_hook(
        lambda m, a, k: calls.append((m, a, dict(k, use_cache=False))), with_kwargs=True
    )
    with torch.no_grad():
        model(torch.arange(1, 13)[None], use_cache=False)
    hook.remove()
    layer = calls[0][0]
    before = run_layer(calls[0])
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    groups, notes = discover_groups(layer, lambda: run_layer(calls[0]))
    assert all(torch.equal(v, state[k]) for k, v in layer.state_dict().items()), "the layer is left as it was"
    if model_type in FAMILIES:
        known = {(g.producer, g.kind, frozenset(g.consumers)) for g in scale_groups(layer, model_type)}
        assert {(g.producer, g.kind, frozenset(g.consumers)) for g in groups} == known
        assert not notes
    covered = {c for g in groups for c in g.consumers}
    linears = {n for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
    assert len(notes) == len(linears - covered)
    for group in groups:
        apply_scale(layer, group, torch.exp2(torch.rand(group.width) * 2 - 1))
    assert distance(run_layer(calls[0]), before) < 1e-5


def test_unknown_families_have_no_table() -> None:
    assert scale_groups(nn.Linear(4, 4), "no_such_model") == []
