"""HQQ checkpoints: options, the policy for odd shapes, config.json, and one layer's tensors in and out.

The layout itself is described and implemented in `hqq_tensors.py`, the solver in
`quantkit/algorithms/hqq.py`. Loaders take everything from a layer's own tensors:
`quantization_config` only says what was asked for. Facts with their sources: docs/formats/hqq.md.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, ValidationError, field_validator
from torch import Tensor

from quantkit.algorithms.hqq import fit_groups
from quantkit.encoding import Affine, PackedWeight, affine_codes
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
)
from quantkit.formats.hqq_tensors import (
    DTYPES,
    FLAGS,
    NBITS,
    PER_WORD,
    WORD,
    canonical,
    metadata,
    number,
    pack_rows,
    packs,
    read_bits,
    read_codes,
    read_scales,
)

AXIS_0 = "axis=0 shares a scale between output rows, which no kernel here reads; quantize with axis=1"

_MIN_SHARED = 4  # smallest gcd(g, K) with which groups may straddle rows: in memory they split into it


class HQQConfig(FormatConfig):
    """Options of `--format hqq`; bits per weight are `bits + 32 / group_size` (16-bit scale and zero)."""

    bits: Literal[8, 4, 3, 2, 1] = Field(4, description="bits per code")
    group_size: int = Field(64, ge=-1, description="weights per scale and zero; -1 for whole rows")
    axis: int = Field(1, description="1: groups run along the inputs (0 is not supported)")
    optimize: bool = Field(True, description="search scales and zeros; false keeps min and max")
    round_zero: bool = Field(False, description="integer zeros, for kernels that take no others")
    compute_dtype: Literal["auto", "float16", "bfloat16", "float32"] = Field(
        "auto", description="dtype of scale and zero (auto: float16, hqq's own default)"
    )
    unbiased: bool = Field(
        True, description="rescale groups to their weights' length: lower KL, higher error"
    )
    norm: float = Field(2.0, gt=0.0, le=2.0, description="p of the error |w - w'|^p; the paper uses 0.7")

    @field_validator("axis")
    @classmethod
    def _axis(cls, value: int) -> int:
        if value != 1:
            raise ValueError(AXIS_0 if value == 0 else f"axis must be 1, not {value}")
        return value

    @field_validator("group_size")
    @classmethod
    def _group(cls, value: int) -> int:
        if value == 0:
            raise ValueError("group_size must be positive, or -1 for whole rows")
        return value

    @property
    def dtype(self) -> torch.dtype:
        """What scale and zero are stored in."""
        return DTYPES["float16" if self.compute_dtype == "auto" else self.compute_dtype]


class HQQ(Format):
    """The format `hqq`."""

    name: ClassVar[str] = "hqq"
    quant_method: ClassVar[str] = "hqq"
    loaders: ClassVar[tuple[str, ...]] = (
        "hqq (HQQLinear)",
        "transformers 4.x with hqq, on a GPU",
    )
    markers: ClassVar[tuple[str, ...]] = ("W_q",)
    suffixes: ClassVar[tuple[str, ...]] = (
        *("W_q", "scale", "zero", "shape", "nbits", "group_size", "axis", "packing", "unpack_view_dtype"),
        *("compute_dtype", *FLAGS, "zero_scale", "scale_q", "zero_q"),
    )
    Config: ClassVar[type[FormatConfig]] = HQQConfig
    summary: ClassVar[str] = "half-quadratic quantization, 8 to 1 bits, no calibration"
    experts_note: ClassVar[str] = (
        "hqq and transformers 5 keep experts fused and do not read quantized ones; quantkit does"
    )
    supports_conv1d: ClassVar[bool] = False

    def needs(self, config: HQQConfig) -> Needs:
        """Nothing: the weight alone decides."""
        return Needs.NONE

    def fit(self, shape: tuple[int, int], config: HQQConfig) -> Fit:
        """Group size for an odd shape: the one asked for wherever hqq itself could pack it (groups
        may straddle rows when gcd(g, K) >= 4), else the largest divisor of K from 8 up to it, else the
        smallest divisor of K above it, up to 4 times as large; otherwise the layer stays as it is."""
        k = shape[1]
        asked = k if config.group_size == -1 else config.group_size

        def fitted(group: int, note: str = "") -> Fit:
            return Fit(config.model_copy(update={"group_size": group}), note)

        if k % asked == 0 and packs(shape, config.bits, asked):
            return fitted(asked)
        if math.gcd(asked, k) >= _MIN_SHARED and packs(shape, config.bits, asked):
            return fitted(asked, f"groups of {asked} straddle rows of {k} inputs, as in hqq")
        divisors = [d for d in range(8, min(k, 4 * asked) + 1) if k % d == 0 and packs(shape, config.bits, d)]
        smaller = [d for d in divisors if d <= asked]
        larger = [d for d in divisors if d > asked]
        per = 1 if config.bits == 3 else PER_WORD[config.bits]
        if not smaller and not larger:
            return Fit(
                None, f"no group size near {asked} cuts {shape[0]} x {k} into a multiple of {per} groups"
            )
        group = smaller[-1] if smaller else larger[0]
        reason = f"{k} inputs do not divide" if k % asked else f"groups must come in multiples of {per}"
        return fitted(group, f"group_size {group} instead of {asked}: {reason}")

    def _resolve(self, shape: tuple[int, int], config: HQQConfig) -> HQQConfig:
        fit = self.fit(shape, config)
        if fit.config is None:
            raise ValueError(f"hqq cannot store a weight of shape {shape}: {fit.note}")
        return fit.config  # type: ignore[no-any-return]

    def quantize(self, weight: Tensor, config: HQQConfig, stats: LayerStats | None) -> PackedWeight:
        """Solve all groups of `weight`; see `quantkit.algorithms.hqq`."""
        shape = (int(weight.shape[0]), int(weight.shape[1]))
        config = self._resolve(shape, config)
        fit = fit_groups(
            weight.reshape(-1, config.group_size),
            config.bits,
            optimize=config.optimize,
            round_zero=config.round_zero,
            dtype=config.dtype,
            norm=config.norm,
            unbiased=config.unbiased,
        )
        return canonical(fit.codes, fit.scale, fit.zero, shape, config.bits, config.group_size)

    def checkpoint_spec(self, shape: tuple[int, int], config: HQQConfig) -> dict[str, TensorSpec]:
        """Names, dtypes and shapes of `to_checkpoint`."""
        config = self._resolve(shape, config)
        rows = shape[0] * shape[1] // config.group_size
        spec = {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in _metadata(shape, config).items()}
        words = math.ceil(rows / PER_WORD[config.bits])
        spec["W_q"] = TensorSpec(WORD[config.bits], (words, config.group_size))
        spec["scale"] = spec["zero"] = TensorSpec(config.dtype, (rows, 1))
        return spec

    def to_checkpoint(self, packed: PackedWeight, config: HQQConfig) -> dict[str, Tensor]:
        """The layer's state dict as `HQQLinear.state_dict` encodes it, without the bias."""
        config = self._resolve(packed.shape, config)
        same_bits = isinstance(packed.encoding, Affine) and packed.encoding.bits == config.bits
        if not same_bits or packed.perm is not None:
            raise ValueError(f"hqq at {config.bits} bits cannot hold {packed.encoding} (perm: {packed.perm})")
        assert isinstance(packed.encoding, Affine) and packed.zero is not None
        group = config.group_size
        repeats, rest = divmod(group, packed.encoding.group_size)  # > 1 where groups straddle rows
        if rest:
            raise ValueError(f"groups of {packed.encoding.group_size} do not make up groups of {group}")
        tensors = _metadata(packed.shape, config)
        for name, values in (("scale", packed.scale), ("zero", packed.zero)):
            shared = values.reshape(-1, repeats)
            if not bool((shared == shared[:, :1]).all()):
                raise ValueError(f"{name} differs within a group of {group}")
            tensors[name] = shared[:, :1].to(config.dtype).cpu().contiguous()
        codes = affine_codes(packed).reshape(-1, group)
        tensors["W_q"] = pack_rows(codes, config.bits).cpu().contiguous()
        return tensors

    def to_hf_config(self, layers: QuantizedLayers) -> dict[str, Any]:
        """transformers' `HqqConfig`: one set of options, or one per linear tag ("mlp.down_proj").

        Where layers of one tag differ the commonest options stand for it; loaders take a layer's own
        from its tensors.
        """
        by_tag: dict[str, Counter[HQQConfig]] = {}
        for name, config in layers.quantized.items():
            by_tag.setdefault(linear_tag(name), Counter())[_comparable(config)] += 1
        common = {tag: counts.most_common(1)[0][0] for tag, counts in sorted(by_tag.items())}
        if len(set(common.values())) > 1:
            quant_config = {tag: _quant_params(config) for tag, config in common.items()}
        else:
            quant_config = _quant_params(next(iter(common.values()), layers.config))
        skip = {"lm_head"} | {_skip_name(name, layers.quantized) for name in layers.skipped}
        skip = {s for s in skip if s and not any(s in name for name in layers.quantized)}
        return {"quant_method": "hqq", "quant_config": quant_config, "skip_modules": sorted(skip)}

    def from_hf_config(self, mapping: Mapping[str, Any]) -> ReadConfig:
        """Default options and per-tag exceptions. They name what was asked for; tensors decide."""
        quant_config = mapping.get("quant_config")
        if not isinstance(quant_config, Mapping) or not quant_config:
            raise ConfigError("quantization_config.quant_config of an hqq checkpoint must be an object")
        if "weight_quant_params" in quant_config:
            return ReadConfig(_parse_params(quant_config, "quant_config"))
        overrides = []
        for tag, params in quant_config.items():
            # None: hqq left the layers of this tag alone. A tag with other parts matches no layer there.
            if params is not None and tag == linear_tag(tag):
                overrides.append((_tag_pattern(tag), _parse_params(params, f"quant_config[{tag!r}]")))
        if not overrides:
            raise ConfigError("quantization_config.quant_config quantizes no layer")
        return ReadConfig(overrides[0][1], tuple(overrides))

    def from_checkpoint(
        self, tensors: Mapping[str, Tensor], config: Any, shape: tuple[int, int]
    ) -> PackedWeight:
        """Read one layer; its own metadata tensors win over `config`, which fills in for absent ones."""
        meta = {name: number(tensors, name) for name in (*FLAGS, "nbits", "group_size", "axis")}
        for name in ("quant_scale", "quant_zero", "scale_q", "zero_q"):
            if meta.get(name, name in tensors):
                raise CheckpointError(f"{name}: quantized scales and zeros are not supported")
        if meta["axis"] == 0:
            raise CheckpointError(f"axis: {AXIS_0}")
        if meta["axis"] not in (None, 1.0):
            raise CheckpointError(f"axis: {meta['axis']:g} is not 1")
        if meta["channel_wise"] == 0:
            raise CheckpointError("channel_wise: one scale for the whole weight is not supported")
        n, k = shape
        stated = tensors.get("shape")
        if stated is not None and (tuple(stated.shape) != (2,) or stated.tolist() != [n, k]):
            found = stated.tolist() if stated.numel() == 2 else f"a tensor {list(stated.shape)}"
            raise CheckpointError(f"shape: expected [{n}, {k}], found {found}")
        bits, top = read_bits(tensors, meta["nbits"], config.bits)
        if (stored := meta["group_size"]) is not None:
            group = int(stored)
        else:
            group = k if config.group_size == -1 else config.group_size
        if group < 1 or not packs(shape, bits, group):
            raise CheckpointError(f"group_size: {group} does not fit a weight of {n} x {k} at {bits} bits")
        rows = n * k // group
        codes = read_codes(tensors, bits, top, group, rows, bool(meta["view_as_float"]))
        return canonical(codes, *read_scales(tensors, rows), shape, bits, group)


