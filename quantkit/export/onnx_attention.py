"""Attention as GroupQueryAttention (com.microsoft): the cache, the rotary embedding and the product in one.

transformers' attention layers rotate queries and keys before they call the attention function. While a
`SlotDecoder` is traced, that step passes queries and keys on unrotated, and the operator is given tables of
cosines and sines. The tables are not in the file: they are nodes over the inverse frequencies, which
onnxruntime computes once when it opens the file. They end at the model's `max_position_embeddings`.

The operator counts positions alike for every row of a batch (its `position_ids` serve one token at a time),
so a token's position is its *slot*, padding included. A row padded on the left has all its positions moved by
the same number; rotary attention depends on differences only. The graph has no input `position_ids`.

Models whose rotation is not of that kind (frequencies that change with the length, another layout) keep
transformers' own nodes and `position_ids`: `rotary_fits` tries it on random numbers.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.export.decoder import Decoder
from quantkit.export.onnx_graph import CacheShape

_APPLY = "apply_rotary_pos_emb"


class ContribDecoder(Decoder):
    """A `Decoder` whose attention is GroupQueryAttention; every row counts as full.

    Padding is in the bias, so that it may stand on either side. What a decode step computes beside the layers
    is written out here in the operators that are fewest: it is a tenth of a small model's step.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model, self._attend)
        self._tables: tuple[Tensor, Tensor] | None = None
        self._lengths: tuple[Tensor, Tensor] | None = None
        self._ids: Tensor | None = None

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: list[tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, ...]:
        self._lengths, self._ids = lengths(attention_mask), input_ids
        try:
            return super().forward(input_ids, attention_mask, position_ids, past)
        finally:
            self._lengths = self._tables = self._ids = None

    def bias(self, attention_mask: Tensor, places: Tensor, window: int | None) -> Tensor:
        """The operator itself looks at no later token: without a window, padding is all there is to say."""
        if window is not None:
            return super().bias(attention_mask, places, window)
        assert self._ids is not None
        return padding_bias(attention_mask, self._ids)

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
        tables, self._tables = self._tables, None  # a layer without rotation leaves none
        assert self._lengths is not None
        batch, heads, new, size = query.shape
        kv_heads, total = key.shape[1], bias.shape[-1]
        flat = [t.transpose(1, 2).reshape(batch, new, -1) for t in (query, key, value)]
        attributes: dict[str, Any] = {"num_heads": heads, "kv_num_heads": kv_heads, "scale": scaling}
        if softcap:
            attributes["softcap"] = float(softcap)
        rotary: tuple[Tensor | None, ...] = (None, None)
        if tables is not None:
            attributes["do_rotary"] = 1
            rotary = tables
        out, present_key, present_value = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            # Without position_ids: tokens count on from the length of the past.
            (*flat, *past, *self._lengths, *rotary, None, bias),
            attributes,
            dtypes=(query.dtype,) * 3,
            shapes=(
                (batch, new, heads * size),
                (batch, kv_heads, total, size),
                (batch, kv_heads, total, size),
            ),
            version=1,
        )
        return out.reshape(batch, new, heads, size), present_key, present_value


