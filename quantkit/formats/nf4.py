"""bitsandbytes' serialized 4-bit layout: NF4 and FP4, with or without double quantization.

Tensors beside the module's name, for a weight `[N, K]` with `n = N*K` and `b = ceil(n / block_size)`:

    weight                                   uint8 [ceil(n/2), 1]: two codes a byte, first in the high nibble
    weight.absmax                            float32 [b], or uint8 [b] under double quantization
    weight.quant_map                         float32 [16]
    weight.nested_absmax                     float32 [ceil(b/256)]  (double quantization only)
    weight.nested_quant_map                  float32 [256]          (double quantization only)
    weight.quant_state.bitsandbytes__nf4     uint8, a JSON object as bytes: quant_type, blocksize, dtype,
                                             shape, and nested_blocksize, nested_dtype, nested_offset

Blocks run over the flattened weight and may cross rows, so every shape can be stored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from quantkit import bitpack
from quantkit.algorithms import codebook
from quantkit.encoding import Codebook, PackedWeight
from quantkit.errors import CheckpointError, ConfigError, NumericsError
from quantkit.formats import checks
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

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_STATE = "weight.quant_state.bitsandbytes__"
_STATE_LIMIT = 4096  # bytes of JSON; the owner writes about 170
_STORAGE = (torch.uint8, torch.float32, torch.float16, torch.bfloat16)


class NF4Config(FormatConfig):
    """Options of `--format nf4`."""

    quant_type: Literal["nf4", "fp4"] = "nf4"
    block_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = 64
    double_quant: bool = True
    #: dtype recorded in the files, to which loaders round the dequantized weight; "auto": the source's.
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    #: Search each block's absmax for the smallest squared error instead of taking the plain maximum.
    scale_search: bool = False


@dataclass(frozen=True)
class NF4Weight(PackedWeight):
    """A `PackedWeight` that remembers what the file holds besides decoded scales, so that reading and
    writing again gives the same bytes."""

    nested: codebook.NestedScale | None = None
    weight_dtype: str | None = None
    quant_type: str = "nf4"


class NF4(Format):
    """bitsandbytes 4 bit. Default options give bitsandbytes' own bytes (see docs/formats/nf4.md)."""

    name: ClassVar[str] = "nf4"
    quant_method: ClassVar[str] = "bitsandbytes"
    summary: ClassVar[str] = "4-bit normal-float codebook in blocks of 64; no calibration"
    experts_note: ClassVar[str] = (
        "transformers 5 keeps experts fused and does not read 4-bit ones; quantkit does"
    )
    loaders: ClassVar[tuple[str, ...]] = ("transformers + bitsandbytes",)
    markers: ClassVar[tuple[str, ...]] = (_STATE + "nf4", _STATE + "fp4")
    suffixes: ClassVar[tuple[str, ...]] = (
        "weight",
        "weight.absmax",
        "weight.quant_map",
        "weight.nested_absmax",
        "weight.nested_quant_map",
        "weight.quant_state.*",
    )
    Config: ClassVar[type[FormatConfig]] = NF4Config

    def needs(self, config: NF4Config) -> Needs:
        return Needs.NONE

    def fit(self, shape: tuple[int, int], config: NF4Config) -> Fit:
        if shape[0] * shape[1] == 0:
            return Fit(None, "the weight is empty")
        return Fit(config)

    def check_overrides(self, config: NF4Config, override: NF4Config) -> str:
        return ""  # every layer carries its own quant_state

    def quantize(self, weight: Tensor, config: NF4Config, stats: LayerStats | None) -> PackedWeight:
        """Codes and scales for `weight` (float32 `[N, K]`).

        Without `scale_search`: bitsandbytes' choice. With it, each block's scale is searched, and
        codes are chosen for the scales as stored, i.e. after double quantization.
        """
        n, k = weight.shape
        flat = weight.to(torch.float32).reshape(-1)
        lut = codebook.table(config.quant_type, weight.device)
        scale = codebook.block_absmax(flat, config.block_size)
        if not bool(torch.isfinite(scale).all()):
            raise NumericsError("the weight holds NaN or Inf")
        if config.scale_search:
            scale = codebook.search_absmax(flat, scale, lut, config.block_size)
        nested = codebook.nest(scale) if config.double_quant else None
        stored = scale if nested is None else nested.decode()
        if config.scale_search:
            codes = codebook.encode_for_scales(flat, stored, lut, config.block_size)
        else:
            codes = codebook.encode(flat, scale, lut, config.block_size)
        if nested is not None:
            _remark_on_nesting(scale, stored)
        if codes.numel() % 2:  # the owner pads with a scaled weight of 0
            codes = torch.cat([codes, codebook.nearest(flat.new_zeros(1), lut)])
        return NF4Weight(
            Codebook(4, config.block_size),
            (n, k),
            bitpack.pack_nibbles_high_first(codes),
            stored,
            lut=lut,
            nested=nested,
            weight_dtype=None,
            quant_type=config.quant_type,
        )

    def checkpoint_spec(self, shape: tuple[int, int], config: NF4Config) -> dict[str, TensorSpec]:
        count = shape[0] * shape[1]
        blocks = math.ceil(count / config.block_size)
        spec = {
            "weight": TensorSpec(torch.uint8, (math.ceil(count / 2), 1)),
            "weight.absmax": TensorSpec(torch.uint8 if config.double_quant else torch.float32, (blocks,)),
            "weight.quant_map": TensorSpec(torch.float32, (16,)),
            _STATE + config.quant_type: TensorSpec(torch.uint8, (170 if config.double_quant else 90,)),
        }
        if config.double_quant:
            outer = math.ceil(blocks / codebook.NESTED_BLOCK)
            spec["weight.nested_absmax"] = TensorSpec(torch.float32, (outer,))
            spec["weight.nested_quant_map"] = TensorSpec(torch.float32, (256,))
        return spec

    def to_checkpoint(self, packed: PackedWeight, config: NF4Config) -> dict[str, Tensor]:
        """The file's tensors. A plain `PackedWeight` gets `config`'s double quantization here; one that
        `quantize` or `from_checkpoint` returned keeps its own."""
        assert isinstance(packed.encoding, Codebook) and packed.lut is not None
        own = packed if isinstance(packed, NF4Weight) else None
        quant_type = own.quant_type if own else config.quant_type
        nested = own.nested if own else None
        if nested is None and config.double_quant:
            nested = codebook.nest(packed.scale)
        dtype = own.weight_dtype if own else None
        dtype = dtype or checks.dtype_name(checks.resolve_dtype(config.compute_dtype))
        state: dict[str, Any] = {
            "quant_type": quant_type,
            "blocksize": packed.encoding.block_size,
            "dtype": dtype,
            "shape": list(packed.shape),
        }
        tensors = {
            "weight": packed.codes.view(-1, 1),
            "weight.absmax": packed.scale if nested is None else nested.codes,
            "weight.quant_map": packed.lut,
        }
        if nested is not None:
            tensors["weight.nested_absmax"] = nested.absmax
            tensors["weight.nested_quant_map"] = nested.lut
            state["nested_blocksize"] = nested.block_size
            state["nested_dtype"] = "float32"
            state["nested_offset"] = nested.offset
        text = bytearray(json.dumps(state).encode())
        tensors[_STATE + quant_type] = torch.frombuffer(text, dtype=torch.uint8)
        return {suffix: t.detach().cpu().contiguous() for suffix, t in tensors.items()}

    def from_checkpoint(
        self, tensors: Mapping[str, Tensor], config: NF4Config, shape: tuple[int, int]
    ) -> PackedWeight:
        """Block size, type and nesting come from the layer's own quant_state, not from `config`."""
        present = [t for t in ("nf4", "fp4") if _STATE + t in tensors]
        if len(present) != 1:
            raise CheckpointError(f"{_STATE}nf4 or ...fp4: exactly one must be present, found {len(present)}")
        quant_type = present[0]
        suffix = _STATE + quant_type
        state = _parse_state(checks.need(tensors, suffix, torch.uint8), suffix)
        if state.get("quant_type") != quant_type:
            raise CheckpointError(f"{suffix}: quant_type is {state.get('quant_type')!r}")
        block_size = state.get("blocksize")
        if type(block_size) is not int or block_size not in BLOCK_SIZES:
            raise CheckpointError(f"{suffix}: blocksize is {block_size!r}", hint=f"Known: {BLOCK_SIZES}.")
        if state.get("dtype") not in checks.FLOAT_DTYPES:
            raise CheckpointError(f"{suffix}: dtype is {state.get('dtype')!r}")
        if state.get("shape") != list(shape):
            raise CheckpointError(f"{suffix}: shape is {state.get('shape')!r}, the model wants {list(shape)}")

        count = shape[0] * shape[1]
        blocks = math.ceil(count / block_size)
        # bnb_4bit_quant_storage may view the bytes as a wider dtype, rounded down to whole elements.
        raw = checks.need(tensors, "weight", _STORAGE)
        wanted = (count + 1) // (raw.dtype.itemsize * 2)
        whole = wanted * raw.dtype.itemsize == math.ceil(count / 2)
        if tuple(raw.shape) not in ((wanted, 1), (1, wanted)) or not whole:
            raise CheckpointError(f"weight has shape {list(raw.shape)}, expected [{wanted}, 1]")
        codes = raw.contiguous().view(-1).view(torch.uint8)
        lut = codebook.table(quant_type)
        quant_map = checks.need(tensors, "weight.quant_map", torch.float32, (16,))
        if not torch.allclose(quant_map, lut, rtol=0, atol=1e-3):
            raise CheckpointError(f"weight.quant_map is not the {quant_type} table")

        nested = None
        if "nested_offset" in state or "weight.nested_absmax" in tensors:
            nested = _read_nested(tensors, state, blocks, suffix)
            scale = nested.decode()
        else:
            kinds = (torch.float32, torch.float16, torch.bfloat16)
            scale = checks.need(tensors, "weight.absmax", kinds, (blocks,)).float()
        checks.need_finite(scale, "weight.absmax")
        return NF4Weight(
            Codebook(4, block_size),
            shape,
            codes,
            scale,
            lut=lut,
            nested=nested,
            weight_dtype=str(state["dtype"]),
            quant_type=quant_type,
        )

    def to_hf_config(self, layers: QuantizedLayers) -> dict[str, Any]:
        config: NF4Config = layers.config
        return {
            "_load_in_4bit": True,
            "_load_in_8bit": False,
            "bnb_4bit_compute_dtype": checks.dtype_name(checks.resolve_dtype(config.compute_dtype)),
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": config.quant_type,
            "bnb_4bit_use_double_quant": config.double_quant,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": checks.skip_list(layers),
            "llm_int8_threshold": 6.0,
            "load_in_4bit": True,
            "load_in_8bit": False,
            "quant_method": self.quant_method,
        }

    def from_hf_config(self, mapping: Mapping[str, Any]) -> ReadConfig:
        for key in ("load_in_8bit", "_load_in_8bit"):
            if mapping.get(key):
                raise ConfigError(
                    f"config.json: quantization_config.{key} is true",
                    hint="Only 4-bit bitsandbytes files can be read.",
                )
        if not (mapping.get("load_in_4bit") or mapping.get("_load_in_4bit")):
            raise ConfigError("config.json: quantization_config.load_in_4bit is not true")
        storage = mapping.get("bnb_4bit_quant_storage") or "uint8"
        known = [checks.dtype_name(d) for d in _STORAGE]
        if not isinstance(storage, str) or storage.removeprefix("torch.") not in known:
            raise ConfigError(
                f"config.json: quantization_config.bnb_4bit_quant_storage is {storage!r}",
                hint=f"Supported: {', '.join(known)}.",
            )
        return ReadConfig(
            NF4Config(
                quant_type=checks.config_value(mapping, "bnb_4bit_quant_type", ("nf4", "fp4"), "fp4"),
                double_quant=checks.config_value(mapping, "bnb_4bit_use_double_quant", (True, False), False),
                compute_dtype=checks.config_dtype(mapping, "bnb_4bit_compute_dtype", "float32"),  # type: ignore[arg-type]
            )
        )


