"""e4m3 weights in two layouts: transformers' fine-grained `fp8`, and compressed-tensors' `float-quantized`.

    transformers          weight e4m3 [N, K]; weight_scale_inv float32 [ceil(N/128), ceil(K/128)] (scalar
                          without blocks); activation_scale float32 scalar when inputs are static
    compressed-tensors    weight e4m3 [N, K]; weight_scale in the model's dtype, [ceil(N/128), ceil(K/128)],
                          [N, 1] (channel) or [1] (tensor); input_scale [1] when inputs are static

In both, dequantized = weight * scale. This file writes both and reads the first; files of the second
are read by `quantkit.formats.compressed_tensors`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from quantkit.algorithms import float8
from quantkit.encoding import E4M3_MAX, Activation, Float8, PackedWeight
from quantkit.errors import CalibrationError, CheckpointError, ConfigError, NumericsError
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

_SCALES = (torch.float32, torch.bfloat16, torch.float16)


class FP8Config(FormatConfig):
    """Options of `--format fp8`."""

    scheme: Literal["block", "channel", "tensor"] = "block"
    layout: Literal["transformers", "compressed-tensors"] = "transformers"
    activation: Literal["dynamic", "static", "none"] = "dynamic"
    block_rows: int = Field(default=128, ge=1)
    block_cols: int = Field(default=128, ge=1)
    #: What to do with a weight whose last tiles would be cut off in a way that some loader misreads.
    partial_blocks: Literal["skip", "write"] = "skip"
    #: compressed-tensors stores scales in the model's dtype; "auto": the source's.
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    #: Search each scale for the smallest squared error instead of taking absmax / 448.
    scale_search: bool = False

    @model_validator(mode="after")
    def _possible(self) -> FP8Config:
        if self.layout == "transformers" and self.scheme == "channel":
            raise ValueError("scheme channel needs layout compressed-tensors")
        if self.layout == "transformers" and self.activation == "none":
            raise ValueError("activation none needs layout compressed-tensors")
        if self.layout == "compressed-tensors" and self.scheme == "block" and self.activation == "static":
            raise ValueError("static activations need scheme channel or tensor in compressed-tensors")
        return self


def block_of(config: FP8Config, shape: tuple[int, int]) -> tuple[int, int]:
    """Extent of one scale's tile for a weight of `shape`."""
    if config.scheme == "block":
        return config.block_rows, config.block_cols
    return (1, shape[1]) if config.scheme == "channel" else shape