def _metadata(shape: tuple[int, int], config: HQQConfig) -> dict[str, Tensor]:
    return metadata(shape, config.bits, config.group_size, config.dtype, config.optimize, config.round_zero)


def linear_tag(name: str) -> str:
    """hqq's name for a kind of layer: "model.layers.3.mlp.down_proj" -> "mlp.down_proj"."""
    parts = [part for part in name.split(".") if part not in ("model", "layers")]
    return ".".join(part for part in parts if not part.isnumeric())


def _tag_pattern(tag: str) -> str:
    """Regular expression for the module names whose `linear_tag` is `tag` (matches in one way only)."""
    dropped = r"(?:(?:model|layers|[0-9]+)\.)*"
    return dropped + r"\.".join(dropped + re.escape(part) for part in tag.split("."))


def _skip_name(name: str, quantized: Mapping[str, Any]) -> str:
    """How to list a dense linear: by its last part where no quantized layer contains that (transformers
    looks for substrings, vLLM for whole parts), else in full."""
    leaf = name.rpartition(".")[2]
    return name if any(leaf in other for other in quantized) else leaf


def _comparable(config: HQQConfig) -> HQQConfig:
    """`config` without what `quant_config` does not hold."""
    return config.model_copy(update={"compute_dtype": "auto", "norm": 2.0, "unbiased": True})