def _parse_state(blob: Tensor, suffix: str) -> dict[str, Any]:
    if blob.dim() != 1 or not 2 <= blob.numel() <= _STATE_LIMIT:
        raise CheckpointError(f"{suffix} has shape {list(blob.shape)}, expected up to {_STATE_LIMIT} bytes")
    try:
        state = json.loads(bytes(blob.tolist()).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{suffix} is not JSON: {error}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{suffix} is not a JSON object")
    return state


def _read_nested(
    tensors: Mapping[str, Tensor], state: Mapping[str, Any], blocks: int, suffix: str
) -> codebook.NestedScale:
    codes = checks.need(tensors, "weight.absmax", torch.uint8, (blocks,))
    block = state.get("nested_blocksize")
    if type(block) is not int or not 1 <= block <= 1 << 20:
        raise CheckpointError(f"{suffix}: nested_blocksize is {block!r}")
    if state.get("nested_dtype") != "float32":
        raise CheckpointError(f"{suffix}: nested_dtype is {state.get('nested_dtype')!r}, expected 'float32'")
    offset = state.get("nested_offset")
    if (
        isinstance(offset, bool)
        or not isinstance(offset, int | float)
        or not abs(offset) <= torch.finfo(torch.float32).max
    ):
        raise CheckpointError(f"{suffix}: nested_offset is {offset!r}")
    absmax = checks.need(tensors, "weight.nested_absmax", torch.float32, (math.ceil(blocks / block),))
    lut = checks.need(tensors, "weight.nested_quant_map", torch.float32, (256,))
    checks.need_finite(absmax, "weight.nested_absmax")
    checks.need_finite(lut, "weight.nested_quant_map")
    return codebook.NestedScale(codes, absmax, float(offset), lut, block)


def _remark_on_nesting(scale: Tensor, stored: Tensor) -> None:
    """Say so when eight-bit scales distort blocks (an outlier stretches their common range)."""
    if not bool(torch.isfinite(stored).all()):
        raise NumericsError("the blocks' scales are too far apart for double quantization")
    off = int(((stored - scale).abs() > 0.25 * scale).sum())
    if off:
        note(f"double quantization distorts the scale of {off} of {scale.numel()} blocks by more than 25%")