class FP8(Format):
    """e4m3 weights, calibration-free unless activations are static."""

    name: ClassVar[str] = "fp8"
    quant_method: ClassVar[str] = "fp8"
    summary: ClassVar[str] = "8-bit float (e4m3) with 128x128, channel or tensor scales"
    loaders: ClassVar[tuple[str, ...]] = ("transformers", "vLLM", "SGLang")
    supports_conv1d: ClassVar[bool] = False  # both loaders replace nn.Linear only
    markers: ClassVar[tuple[str, ...]] = ("weight_scale_inv",)
    suffixes: ClassVar[tuple[str, ...]] = ("weight", "weight_scale_inv", "activation_scale")
    Config: ClassVar[type[FormatConfig]] = FP8Config

    def readers(self, config: FP8Config) -> tuple[str, ...]:
        """vLLM and SGLang take transformers' files in blocks only (`weight_scale_inv` of a grid)."""
        if config.layout == "compressed-tensors":
            return ("vLLM", "SGLang", "transformers + compressed-tensors")
        return self.loaders if config.scheme == "block" else ("transformers",)

    def needs(self, config: FP8Config) -> Needs:
        return Needs.HESSIAN if config.activation == "static" else Needs.NONE  # LayerStats.abs_max

    def fit(self, shape: tuple[int, int], config: FP8Config) -> Fit:
        """Blocks that a loader would misread are left dense unless `partial_blocks` is "write".

        transformers (dequantizing, as on a CPU) infers the tile from the *grid*: 200 rows in 2 tiles are
        read as 2 x 100. A dimension is safe when it is a multiple of the block or fits one block.
        """
        if shape[0] * shape[1] == 0:
            return Fit(None, "the weight is empty")
        if config.scheme != "block":
            return Fit(config)
        odd = []
        if config.layout == "transformers" and shape[0] % config.block_rows and shape[0] > config.block_rows:
            odd.append(f"{shape[0]} rows")
        if shape[1] % config.block_cols and shape[1] > config.block_cols:
            odd.append(f"{shape[1]} columns")
        if not odd:
            return Fit(config)
        where = f"{' and '.join(odd)} are not a multiple of the {config.block_rows}x{config.block_cols} block"
        reader = "transformers on a CPU" if config.layout == "transformers" else "vLLM"
        if config.partial_blocks == "skip":
            return Fit(None, f"{where}, which {reader} cannot read (partial_blocks=write stores it anyway)")
        return Fit(config, f"{where}: partial blocks written, {reader} cannot read them")

    def check_overrides(self, config: FP8Config, override: FP8Config) -> str:
        if override.layout != config.layout:
            return "one checkpoint has one layout"
        if config.layout == "compressed-tensors":
            return ""
        for key in ("scheme", "activation", "block_rows", "block_cols"):
            if getattr(config, key) != getattr(override, key):
                return f"transformers' fp8 has one {key} for all layers"
        return ""

    def quantize(self, weight: Tensor, config: FP8Config, stats: LayerStats | None) -> PackedWeight:
        """Codes and scales for `weight` (float32 `[N, K]`); defaults reproduce the layout's owner."""
        n, k = weight.shape
        block = block_of(config, (n, k))
        weight = weight.to(torch.float32)
        dtype = _scale_dtype(config)
        in_dtype = weight.to(dtype)
        if config.layout == "transformers":
            codes, scale = float8.quantize_float32(weight, block)
        elif torch.equal(in_dtype.float(), weight):
            codes, scale = float8.quantize_in_dtype(weight, block, dtype)
        else:  # the weight is not of the model's dtype: no owner to match, so the better arithmetic
            limit = torch.finfo(dtype).max
            absmax = float8.tile_absmax(weight, block)
            scale = float8.absmax_scale(absmax).clamp(max=limit).to(dtype)
            scale = torch.where(scale == 0, torch.finfo(dtype).eps, scale).to(dtype)
            if bool((absmax / E4M3_MAX > limit).any()):
                note(f"weights above {limit * E4M3_MAX:.3g} are clipped: their scale does not fit {dtype}")
            codes = float8.quantize_given_scale(weight, scale, block)
        if not bool(torch.isfinite(scale).all()):
            raise NumericsError("the weight holds NaN or Inf")
        if config.scale_search:
            scale = float8.search_scale(weight, scale, block)
            codes = float8.quantize_given_scale(weight, scale, block)
        return PackedWeight(
            Float8(block),
            (n, k),
            codes,
            scale.float(),
            activation=_activation(config),
            input_scale=_input_scale(config, stats, dtype, weight.device),
        )

    def checkpoint_spec(self, shape: tuple[int, int], config: FP8Config) -> dict[str, TensorSpec]:
        grid: tuple[int, ...] = float8.tile_grid(shape, block_of(config, shape))
        spec = {"weight": TensorSpec(torch.float8_e4m3fn, shape)}
        if config.layout == "transformers":
            spec["weight_scale_inv"] = TensorSpec(torch.float32, () if config.scheme == "tensor" else grid)
            if config.activation == "static":
                spec["activation_scale"] = TensorSpec(torch.float32, ())
        else:
            dtype = _scale_dtype(config)
            spec["weight_scale"] = TensorSpec(dtype, (1,) if config.scheme == "tensor" else grid)
            if config.activation == "static":
                spec["input_scale"] = TensorSpec(dtype, (1,))
        return spec

    def to_checkpoint(self, packed: PackedWeight, config: FP8Config) -> dict[str, Tensor]:
        spec = self.checkpoint_spec(packed.shape, config)
        tensors = {"weight": packed.codes.view(torch.float8_e4m3fn)}
        tensors["weight_scale_inv" if "weight_scale_inv" in spec else "weight_scale"] = packed.scale
        if packed.input_scale is not None:
            name = "activation_scale" if config.layout == "transformers" else "input_scale"
            tensors[name] = packed.input_scale
        result = {}
        for suffix, want in spec.items():
            if suffix not in tensors:
                raise CheckpointError(f"{suffix} is missing: quantized without static activations")
            result[suffix] = tensors[suffix].detach().cpu().to(want.dtype).reshape(want.shape).contiguous()
        return result

    def from_checkpoint(
        self, tensors: Mapping[str, Tensor], config: FP8Config, shape: tuple[int, int]
    ) -> PackedWeight:
        block = block_of(config, shape)
        grid = float8.tile_grid(shape, block)
        codes = read_e4m3(tensors, shape)
        shapes: list[tuple[int, ...]] = [grid] if config.scheme == "block" else [(), (1,), (1, 1)]
        ue8m0 = (torch.uint8, torch.float8_e8m0fnu)
        scale = checks.need(tensors, "weight_scale_inv", (*_SCALES, *ue8m0), shapes)
        if scale.dtype == torch.uint8:  # bytes of e8m0: powers of two, 255 is NaN
            scale = scale.contiguous().view(torch.float8_e8m0fnu)
        scale = checks.need_finite(scale.float(), "weight_scale_inv").reshape(grid)
        input_scale = None
        if config.activation == "static":
            input_scale = checks.need(tensors, "activation_scale", _SCALES, [(), (1,)]).float().reshape(1)
            checks.need_positive(input_scale, "activation_scale")
        return PackedWeight(
            Float8(block), shape, codes, scale, activation=_activation(config), input_scale=input_scale
        )

    def to_hf_config(self, layers: QuantizedLayers) -> dict[str, Any]:
        config: FP8Config = layers.config
        if config.layout == "compressed-tensors":
            from quantkit.formats.compressed_tensors import fp8_hf_config

            return fp8_hf_config(layers)
        return {
            "activation_scheme": config.activation,
            "dequantize": False,
            "modules_to_not_convert": checks.skip_list(layers),
            "quant_method": self.quant_method,
            "weight_block_size": [config.block_rows, config.block_cols] if config.scheme == "block" else None,
        }

    def from_hf_config(self, mapping: Mapping[str, Any]) -> ReadConfig:
        activation = mapping.get("activation_scheme", "dynamic")
        activation = activation.lower() if isinstance(activation, str) else activation
        known = ("dynamic", "static")
        checks.config_value({"activation_scheme": activation}, "activation_scheme", known, "dynamic")
        checks.config_value(mapping, "fmt", ("e4m3",), "e4m3")
        checks.config_value(mapping, "expert_dtype", ("fp8",), "fp8")
        checks.config_value(mapping, "scale_fmt", ("float", "ue8m0", None), "float")
        if mapping.get("modules_to_convert"):
            raise ConfigError(
                "config.json: quantization_config.modules_to_convert is set",
                hint="fp8 embeddings are not supported.",
            )
        size = mapping.get("weight_block_size", [128, 128])
        if size is None:
            return ReadConfig(FP8Config.model_validate({"scheme": "tensor", "activation": activation}))
        if not checks.two_positive(size):
            raise ConfigError(
                f"config.json: quantization_config.weight_block_size is {size!r}",
                hint="Expected two positive integers or null.",
            )
        options = {"activation": activation, "block_rows": size[0], "block_cols": size[1]}
        return ReadConfig(FP8Config.model_validate(options))


