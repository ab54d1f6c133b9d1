"""BitNet's packed ternary layout, as transformers' `bitnet` reads it.

    weight          uint8 [N/4, K]: byte r holds rows r, r + N/4, r + 2N/4, r + 3N/4 at bits 0, 2, 4, 6,
                    each as value + 1 (0, 1, 2; 3 is invalid)
    weight_scale    [1] in the model's dtype, with two opposite meanings:
                    autobitlinear (offline): y = (x_q T^T) * weight_scale, so mean|W| is stored
                    bitlinear:               y = (x_q T^T) / weight_scale, so 1/mean|W| is stored

Inputs are rounded to int8 per token (127 / absmax) by both classes. N must be a multiple of 4: both
classes allocate or expect exactly N/4 rows of bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from quantkit import bitpack
from quantkit.algorithms import ternary
from quantkit.encoding import Affine, PackedWeight, affine_codes, pack_affine
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
    merge_config,
    note,
)

_SCALES = (torch.float32, torch.bfloat16, torch.float16)


class TernaryConfig(FormatConfig):
    """Options of `--format ternary`."""

    #: What the codes and the scale minimise: the error of the layer's output (needs calibration), of
    #: its weight, or BitNet's own rule (right for models trained as BitNet, nothing else).
    fit: Literal["hessian", "weight", "absmean"] = "hessian"
    #: transformers' class for the layers; "auto": autobitlinear, or bitlinear where layers have biases,
    #: because transformers' AutoBitLinear multiplies the bias by the weight's scale.
    linear_class: Literal["auto", "autobitlinear", "bitlinear"] = "auto"
    #: Passes of coordinate descent over the codes (fit=hessian).
    sweeps: int = Field(default=4, ge=1, le=100)
    #: dtype of weight_scale; "auto": the source weight's.
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"


class Ternary(Format):
    """BitNet b1.58 files."""

    name: ClassVar[str] = "ternary"
    quant_method: ClassVar[str] = "bitnet"
    summary: ClassVar[str] = "2-bit storage of {-1, 0, 1} with one scale per weight, int8 inputs"
    experts_note: ClassVar[str] = (
        "transformers keeps experts fused and does not read packed ones; quantkit does"
    )
    loaders: ClassVar[tuple[str, ...]] = ("transformers",)
    supports_conv1d: ClassVar[bool] = False  # transformers replaces nn.Linear only
    markers: ClassVar[tuple[str, ...]] = ("weight_scale",)
    suffixes: ClassVar[tuple[str, ...]] = ("weight", "weight_scale")
    Config: ClassVar[type[FormatConfig]] = TernaryConfig

    def resolve(self, config: TernaryConfig, source_dtype: torch.dtype, biases: bool) -> TernaryConfig:
        if config.linear_class == "auto":
            config = merge_config(config, {"linear_class": "bitlinear" if biases else "autobitlinear"})
        return super().resolve(config, source_dtype, biases)

    def bias_factor(self, packed: PackedWeight, config: TernaryConfig) -> float:
        return float(packed.scale.flatten()[0]) if config.linear_class != "bitlinear" else 1.0

    def needs(self, config: TernaryConfig) -> Needs:
        return Needs.HESSIAN if config.fit == "hessian" else Needs.NONE

    def fit(self, shape: tuple[int, int], config: TernaryConfig) -> Fit:
        if shape[0] * shape[1] == 0:
            return Fit(None, "the weight is empty")
        if shape[0] % 4:
            return Fit(None, f"{shape[0]} output features are not a multiple of 4, which the packing needs")
        return Fit(config)

    def check_overrides(self, config: TernaryConfig, override: TernaryConfig) -> str:
        if config.linear_class != override.linear_class:
            return "one checkpoint has one linear_class"
        return ""

    def quantize(self, weight: Tensor, config: TernaryConfig, stats: LayerStats | None) -> PackedWeight:
        """Codes and one scale for `weight` (float32 `[N, K]`); the scale is what the file will hold."""
        weight = weight.to(torch.float32)
        if not bool(torch.isfinite(weight).all()):
            raise NumericsError("the weight holds NaN or Inf")
        if config.fit == "absmean":
            result = ternary.absmean(weight)
        elif config.fit == "weight":
            result = ternary.fit_weight(weight)
        else:
            stats = stats or LayerStats()

            def store(value: float) -> float:
                return _decode_scale(_encode_scale(value, config), config)

            result = ternary.fit_hessian(weight, stats.hessian, stats.tokens, config.sweeps, store)
        for remark in result.remarks:
            note(remark)
        _describe(weight, result, config)
        n, k = weight.shape
        scale = _decode_scale(_encode_scale(result.scale, config), config)
        if not 0.5 < scale / result.scale < 2:
            note(f"the scale {result.scale:.3g} does not fit {config.compute_dtype}: stored as {scale:.3g}")
        return _pack(result.codes, scale, (n, k))

    def checkpoint_spec(self, shape: tuple[int, int], config: TernaryConfig) -> dict[str, TensorSpec]:
        return {
            "weight": TensorSpec(torch.uint8, (shape[0] // 4, shape[1])),
            "weight_scale": TensorSpec(checks.resolve_dtype(config.compute_dtype), (1,)),
        }

    def to_checkpoint(self, packed: PackedWeight, config: TernaryConfig) -> dict[str, Tensor]:
        n, k = packed.shape
        if packed.encoding != Affine(2, k) or packed.zero is None or bool((packed.zero != 1).any()):
            raise ValueError("a BitNet file holds 2-bit codes with zero 1 and one group per row")
        scale = float(packed.scale[0, 0])
        if bool((packed.scale != scale).any()):
            raise ValueError("a BitNet file holds one scale for the whole weight")
        codes = affine_codes(packed)
        if bool((codes > 2).any()):
            raise ValueError("ternary codes are 0, 1 and 2")
        quarters = codes.view(4, n // 4, k).permute(1, 2, 0)
        return {
            "weight": bitpack.pack_low(quarters, 2).squeeze(-1).cpu().contiguous(),
            "weight_scale": _encode_scale(scale, config),
        }

    def from_checkpoint(
        self, tensors: Mapping[str, Tensor], config: TernaryConfig, shape: tuple[int, int]
    ) -> PackedWeight:
        n, k = shape
        if n % 4:
            raise CheckpointError(
                f"{n} output features are not a multiple of 4: no BitNet file can hold this"
            )
        weight = checks.need(tensors, "weight", torch.uint8, (n // 4, k))
        codes = bitpack.unpack_low(weight.unsqueeze(-1), 2, 4).permute(2, 0, 1).reshape(n, k)
        if bool((codes > 2).any()):
            raise CheckpointError("weight holds the code 3, which is not ternary")
        stored = checks.need(tensors, "weight_scale", _SCALES, [(1,), ()])
        checks.need_positive(stored, "weight_scale")
        scale = _decode_scale(stored, config)
        if not 0 < scale < float("inf"):
            raise CheckpointError(f"weight_scale {float(stored):.3g} has no finite reciprocal")
        return _pack(codes, scale, shape)

    def to_hf_config(self, layers: QuantizedLayers) -> dict[str, Any]:
        config: TernaryConfig = layers.config
        return {
            "linear_class": "autobitlinear" if config.linear_class == "auto" else config.linear_class,
            "modules_to_not_convert": checks.skip_list(layers),
            "quant_method": self.quant_method,
            "quantization_mode": "offline",
            "rms_norm_eps": 1e-06,
            "use_rms_norm": False,
        }

    def from_hf_config(self, mapping: Mapping[str, Any]) -> ReadConfig:
        """`linear_class` defaults to bitlinear, as in transformers (files from before the key existed)."""
        known = ("bitlinear", "autobitlinear")
        linear_class = checks.config_value(mapping, "linear_class", known, "bitlinear")
        if mapping.get("quantization_mode", "offline") != "offline":
            raise ConfigError(
                f"config.json: quantization_config.quantization_mode is {mapping['quantization_mode']!r}",
                hint="Only offline files are packed; online ones hold dense master weights.",
            )
        checks.config_value(mapping, "use_rms_norm", (False, None), False)
        return ReadConfig(TernaryConfig(linear_class=linear_class))


def _encode_scale(scale: float, config: TernaryConfig) -> Tensor:
    """`weight_scale` `[1]` for a multiplier, in the file's dtype, kept finite and above zero."""
    dtype = checks.resolve_dtype(config.compute_dtype)
    value = scale if config.linear_class != "bitlinear" else 1.0 / scale
    limits = torch.finfo(dtype)
    return torch.tensor([min(max(value, limits.tiny), limits.max)], dtype=torch.float64).to(dtype)


