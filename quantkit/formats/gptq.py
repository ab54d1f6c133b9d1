"""GPTQ files: gptqmodel, AutoGPTQ, vLLM, SGLang and transformers read them.

A weight `W[N, K]` of `bits` bits, groups of `g` inputs, `G = ceil(K / g)`:

    qweight  int32 [K*bits/32, N]   codes along K, low bits first; 3 bits: one continuous stream
    qzeros   int32 [G, N*bits/32]   zeros along N, low bits first
    scales   fp16  [G, N]           w = (q - zero) * scale
    g_idx    int32 [K]              the group of each input; k // g unless written with act-order

`checkpoint_format: gptq` (v1) stores zero - 1 in qzeros, `gptq_v2` stores the zero itself. Loaders
undo v1 by adding 0x11111111 to whole words, so a v1 zero of 0 would borrow from its neighbour: it is
never written (asymmetric files are v2 unless v1 is asked for, and then zeros start at 1). Symmetric
files have the constant zero 2**(bits-1), which fast kernels take for granted without reading qzeros.

Facts and their sources: docs/formats/gptq.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from quantkit import bitpack
from quantkit.algorithms.gptq import GPTQOptions, gptq_quantize
from quantkit.algorithms.grid import AffineGrid, Search
from quantkit.algorithms.ordering import Ordering
from quantkit.encoding import Affine, PackedWeight, affine_codes, pack_affine
from quantkit.errors import CheckpointError, NumericsError
from quantkit.formats import gptq_config
from quantkit.formats.base import (
    Fit,
    Format,
    FormatConfig,
    LayerStats,
    Needs,
    QuantizedLayers,
    ReadConfig,
    TensorSpec,
    note,
)

GROUP_SIZES = (-1, 16, 32, 64, 128, 256, 512, 1024)  # what gptqmodel 7.7 accepts
_SMALLER_GROUPS = (128, 64, 32)  # what vLLM's and gptqmodel's GPU kernels accept beside -1
_SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class GPTQConfig(FormatConfig):
    """Options of the GPTQ format."""

    bits: Literal[2, 3, 4, 8] = Field(4, description="bits per code")
    group_size: int = Field(128, description="inputs that share a scale; -1 for the whole row")
    sym: bool = Field(True, description="constant zero in the middle of the codes (fastest kernels)")
    desc_act: bool = Field(False, description="act-order: columns by activation size; needs g_idx")
    group_aware: bool = Field(True, description="reorder columns within groups only; the file needs no g_idx")
    static_groups: bool = Field(False, description="choose all scales from the unquantized weight")
    checkpoint_format: Literal["gptq", "gptq_v2"] | None = Field(
        None, description="file revision; by default gptq (v1) when sym, else gptq_v2"
    )
    damp_percent: float = Field(0.05, gt=0, lt=1, description="damping, as a share of the mean diagonal")
    search: Search = Field("importance", description="how scales are chosen: minmax, mse or importance")
    signed_scale: bool = Field(True, description="symmetric scales may be negative where that fits")
    ragged: bool = Field(
        False,
        description="also shapes that end inside a word or a group: gptqmodel reads them, vLLM does not",
    )
    sweeps: int = Field(2, ge=0, le=100, description="passes of scale re-fit and code descent after GPTQ")

    @field_validator("group_size")
    @classmethod
    def _known_group_size(cls, value: int) -> int:
        if value not in GROUP_SIZES:
            raise ValueError(f"group_size must be one of {', '.join(map(str, GROUP_SIZES))}, not {value}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> GPTQConfig:
        if self.desc_act and self.static_groups:
            raise ValueError("static_groups already visits columns by activation size: leave desc_act off")
        return self

    @property
    def version(self) -> int:
        """1 or 2: the revision of the files that this configuration writes."""
        return {"gptq": 1, "gptq_v2": 2, None: 1 if self.sym else 2}[self.checkpoint_format]

    def group(self, in_features: int) -> int:
        """Inputs per group of a weight with `in_features` inputs."""
        return in_features if self.group_size == -1 else self.group_size


class GPTQ(Format):
    """GPTQ layout and quantization."""

    name: ClassVar[str] = "gptq"
    quant_method: ClassVar[str] = "gptq"
    loaders: ClassVar[tuple[str, ...]] = ("gptqmodel", "vLLM", "SGLang", "transformers")
    markers: ClassVar[tuple[str, ...]] = ("qweight",)
    suffixes: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "g_idx")
    Config: ClassVar[type[FormatConfig]] = GPTQConfig
    summary: ClassVar[str] = "2/3/4/8-bit integers in groups, calibrated with GPTQ"

    def readers(self, config: GPTQConfig) -> tuple[str, ...]:
        """vLLM 0.32 and SGLang's Marlin path take symmetric codes of 4 or 8 bits in the order of the inputs."""
        served = config.sym and config.bits in (4, 8) and not config.desc_act and not config.ragged
        return self.loaders if served else ("gptqmodel", "transformers")

    def needs(self, config: GPTQConfig) -> Needs:
        return Needs.HESSIAN

    def fit(self, shape: tuple[int, int], config: GPTQConfig) -> Fit:
        n, k = shape
        ragged = config.ragged and config.bits != 3  # gptqmodel packs 3 bits in whole words only
        for extent, what in ((k, "in_features"), (n, "out_features")):
            if extent * config.bits % 32 and not ragged:
                return Fit(None, f"{what} {extent} x {config.bits} bits does not fill whole 32-bit words")
        if config.group_size == -1 or k % config.group_size == 0 or config.ragged:
            return Fit(config)
        smaller = [g for g in _SMALLER_GROUPS if g < config.group_size and k % g == 0]
        chosen = smaller[0] if smaller else -1
        how = f"group_size {chosen}" if smaller else "one group per row (group_size -1)"
        return Fit(
            config.model_copy(update={"group_size": chosen}),
            f"in_features {k} is not a multiple of group_size {config.group_size}: {how}",
        )

    def check_overrides(self, config: GPTQConfig, override: GPTQConfig) -> str:
        if config.version != override.version:
            return (
                f"checkpoint_format holds for a whole checkpoint: the default writes v{config.version}, "
                f"this layer v{override.version}; set checkpoint_format to gptq_v2 for all"
            )
        return ""

    def quantize(self, weight: Tensor, config: GPTQConfig, stats: LayerStats | None) -> PackedWeight:
        group_size = config.group(weight.shape[1])
        grid = AffineGrid(
            config.bits,
            symmetric=config.sym,
            search=config.search,
            signed_scale=config.signed_scale and config.bits < 8,  # nothing to gain at 8 bits
            least_zero=1 if config.version == 1 else 0,
        )
        ordering: Ordering = "groups" if config.group_aware else "natural"
        if config.desc_act or config.static_groups:
            ordering = "activation"
        options = GPTQOptions(
            group_size=group_size,
            ordering=ordering,
            static_groups=config.static_groups,
            damp=config.damp_percent,
            sweeps=config.sweeps,
        )
        hessian, tokens = (None, 0) if stats is None else (stats.hessian, stats.tokens)
        result = gptq_quantize(weight, hessian, tokens, options, grid)
        for remark in result.remarks:
            note(remark)
        assert result.zero is not None
        scale, zero = result.scale.to(torch.float16), result.zero.to(torch.uint8)
        return pack_affine(result.codes, scale, zero, config.bits, group_size, perm=result.perm)

    def checkpoint_spec(self, shape: tuple[int, int], config: GPTQConfig) -> dict[str, TensorSpec]:
        n, k = shape
        groups = math.ceil(k / config.group(k))
        return {
            "qweight": TensorSpec(torch.int32, (bitpack.packed_length(k, config.bits, 32), n)),
            "qzeros": TensorSpec(torch.int32, (groups, bitpack.packed_length(n, config.bits, 32))),
            "scales": TensorSpec(torch.float16, (groups, n)),
            "g_idx": TensorSpec(torch.int32, (k,)),
        }

    def to_checkpoint(self, packed: PackedWeight, config: GPTQConfig) -> dict[str, Tensor]:
        packed = packed.to("cpu")
        assert isinstance(packed.encoding, Affine) and packed.zero is not None
        bits, k = packed.encoding.bits, packed.shape[1]
        codes = affine_codes(packed)
        g_idx = torch.arange(k) // packed.encoding.group_size
        if packed.perm is not None:
            perm = packed.perm.long()
            codes = torch.empty_like(codes).index_copy_(1, perm, codes)
            g_idx = torch.empty_like(g_idx).index_copy_(0, perm, g_idx)
        zero = packed.zero.to(torch.int16).t()
        if config.version == 1:
            if bool((zero == 0).any()):
                hint = "Use checkpoint_format gptq_v2."
                raise NumericsError("a zero of 0 cannot be stored in a GPTQ v1 file", hint=hint)
            zero = zero - 1
        scales = packed.scale.to(torch.float16).t().contiguous()
        if not bool(torch.isfinite(scales).all()):
            raise NumericsError("a scale does not fit float16")
        return {
            "qweight": bitpack.pack_low(codes, bits, 32).t().contiguous(),
            "qzeros": bitpack.pack_low(zero.to(torch.uint8), bits, 32),
            "scales": scales,
            "g_idx": g_idx.to(torch.int32),
        }

    def from_checkpoint(
        self, tensors: Mapping[str, Tensor], config: GPTQConfig, shape: tuple[int, int]
    ) -> PackedWeight:
        n, k = shape
        bits, group_size = config.bits, config.group(k)
        groups = math.ceil(k / group_size)
        qweight = _take(tensors, "qweight", (torch.int32,), (bitpack.packed_length(k, bits, 32), n))
        qzeros = _take(tensors, "qzeros", (torch.int32,), (groups, bitpack.packed_length(n, bits, 32)))
        scales = _take(tensors, "scales", _SCALE_DTYPES, (groups, n))
        if not bool(torch.isfinite(scales).all()):
            raise CheckpointError("scales holds NaN or infinite values")
        perm = _read_g_idx(tensors.get("g_idx"), k, group_size)
        codes = bitpack.unpack_low(qweight.t().contiguous(), bits, k)
        zero = _read_zeros(qzeros, bits, n, config.version)
        if perm is not None:
            codes = codes[:, perm]
        return pack_affine(codes, scales.t().contiguous(), zero.t().contiguous(), bits, group_size, perm=perm)

    def to_hf_config(self, layers: QuantizedLayers) -> dict[str, Any]:
        return gptq_config.to_hf_config(layers)

    def from_hf_config(self, mapping: Mapping[str, Any]) -> ReadConfig:
        return gptq_config.from_hf_config(mapping, GPTQConfig)

    def extra_files(self, layers: QuantizedLayers) -> dict[str, dict[str, Any]]:
        config = gptq_config.to_hf_config(layers)
        return {"quantize_config.json": config}


