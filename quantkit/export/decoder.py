"""A transformers decoder as one traceable module with its key/value cache as plain inputs and outputs.

    logits, present.0.key, present.0.value, ... = decoder(
        input_ids      int64 [B, S]       new tokens
        attention_mask int64 [B, T]       1 for real tokens of past and new together, T = P + S
        position_ids   int64 [B, S]       positions of the new tokens (padding not counted)
        past.0.key     float [B, H_kv, P, D], past.0.value, past.1.key, ...
    )

The mathematics stay those of transformers' modeling code, whatever the family: its attention layers call
the function that `attention` registers, its cache is `TracedCache`, and masks are prepared here, in the 4-D
form that transformers passes on untouched. Three kinds of modules are exchanged for equals that trace
well: RMS norms (one operator instead of six), routed experts (no data-dependent loop), and dense layers
(16-bit in the file, float32 in arithmetic).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.errors import UsageError
from quantkit.experts import UnfusedExperts, unfusable
from quantkit.linear import QuantLinear

#: `attention(query, key, value, bias, past, scaling, softcap) -> (output, present key, present value)`;
#: query `[B, H, S, D]`, key and value `[B, H_kv, S, D]`, bias `[B, 1, S, T]` (0 or very negative).
Attention = Callable[..., tuple[Tensor, Tensor, Tensor]]

_ATTENTION_NAME = "quantkit_export"


class TracedCache:
    """What transformers' attention layers see as their cache while the decoder is traced."""

    is_compileable = False

    def __init__(self, past: list[tuple[Tensor, Tensor]] | None) -> None:
        self.past = past
        self.present: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """New keys and values pass through: the attention function joins them to the past."""
        return key, value

    def get_seq_length(self, layer: int = 0) -> int:
        """Never used for masks or positions here: both are given."""
        return 0


class Decoder(nn.Module):
    """See the module's docstring. `attention` decides how keys and values are joined and multiplied."""

    #: False for a subclass whose forward has no `position_ids`.
    takes_positions = True

    def __init__(self, model: Any, attention: Attention, *, use_cache: bool = True) -> None:
        super().__init__()
        self.model = model
        self.attention = attention
        self.use_cache = use_cache
        config = model.config.get_text_config()
        self.layers = int(config.num_hidden_layers)
        self.window = sliding_window(config)
        self.layer_types = layer_types(config)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: list[tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, ...]:
        total = attention_mask.shape[1]
        places = torch.arange(total, device=input_ids.device)[total - input_ids.shape[1] :]
        return self.run(input_ids, attention_mask, position_ids, past, places)

    def run(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: list[tuple[Tensor, Tensor]] | None,
        places: Tensor,
    ) -> tuple[Tensor, ...]:
        """The forward pass for new tokens that stand at `places [S]` of the mask's T."""
        cache = TracedCache(past)
        masks = {
            kind: self.bias(attention_mask, places, window)
            for kind, window in (("full_attention", None), ("sliding_attention", self.window))
            if kind in self.layer_types
        }
        mask = masks if len(masks) > 1 else next(iter(masks.values()))
        with attention_function(self.attention, cache):
            out = self.model(
                input_ids=input_ids,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
            )
        logits = out.logits.float()
        if not self.use_cache:
            return (logits,)
        present = [tensor for i in range(self.layers) for tensor in cache.present[i]]
        return (logits, *present)

    def bias(self, attention_mask: Tensor, places: Tensor, window: int | None) -> Tensor:
        """What is added to the scores of the queries at `places [S]`, float32 `[B, 1, S, T]`."""
        return additive_mask(attention_mask, places, window)


def additive_mask(attention_mask: Tensor, query: Tensor, window: int | None) -> Tensor:
    """float32 `[B, 1, S, T]`: 0 where a query may look, a large negative number elsewhere.

    `query [S]` are the places of the new tokens among the T places of the mask.
    """
    key = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    visible = key[None, :] <= query[:, None]
    if window is not None:
        visible = visible & (key[None, :] > query[:, None] - window)
    allowed = visible[None, None] & (attention_mask[:, None, None, :] > 0)
    # Not -inf: a row of padding sees nothing, and softmax of nothing but -inf is NaN.
    return torch.where(allowed, 0.0, -30000.0)