def read_e4m3(tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
    """uint8 `[N, K]`: the bytes of the tensor "weight", none of which may be NaN."""
    weight = checks.need(tensors, "weight", torch.float8_e4m3fn, shape)
    codes = weight.contiguous().view(torch.uint8)
    if bool(((codes & 0x7F) == 0x7F).any()):
        raise CheckpointError("weight holds NaN")
    return codes


def _scale_dtype(config: FP8Config) -> torch.dtype:
    if config.layout == "transformers":
        return torch.float32
    return checks.resolve_dtype(config.compute_dtype)


def _activation(config: FP8Config) -> Activation | None:
    if config.activation == "none":
        return None
    if config.activation == "static":
        return "fp8_static"
    if config.scheme == "block" and config.block_cols == 128:
        return "fp8_group128"
    return "fp8_token"


def _input_scale(
    config: FP8Config, stats: LayerStats | None, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """float32 `[1]`: largest input seen / 448, rounded to `dtype`."""
    if config.activation != "static":
        return None
    if stats is None or stats.abs_max is None:
        raise CalibrationError("static fp8 activations need the largest input", hint="Or use dynamic ones.")
    largest = stats.abs_max.max().float()
    if not bool(torch.isfinite(largest)):
        raise NumericsError("the calibration inputs hold NaN or Inf")
    if stats.tokens == 0 or float(largest) == 0.0:
        note("no calibration token reached this layer: input scale set to 1")
        return torch.ones(1, device=device)
    scale = float8.absmax_scale(largest.clamp(max=torch.finfo(dtype).max).to(dtype).view(1))
    return scale.float().to(device)