def _quant_params(config: HQQConfig) -> dict[str, Any]:
    weight = {
        "nbits": config.bits,
        "channel_wise": True,
        "group_size": None if config.group_size == -1 else config.group_size,
        "optimize": config.optimize,
        "round_zero": config.round_zero,
        "axis": 1,
        "view_as_float": False,
    }
    nothing = {"scale_quant_params": None, "zero_quant_params": None, "offload_meta": False}
    return {"weight_quant_params": weight, **nothing}


def _parse_params(params: object, where: str) -> HQQConfig:
    """HQQConfig from hqq's `{"weight_quant_params": {...}}`."""
    weight = params.get("weight_quant_params") if isinstance(params, Mapping) else None
    if not isinstance(weight, Mapping):
        raise ConfigError(f"quantization_config.{where}.weight_quant_params must be an object")
    where = f"quantization_config.{where}.weight_quant_params"
    if weight.get("axis", 1) == 0:
        raise ConfigError(f"{where}.axis: {AXIS_0}")
    nbits, group = weight.get("nbits", 4), weight.get("group_size", 64)
    if not isinstance(nbits, int | float) or isinstance(nbits, bool) or float(nbits) not in NBITS:
        raise ConfigError(f"{where}.nbits: {nbits!r} is not supported")
    options = {
        "bits": NBITS[float(nbits)][0],
        "group_size": -1 if group is None else group,
        "axis": weight.get("axis", 1),
        "optimize": weight.get("optimize", True),
        "round_zero": weight.get("round_zero", False),
    }
    try:
        return HQQConfig.model_validate(options, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = {"bits": "nbits"}.get(str(first["loc"][0]), str(first["loc"][0]))
        raise ConfigError(f"{where}.{key}: {first['msg']}") from error