class StaticDecoder(Decoder):
    """The same with a cache of fixed length L: new keys and values are written at `cache_position [S]`.

    `attention_mask [B, L]` is 1 for the real tokens among the places written so far, the new ones included.
    Inputs are not changed: the updated caches `[B, H_kv, L, D]` are outputs.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model, self._attend)
        self._places: Tensor | None = None

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        cache_position: Tensor,
        cache: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, ...]:
        self._places = cache_position
        try:
            return self.run(input_ids, attention_mask, position_ids, cache, cache_position)
        finally:
            self._places = None

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor,
        past: tuple[Tensor, Tensor],
        scaling: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert self._places is not None
        key, value = past[0].index_copy(2, self._places, key), past[1].index_copy(2, self._places, value)
        return plain_attention(query, key, value, bias, None, scaling, softcap)


def sliding_window(config: Any) -> int | None:
    """The window of sliding layers in tokens; None when the model has none."""
    if getattr(config, "use_sliding_window", True) is False:
        return None
    window = getattr(config, "sliding_window", None)
    return int(window) if window else None


def layer_types(config: Any) -> set[str]:
    """Kinds of attention that the model's layers have."""
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return set(kinds)
    return {"sliding_attention" if sliding_window(config) else "full_attention"}


def check_supported(model: Any) -> None:
    """UsageError, naming the architecture, unless `model` is a decoder that `Decoder` can drive."""
    name = type(model).__name__
    config = model.config.get_text_config()
    if not model.can_generate() or getattr(config, "is_encoder_decoder", False):
        raise UsageError(
            f"{name} does not generate text", hint="Export takes decoders (causal language models)."
        )
    unknown = layer_types(config) - {"full_attention", "sliding_attention"}
    for wanted in ("num_attention_heads", "num_hidden_layers", "hidden_size"):
        if not isinstance(getattr(config, wanted, None), int):
            unknown.add(f"config without {wanted}")
    attentions = [m for m in model.modules() if hasattr(m, "o_proj") and hasattr(m, "layer_idx")]
    if len(attentions) != getattr(config, "num_hidden_layers", -1):
        unknown.add("attention of its own kind")
    unknown |= {f"{type(m).__name__}: {why}" for m in model.modules() if (why := unfusable(m))}
    if unknown:
        raise UsageError(
            f"export does not support the architecture {name} ({', '.join(sorted(unknown))})",
            hint="Supported: decoders of the Llama, Mistral, Qwen, Gemma, Phi-3 and Mixtral families.",
        )


# -- attention --------------------------------------------------------------------------------------


@contextmanager
def attention_function(attention: Attention, cache: TracedCache) -> Any:
    """Inside, transformers' attention layers (see `use_export_attention`) call `attention` with `cache`."""
    _CURRENT.append((attention, cache))
    try:
        yield
    finally:
        _CURRENT.pop()


_CURRENT: list[tuple[Attention, TracedCache]] = []


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' interface of an attention function, over `Attention`."""
    attention, cache = _CURRENT[-1]
    layer = module.layer_idx
    past = None if cache.past is None else cache.past[layer]
    scaling = kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    out, *present = attention(query, key, value, attention_mask, past, scaling, kwargs.get("softcap"))
    cache.present[layer] = (present[0], present[1])
    return out, None