def _take(
    tensors: Mapping[str, Tensor], name: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]
) -> Tensor:
    if name not in tensors:
        raise CheckpointError(f"{name} is missing")
    tensor = tensors[name]
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(d)[6:] for d in dtypes)
        raise CheckpointError(f"{name} has dtype {str(tensor.dtype)[6:]}, expected {expected}")
    if tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"{name} has shape {list(tensor.shape)}, expected {list(shape)}",
            hint="Do bits and group_size in quantization_config match this file?",
        )
    return tensor


def _read_zeros(qzeros: Tensor, bits: int, n: int, version: int) -> Tensor:
    """uint8 `[G, N]`. v1: what was stored, plus one, the way its writers wrap.

    At 2, 4 and 8 bits gptqmodel adds one to every field of a 32-bit word at once, carries included;
    that undoes exactly what its writer did, also for zeros of 0. At 3 bits it wraps in each field.
    """
    if version == 2:
        return bitpack.unpack_low(qzeros, bits, n)
    if bits == 3:
        return (bitpack.unpack_low(qzeros, bits, n) + 1) & 7
    ones = sum(1 << position for position in range(0, 32, bits))
    words = (qzeros.to(torch.int64) + ones) & 0xFFFFFFFF
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    return bitpack.unpack_low(words, bits, n)


def _read_g_idx(g_idx: Tensor | None, k: int, group_size: int) -> Tensor | None:
    """`perm` (int64 `[K]`), or None when inputs are already in group order (or `g_idx` is absent)."""
    if g_idx is None or g_idx.numel() == 0:
        return None
    if g_idx.dtype not in (torch.int32, torch.int64):
        raise CheckpointError(f"g_idx has dtype {str(g_idx.dtype)[6:]}, expected int32")
    if tuple(g_idx.shape) != (k,):
        raise CheckpointError(f"g_idx has shape {list(g_idx.shape)}, expected [{k}]")
    group = g_idx.long()
    expected = torch.arange(k, device=group.device) // group_size
    if torch.equal(group, expected):
        return None
    groups = math.ceil(k / group_size)
    low, high = int(group.min()), int(group.max())
    if low < 0 or high >= groups:
        raise CheckpointError(f"g_idx holds {low if low < 0 else high}, outside the layer's {groups} groups")
    if not torch.equal(torch.bincount(group, minlength=groups), torch.bincount(expected, minlength=groups)):
        raise CheckpointError(f"g_idx does not give every group {group_size} inputs")
    return torch.argsort(group, stable=True)
