"""AWQ files in the "gemm" layout that AutoAWQ writes and transformers, vLLM and gptqmodel read.

    qweight  int32   [K, N/8]     8 output columns per word, nibble i holds column 8j + ORDER[i]
    qzeros   int32   [K/g, N/8]   the same order; w = (q - zero) * scale
    scales   float16 [K/g, N]

Facts and their sources: docs/formats/awq.md; why codes are chosen as they are: docs/adr/0020.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from quantkit import bitpack
from quantkit.algorithms.awq import quantize_awq
from quantkit.encoding import Affine, PackedWeight, affine_codes, pack_affine
from quantkit.errors import CheckpointError, ConfigError
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

#: Nibble i of a word holds column ORDER[i] of its eight.
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_INVERSE = tuple(ORDER.index(i) for i in range(8))
_PER_WORD = 8
_GROUPS = (32, 64, 128, -1)


class AWQConfig(FormatConfig):
    """Options of `quantkit convert --format awq`."""

    bits: Literal[4] = Field(default=4, description="bits per weight; this layout has 4 only")
    group_size: int = Field(
        default=128, description="inputs that share a scale: 32, 64, 128, or -1 for a whole row"
    )
    zero_point: bool = Field(default=True, description="asymmetric codes; without, every stored zero is 8")
    scale_steps: int = Field(default=20, ge=1, le=200, description="steps of the search for channel scales")
    feedback: bool = Field(
        default=True, description="choose codes by GPTQ on the scaled weights instead of rounding"
    )
    sweeps: int = Field(
        default=2, ge=0, le=50, description="with feedback: scale re-fits and passes over all codes"
    )


class AWQ(Format):
    """Activation-aware weight quantization, 4 bits."""

    name = "awq"
    quant_method = "awq"
    loaders = ("transformers (gptqmodel)", "vLLM", "AutoAWQ", "gptqmodel", "SGLang")
    markers = ("qweight",)
    suffixes = ("qweight", "qzeros", "scales")
    Config = AWQConfig
    summary: ClassVar[str] = "4-bit weights after activation-aware channel scaling (AutoAWQ's files)"
    supports_conv1d = False

    def needs(self, config: AWQConfig) -> Needs:
        """A decoder layer is rescaled as a whole before its weights are quantized."""
        return Needs.SMOOTHING

    def fit(self, shape: tuple[int, int], config: AWQConfig) -> Fit:
        """Eight columns share a word and groups are whole: other shapes stay as they are."""
        n, k = shape
        if config.group_size not in _GROUPS:
            return Fit(None, f"group_size {config.group_size} is not one of 32, 64, 128, -1")
        if n % _PER_WORD:
            return Fit(None, f"out_features {n} is not a multiple of {_PER_WORD}")
        if k % _group(config, k):
            return Fit(None, f"in_features {k} is not a multiple of the group size {config.group_size}")
        return Fit(config)

    def check_overrides(self, config: AWQConfig, override: AWQConfig) -> str:
        """One group size per file; how codes are searched may differ."""
        for key in ("bits", "group_size"):
            if getattr(config, key) != getattr(override, key):
                return f"AWQ files have one {key} for all layers (a layer can only be skipped)"
        return ""

    def quantize(self, weight: Tensor, config: AWQConfig, stats: LayerStats | None) -> PackedWeight:
        """Codes for a weight that has been smoothed already; `stats` are those of the smoothed input."""
        hessian = stats.hessian if stats is not None else None
        tokens = stats.tokens if stats is not None else 0
        result = quantize_awq(weight, hessian, tokens, config)
        for remark in result.remarks:
            note(remark)
        group = _group(config, weight.shape[1])
        scale = result.scale.to(torch.float16)
        return pack_affine(result.codes, scale, result.zero.to(torch.uint8), 4, group)

    def checkpoint_spec(self, shape: tuple[int, int], config: AWQConfig) -> dict[str, TensorSpec]:
        """See the module's docstring."""
        n, k = shape
        groups = k // _group(config, k)
        return {
            "qweight": TensorSpec(torch.int32, (k, n // _PER_WORD)),
            "qzeros": TensorSpec(torch.int32, (groups, n // _PER_WORD)),
            "scales": TensorSpec(torch.float16, (groups, n)),
        }

    def to_checkpoint(self, packed: PackedWeight, config: AWQConfig) -> dict[str, Tensor]:
        """`qweight`, `qzeros`, `scales` on the CPU."""
        k = packed.shape[1]
        enc = packed.encoding
        if not isinstance(enc, Affine) or enc.bits != 4 or enc.group_size != _group(config, k):
            raise ValueError(f"AWQ stores 4-bit codes in groups of {_group(config, k)}, not {enc}")
        if packed.perm is not None or packed.zero is None or packed.zero.is_floating_point():
            raise ValueError("AWQ stores integer zeros and columns in their own order")
        if packed.scale.dtype != torch.float16:
            raise ValueError(
                f"AWQ stores float16 scales, not {packed.scale.dtype}: round them before choosing codes"
            )
        return {
            "qweight": pack_words(affine_codes(packed).t()).cpu(),
            "qzeros": pack_words(packed.zero.t()).cpu(),
            "scales": packed.scale.t().contiguous().cpu(),
        }

    def from_checkpoint(
        self, tensors: Mapping[str, Tensor], config: AWQConfig, shape: tuple[int, int]
    ) -> PackedWeight:
        """The inverse of `to_checkpoint`, checking everything; scales may be float16, bfloat16 or float32."""
        n, k = shape
        group = _group(config, k)
        if n % _PER_WORD or group < 1 or k % group:
            raise CheckpointError(
                f"a {n} x {k} weight cannot be stored as AWQ with group size {config.group_size}"
            )
        spec = self.checkpoint_spec(shape, config)
        for name in self.suffixes:
            if name not in tensors:
                raise CheckpointError(
                    f"{name} is missing", hint="AWQ layers have qweight, qzeros and scales."
                )
            found = tensors[name]
            if tuple(found.shape) != spec[name].shape:
                raise CheckpointError(
                    f"{name} has shape {tuple(found.shape)}, expected {spec[name].shape}",
                    hint=f"The model wants a {n} x {k} weight; the config says group_size {config.group_size}.",
                )
        for name in ("qweight", "qzeros"):
            if tensors[name].dtype != torch.int32:
                raise CheckpointError(f"{name} has dtype {tensors[name].dtype}, expected torch.int32")
        scales = tensors["scales"]
        if scales.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise CheckpointError(f"scales has dtype {scales.dtype}, expected torch.float16")
        if not bool(torch.isfinite(scales).all()):
            raise CheckpointError("scales holds NaN or Inf")
        codes = unpack_words(tensors["qweight"]).t().contiguous()
        zero = unpack_words(tensors["qzeros"]).t().contiguous()
        return pack_affine(codes, scales.t().contiguous(), zero, 4, group)

    def to_hf_config(self, layers: QuantizedLayers) -> dict[str, Any]:
        """AutoAWQ's keys. `zero_point` is always true: zeros are stored and every loader reads them."""
        config: AWQConfig = layers.config
        skipped = not_converted(layers)
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": 4,
            "group_size": config.group_size,
            "zero_point": True,
            "modules_to_not_convert": skipped or None,
        }

    def from_hf_config(self, mapping: Mapping[str, Any]) -> ReadConfig:
        """Parse `quantization_config`; other versions than "gemm" are refused by name."""
        version = mapping.get("version", mapping.get("format", "gemm"))
        if not isinstance(version, str) or version.lower() != "gemm":
            raise ConfigError(
                f"quantization_config.version {version!r} is not supported",
                hint="quantkit reads AWQ's gemm layout only (not gemv, gemv_fast, marlin, exllama or llm-awq).",
            )
        if mapping.get("backend") == "llm-awq":
            raise ConfigError(
                "quantization_config.backend 'llm-awq' is not supported", hint="Its packing differs."
            )
        bits = _integer(mapping, ("bits", "w_bit"), 4)
        if bits != 4:
            raise ConfigError(
                f"quantization_config.bits {bits} is not supported", hint="AWQ's gemm layout has 4 bits."
            )
        group = _integer(mapping, ("group_size", "q_group_size"), 128)
        if group != -1 and group < 1:
            raise ConfigError(
                f"quantization_config.group_size {group} is not valid", hint="-1 or a positive number."
            )
        zero_point = mapping.get("zero_point", True)
        if not isinstance(zero_point, bool):
            raise ConfigError(f"quantization_config.zero_point {zero_point!r} is not a boolean")
        if mapping.get("desc_act"):
            raise ConfigError(
                "quantization_config.desc_act is not supported", hint="AWQ files have no g_idx."
            )
        names = mapping.get("modules_to_not_convert")
        if names is not None and not (isinstance(names, list) and all(isinstance(n, str) for n in names)):
            raise ConfigError("quantization_config.modules_to_not_convert is not a list of names")
        return ReadConfig(AWQConfig(group_size=group, zero_point=zero_point))


def _group(config: AWQConfig, in_features: int) -> int:
    return in_features if config.group_size == -1 else config.group_size


def _integer(mapping: Mapping[str, Any], keys: tuple[str, ...], default: int) -> int:
    for key in keys:
        if key in mapping:
            value = mapping[key]
            if isinstance(value, bool) or not isinstance(value, int):
                raise ConfigError(f"quantization_config.{key} {value!r} is not an integer")
            return value
    return default


def pack_words(codes: Tensor) -> Tensor:
    """Codes `[R, N]` (0..15) -> int32 `[R, N/8]` in AWQ's nibble order."""
    shuffled = codes.unflatten(-1, (-1, _PER_WORD))[..., list(ORDER)].flatten(-2)
    return bitpack.pack_low(shuffled, 4, word_bits=32)


def unpack_words(words: Tensor) -> Tensor:
    """int32 `[R, N/8]` -> uint8 codes `[R, N]` in natural order."""
    codes = bitpack.unpack_low(words, 4, words.shape[-1] * _PER_WORD)
    return codes.unflatten(-1, (-1, _PER_WORD))[..., list(_INVERSE)].flatten(-2).contiguous()


def not_converted(layers: QuantizedLayers) -> list[str]:
    """`modules_to_not_convert`: the shortest names that mean exactly the linears left alone.

    AutoAWQ and vLLM skip a module when an entry is a *substring* of its name (AutoAWQ: of the name
    within its decoder layer), transformers when it is a prefix or a suffix. So a kind of layer that is
    skipped everywhere is written without its layer number ("mlp.down_proj"), which all of them
    understand, unless that would match a quantized module; then full names are written. `lm_head` is
    left out: no loader converts it unless told to.
    """
    entries: list[str] = []
    for name in layers.skipped:
        leaf = name.rpartition(".")[2]
        if leaf in ("lm_head", "embed_out", "output_projection") or "." not in name:
            continue
        short = _within_layer(name)
        same = [n for n in layers.quantized if short in n]
        entry = name if same else short
        if entry not in entries:
            entries.append(entry)
    return entries


def _within_layer(name: str) -> str:
    """The part after the decoder layer's number, with all experts as one ("mlp.experts")."""
    match = re.search(r"\.\d+\.(.+)$", name)
    return match.group(1) if match else name