def use_export_attention(model: Any) -> None:
    """Make `model`'s attention layers call the function of the innermost `attention_function`."""
    from transformers import AttentionInterface

    AttentionInterface.register(_ATTENTION_NAME, _attend)
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation"):
            config._attn_implementation = _ATTENTION_NAME


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    past: tuple[Tensor, Tensor] | None,
    scaling: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Joined cache, softmax(q k^T * scaling + bias) v; output `[B, S, H, D]`."""
    if past is not None:
        key, value = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
    batch, kv_heads, total, size = key.shape
    queries = query.shape[2]
    # Heads that share keys become rows of one product: keys are never repeated in memory.
    grouped = query.reshape(batch, kv_heads, -1, size)
    scores = (grouped @ key.transpose(2, 3)) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.reshape(batch, query.shape[1], queries, total) + bias
    weights = torch.softmax(scores, dim=-1).reshape(batch, kv_heads, -1, total)
    out = (weights @ value).reshape(batch, query.shape[1], queries, size)
    return out.transpose(1, 2), key, value


# -- modules that trace well ------------------------------------------------------------------------


class StoredEmbedding(nn.Module):
    """Embedding whose table keeps its dtype; rows come out in float32."""

    def __init__(self, old: nn.Embedding) -> None:
        super().__init__()
        self.weight = old.weight
        scale = getattr(old, "embed_scale", None)  # Gemma 3 scales inside the embedding
        self.scale = None if scale is None else float(scale)

    def forward(self, ids: Tensor) -> Tensor:
        rows = torch.nn.functional.embedding(ids, self.weight).float()
        return rows if self.scale is None else rows * self.scale


class StoredLinear(nn.Module):
    """Dense linear layer whose weight keeps its dtype; arithmetic in float32."""

    def __init__(self, old: nn.Linear) -> None:
        super().__init__()
        self.weight = old.weight
        self.bias: Tensor | None = old.bias
        self.in_features, self.out_features = old.in_features, old.out_features

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return torch.nn.functional.linear(x, self.weight.float(), bias)


class FusedRMSNorm(nn.Module):
    """`x / rms(x) * weight` as one operator, with the weight that the family means (Gemma: 1 + w)."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class DenseExperts(nn.Module):
    """Every expert computed for every token, weighted by the router (0 for experts not chosen).

    The same sum as `UnfusedExperts`; E/k times its work, in exchange for a graph without loops that depend
    on data.
    """

    def __init__(self, experts: UnfusedExperts) -> None:
        super().__init__()
        self.num_experts = experts.num_experts
        self._gate: Any = experts._gate_owner
        for i in range(self.num_experts):
            self.add_module(str(i), getattr(experts, str(i)))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        for i in range(self.num_experts):
            expert: Any = getattr(self, str(i))
            gate_up = torch.cat([expert.gate_proj(hidden_states), expert.up_proj(hidden_states)], dim=-1)
            y = expert.down_proj(self._gate._apply_gate(gate_up))
            share = torch.where(top_k_index == i, top_k_weights, 0.0).sum(dim=-1, keepdim=True)
            out = out + y * share
        return out


def prepare(model: Any) -> None:
    """Exchange modules of a loaded model in place: norms, experts, dense layers, attention function."""
    use_export_attention(model)
    for path, module in list(model.named_modules()):
        new = _replacement(module)
        if new is not None:
            setattr(model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], new)
    stored = {id(m.weight) for m in model.modules() if isinstance(m, StoredEmbedding | StoredLinear)}
    packed = {id(p) for m in model.modules() if isinstance(m, QuantLinear) for p in m.parameters()}
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and id(tensor) not in stored and id(tensor) not in packed:
            tensor.data = tensor.data.float()
    model.requires_grad_(False).eval()


def _replacement(module: nn.Module) -> nn.Module | None:
    if isinstance(module, UnfusedExperts):
        return DenseExperts(module)
    if isinstance(module, nn.Embedding):
        return StoredEmbedding(module)
    if type(module) is nn.Linear:
        return StoredLinear(module)
    if "RMSNorm" in type(module).__name__:
        return _fused_norm(module)
    return None


@torch.no_grad()
def _fused_norm(module: Any) -> FusedRMSNorm | None:
    """One operator for an RMS norm if it computes the same on random input; None (keep it) otherwise."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = getattr(module, "weight", None)
    if not isinstance(eps, float) or not isinstance(weight, Tensor):
        return None
    stored = weight.data
    module.weight.data = stored.float()
    x = torch.randn(4, stored.shape[0], generator=torch.Generator().manual_seed(0))
    want = module(x)
    for candidate in (stored.float(), stored.float() + 1.0):
        new = FusedRMSNorm(candidate, eps)
        if torch.allclose(new(x), want, rtol=1e-5, atol=1e-6):
            return new
    module.weight.data = stored
    return None