def _decode_scale(stored: Tensor, config: TernaryConfig) -> float:
    """The float32 multiplier that `weight_scale` means (rounded to float32)."""
    value = stored.double().reshape(1)
    multiplier = value if config.linear_class != "bitlinear" else 1.0 / value
    return float(multiplier.float())


def _pack(codes: Tensor, scale: float, shape: tuple[int, int]) -> PackedWeight:
    n, k = shape
    scales = torch.full((n, 1), scale, dtype=torch.float32, device=codes.device)
    zeros = torch.ones(n, 1, dtype=torch.uint8, device=codes.device)
    return pack_affine(codes, scales, zeros, 2, k, activation="int8_token")


def _describe(weight: Tensor, result: ternary.TernaryResult, config: TernaryConfig) -> None:
    """Remarks for the report: how well three values and one scale can do on this layer."""
    norm = float(weight.double().square().sum())
    error = float((weight.double() - (result.codes.double() - 1) * result.scale).square().sum())
    relative = (error / norm) ** 0.5 if norm > 0 else 0.0
    zeros = float((result.codes == 1).double().mean())
    text = f"relative weight error {relative:.2f}, {zeros:.0%} zeros"
    if config.fit != "absmean":
        metric = "output" if config.fit == "hessian" and not result.remarks else "weight"
        text += f", {metric} error (squared) {result.gain:.2f} of the absmean rule's"
    note(text)