def lengths(attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """What the operator asks of a mask `[B, T]` of full rows: int32 `[B]`, all T - 1, and `[1]`, T."""
    rows, columns = _size(attention_mask, 0), _size(attention_mask, 1)
    total = _node("Cast", (columns,), torch.int32, (1,), to=6)
    return _node("Expand", (total - 1, rows), torch.int32, attention_mask.shape[:1]), total


def padding_bias(attention_mask: Tensor, ids: Tensor) -> Tensor:
    """float32 `[B, 1, S, T]` for `ids [B, S]`: very negative where the mask `[B, T]` has 0."""
    batch, total = attention_mask.shape
    values = torch.tensor([-30000.0, 0.0])  # not -inf: see `decoder.additive_mask`
    bias = _node("Gather", (values, attention_mask), torch.float32, (batch, total), axis=0)[:, None, None]
    one = torch.ones(1, dtype=torch.int64)
    wanted = _node("Concat", (one, one, _size(ids, 1), one), torch.int64, (4,), axis=0)
    return _node("Expand", (bias, wanted), torch.float32, (batch, 1, ids.shape[1], total))


def _size(tensor: Tensor, dim: int) -> Tensor:
    return _node("Shape", (tensor,), torch.int64, (1,), start=dim, end=dim + 1)


def _node(kind: str, inputs: tuple[Tensor, ...], dtype: torch.dtype, shape: Any, **attributes: Any) -> Tensor:
    return torch.onnx.ops.symbolic(f"::{kind}", inputs, attributes, dtype=dtype, shape=tuple(shape))


class SlotDecoder(ContribDecoder):
    """A `ContribDecoder` whose operator rotates too, by slots: it takes no `position_ids`."""

    takes_positions = False

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        owner = rotary_owner(model)
        owner.rotary_emb = RotaryTable(owner.rotary_emb, max_positions(model))

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor, past: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, ...]:
        with self._rotation_left_out():  # position_ids are not looked at
            return super().forward(input_ids, attention_mask, input_ids, past)

    @contextmanager
    def _rotation_left_out(self) -> Iterator[None]:
        """Inside, `apply_rotary_pos_emb` notes the tables and returns queries and keys as they are."""

        def note(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            self._tables = (cos, sin)
            return q, k

        modules = attention_modules(self.model)
        kept = [getattr(module, _APPLY) for module in modules]
        try:
            for module in modules:
                setattr(module, _APPLY, note)
            yield
        finally:
            for module, function in zip(modules, kept):
                setattr(module, _APPLY, function)


def contrib_decoder(model: Any) -> ContribDecoder:
    """The decoder with the most in the operator that the model allows."""
    return SlotDecoder(model) if rotary_fits(model) else ContribDecoder(model)


class RotaryTable(nn.Module):
    """In place of a model's rotary embedding: cosines and sines `[positions, R/2]`, whatever is asked for."""

    def __init__(self, rotary: nn.Module, positions: int) -> None:
        super().__init__()
        self.rotary, self.positions = rotary, positions

    def forward(self, x: Tensor, position_ids: Tensor, *rest: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        del position_ids
        cos, sin = self.rotary(x, torch.arange(self.positions)[None], *rest, **kwargs)
        half = cos.shape[-1] // 2
        return cos[0, :, :half], sin[0, :, :half]


def max_positions(model: Any) -> int:
    """How many positions the model's configuration allows; 0 where it does not say."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0)


def rotary_owner(model: Any) -> Any:
    """The one module that holds `rotary_emb`; None where there is none or more than one."""
    owners = [m for m in model.modules() if isinstance(getattr(m, "rotary_emb", None), nn.Module)]
    return owners[0] if len(owners) == 1 else None


def attention_modules(model: Any) -> list[Any]:
    """The Python modules in which the attention layers look up `apply_rotary_pos_emb`."""
    names = {type(m).__module__ for m in model.modules() if hasattr(m, "o_proj") and hasattr(m, "layer_idx")}
    return [sys.modules[name] for name in sorted(names)]


def rotary_fits(model: Any) -> bool:
    """Whether the model rotates as GroupQueryAttention does, over tables that its length does not change."""
    config = model.config.get_text_config()
    owner, modules = rotary_owner(model), attention_modules(model)
    if owner is None or not modules or max_positions(model) == 0:
        return False
    if not all(callable(getattr(module, _APPLY, None)) for module in modules):
        return False
    for layer in (m for m in model.modules() if hasattr(m, "o_proj") and hasattr(m, "layer_idx")):
        if _APPLY not in type(layer).forward.__code__.co_names:
            return False
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = parameters.values() if "rope_type" not in parameters else [parameters]
    for one in nested:
        if isinstance(one, dict) and one.get("rope_type", "default") in ("dynamic", "longrope"):
            return False
    kinds = sorted(set(getattr(config, "layer_types", None) or ())) or [None]
    size = CacheShape.of(model).size
    return all(_rotates(owner.rotary_emb, module, kind, size) for module in modules for kind in kinds)


@torch.no_grad()
def _rotates(rotary: nn.Module, module: Any, kind: str | None, size: int) -> bool:
    """Compare `module.apply_rotary_pos_emb` with the operator's definition on random queries."""
    positions = torch.tensor([[0, 1, 5, 11]])
    q = torch.randn(1, 2, 4, size, generator=torch.Generator().manual_seed(0))
    extra = {"layer_type": kind} if "layer_type" in inspect.signature(rotary.forward).parameters else {}
    try:
        cos, sin = rotary(q, positions, **extra)
        got, _ = getattr(module, _APPLY)(q, q, cos, sin)
    except TypeError:  # functions of another signature
        return False
    half = cos.shape[-1] // 2
    first, second, rest = q.split([half, half, size - 2 * half], dim=-1)
    c, s = cos[:, None, :, :half], sin[:, None, :, :half]
    want = torch.cat([first * c - second * s, second * c + first * s, rest], dim=-1)
    return got.shape == want.shape and torch.allclose(got, want, atol=1e-5)
