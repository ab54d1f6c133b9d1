"""compressed-tensors (llm-compressor's layout): reads fp8 and packed integers, describes fp8 for writing.

    float-quantized    weight e4m3 [N, K]; weight_scale [1] (tensor), [N, 1] (channel) or a grid (block);
                       input_scale [1] when inputs are static
    pack-quantized     weight_packed int32 [N, ceil(K*bits/32)], low bits first along K; the code is
                       value + 2**(bits-1); weight_scale [N, G]; weight_shape int64 [2]; weight_zero_point
                       int32 [ceil(N*bits/32), G] when asymmetric, packed along N with the same offset;
                       weight_g_idx int32 [K] under act-order

`config_groups` map targets (module names, "re:" patterns, class names) to schemes; a name beats a pattern
and a pattern beats a class, as in the owner's `match_targets`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from quantkit import bitpack
from quantkit.algorithms import float8
from quantkit.encoding import Activation, Float8, PackedWeight, pack_affine
from quantkit.errors import CheckpointError, ConfigError
from quantkit.formats import checks
from quantkit.formats.base import FormatConfig, Layout, QuantizedLayers, ReadConfig
from quantkit.formats.fp8 import FP8Config, read_e4m3
from quantkit.formats.gptq_config import check_pattern

_SCALES = (torch.float32, torch.bfloat16, torch.float16)
_FORMATS = ("float-quantized", "naive-quantized", "pack-quantized", "dense")

#: Preset names that may stand for a group (`{"W4A16": ["Linear"]}`), as (weights, input_activations).
_FP8_INPUT = {"num_bits": 8, "type": "float", "symmetric": True}
_PRESETS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "FP8": (
        {"num_bits": 8, "type": "float", "strategy": "tensor"},
        {**_FP8_INPUT, "strategy": "tensor", "dynamic": False},
    ),
    "FP8_DYNAMIC": (
        {"num_bits": 8, "type": "float", "strategy": "channel"},
        {**_FP8_INPUT, "strategy": "token", "dynamic": True},
    ),
    "FP8_BLOCK": (
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]},
        {**_FP8_INPUT, "strategy": "group", "group_size": 128, "dynamic": True},
    ),
    "W4A16": ({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}, None),
    "W4A16_ASYM": (
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": False},
        None,
    ),
    "W8A16": ({"num_bits": 8, "type": "int", "strategy": "channel"}, None),
}


class CTScheme(FormatConfig):
    """How one config group stores its weights and wants its inputs."""

    kind: Literal["float", "int"]
    bits: int
    strategy: Literal["tensor", "channel", "group", "block"]
    group_size: int | None = None
    block: tuple[int, int] | None = None
    symmetric: bool = True
    activation: Literal["fp8_token", "fp8_static", "fp8_group128"] | None = None


class CompressedTensors(Layout):
    """The reading side of `quant_method: compressed-tensors`."""

    name: ClassVar[str] = "compressed-tensors"
    quant_method: ClassVar[str] = "compressed-tensors"
    loaders: ClassVar[tuple[str, ...]] = ("vLLM", "transformers + compressed-tensors")
    markers: ClassVar[tuple[str, ...]] = ("weight_scale", "weight_packed")
    suffixes: ClassVar[tuple[str, ...]] = (
        "weight",
        "weight_packed",
        "weight_scale",
        "weight_zero_point",
        "weight_shape",
        "weight_g_idx",
        "input_scale",
        "input_zero_point",
    )

    def from_hf_config(self, mapping: Mapping[str, Any]) -> ReadConfig:
        """Schemes by target, ordered as the owner resolves them: names, patterns, classes.

        `kv_cache_scheme` and the `ignore` list are not needed to read weights and are not interpreted.
        """
        checks.config_value(mapping, "format", (*_FORMATS, "mixed-precision"), "dense")
        for key in ("sparsity_config", "transform_config"):
            value = mapping.get(key)
            if value and not (isinstance(value, Mapping) and value.get("format", "") == "dense"):
                raise _refuse(key, value, "Sparse and rotated checkpoints are not supported")
        groups = mapping.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise _refuse("config_groups", groups, "Expected at least one group")
        by_target: dict[str, CTScheme] = {}
        for name, group in groups.items():
            scheme, targets = _read_group(str(name), group, mapping.get("format", "dense"))
            if scheme is not None:
                by_target.update(dict.fromkeys(targets, scheme))

        names = sorted(t for t in by_target if not t.startswith("re:") and not _is_class(t))
        patterns = sorted(t for t in by_target if t.startswith("re:"))
        classes = sorted(t for t in by_target if _is_class(t) and "Linear" in t)
        overrides = [(re.escape(t), by_target[t]) for t in names]
        overrides += [(f"(?:{t[3:]}).*", by_target[t]) for t in patterns]
        return ReadConfig(by_target[classes[0]] if classes else None, tuple(overrides))

    def from_checkpoint(
        self, tensors: Mapping[str, Tensor], config: CTScheme | None, shape: tuple[int, int]
    ) -> PackedWeight:
        if config is None:
            raise CheckpointError("quantized tensors, but no config_groups target names this module")
        if config.kind == "float":
            return _read_float(tensors, config, shape)
        return _read_packed(tensors, config, shape)


def _read_float(tensors: Mapping[str, Tensor], config: CTScheme, shape: tuple[int, int]) -> PackedWeight:
    n, k = shape
    if config.strategy == "block":
        assert config.block is not None
        block = config.block
        shapes: list[tuple[int, ...]] = [float8.tile_grid(shape, block)]
    elif config.strategy == "channel":
        block, shapes = (1, k), [(n, 1), (n,)]
    else:
        block, shapes = shape, [(1,), (), (1, 1)]
    codes = read_e4m3(tensors, shape)
    scale = checks.need_finite(checks.need(tensors, "weight_scale", _SCALES, shapes), "weight_scale")
    scale = scale.float().reshape(float8.tile_grid(shape, block))
    zero = tensors.get("weight_zero_point")
    if zero is not None and bool((zero.float() != 0).any()):
        raise CheckpointError("weight_zero_point of an fp8 weight is not zero")
    return PackedWeight(
        Float8(block),
        shape,
        codes,
        scale,
        activation=config.activation,
        input_scale=_read_input_scale(tensors, config.activation),
    )


def _read_packed(tensors: Mapping[str, Tensor], config: CTScheme, shape: tuple[int, int]) -> PackedWeight:
    n, k = shape
    bits = config.bits
    group = config.group_size if config.strategy == "group" and config.group_size else k
    groups = -(-k // group)
    recorded = checks.need(tensors, "weight_shape", (torch.int64, torch.int32), (2,))
    if recorded.tolist() != [n, k]:
        raise CheckpointError(f"weight_shape is {recorded.tolist()}, the model wants {[n, k]}")
    words = checks.need(tensors, "weight_packed", torch.int32, (n, bitpack.packed_length(k, bits, 32)))
    codes = bitpack.unpack_low(words, bits, k)
    shapes: list[tuple[int, ...]] = [(n, groups)]
    if config.strategy == "tensor":
        shapes = [(1,), (), (1, 1)]
    elif config.strategy == "channel":
        shapes.append((n,))
    scale = checks.need_finite(checks.need(tensors, "weight_scale", _SCALES, shapes), "weight_scale")
    scale = scale.expand(n, 1).contiguous() if config.strategy == "tensor" else scale.reshape(n, groups)
    if config.symmetric:
        zero = torch.full((n, groups), 1 << (bits - 1), dtype=torch.uint8, device=words.device)
    else:
        packed_rows = bitpack.packed_length(n, bits, 32)
        zero_words = checks.need(tensors, "weight_zero_point", torch.int32, (packed_rows, groups))
        zero = bitpack.unpack_low(zero_words.t().contiguous(), bits, n).t().contiguous()
    perm = None
    if "weight_g_idx" in tensors:
        g_idx = checks.need(tensors, "weight_g_idx", (torch.int32, torch.int64), (k,))
        perm = _permutation(g_idx, group, groups)
        codes = codes if perm is None else codes[:, perm]
    return pack_affine(codes, scale.float(), zero, bits, group, perm=perm, activation=config.activation)


def _permutation(g_idx: Tensor, group: int, groups: int) -> Tensor | None:
    """int64 [K] that sorts columns by group, or None when they are in order (or g_idx is unset, all -1)."""
    if bool((g_idx == -1).all()):
        return None
    if bool((g_idx < 0).any()) or bool((g_idx >= groups).any()):
        raise CheckpointError(f"weight_g_idx holds a group outside 0..{groups - 1}")
    order = torch.argsort(g_idx.long(), stable=True)
    want = torch.arange(len(g_idx), device=g_idx.device) // group
    if not torch.equal(g_idx.long()[order], want):
        raise CheckpointError(f"weight_g_idx does not put {group} columns in each group")
    return None if torch.equal(g_idx.long(), want) else order


def _read_input_scale(tensors: Mapping[str, Tensor], activation: Activation | None) -> Tensor | None:
    if activation != "fp8_static":
        return None
    scale = checks.need(tensors, "input_scale", _SCALES, [(1,), (), (1, 1)]).float().reshape(1)
    return checks.need_positive(scale, "input_scale")


def _refuse(key: str, value: Any, hint: str) -> ConfigError:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else shown[:80] + "..."
    return ConfigError(f"config.json: quantization_config.{key} is {shown}", hint=f"{hint}.")


def _is_class(target: str) -> bool:
    """Class names ("Linear") as opposed to module names, which are dotted or lower case."""
    return re.fullmatch(r"[A-Z]\w*", target) is not None


def _read_group(name: str, group: Any, default_format: Any) -> tuple[CTScheme | None, list[str]]:
    """(scheme, targets) of one config group; scheme None when it does not quantize weights."""
    key = f"config_groups.{name}"
    if isinstance(group, list):  # a preset's name, mapped to its targets
        if name not in _PRESETS:
            raise _refuse(key, group, f"Known presets: {', '.join(_PRESETS)}")
        weights, inputs = _PRESETS[name]
        group = {"targets": group, "weights": weights, "input_activations": inputs}
    if not isinstance(group, Mapping):
        raise _refuse(key, group, "Expected an object")
    targets = group.get("targets")
    if not isinstance(targets, list) or not all(isinstance(t, str) and len(t) <= 1000 for t in targets):
        raise _refuse(f"{key}.targets", targets, "Expected a list of names")
    for target in targets:
        if target.startswith("re:"):
            check_pattern(target[3:], f"config.json: quantization_config.{key}.targets {target[:80]!r}")
    if group.get("weights") is None:
        return None, targets
    if group.get("output_activations") is not None:
        raise _refuse(f"{key}.output_activations", group["output_activations"], "Not supported")
    stored = group.get("format") or default_format
    if stored not in _FORMATS and stored != "mixed-precision":
        raise _refuse(f"{key}.format", stored, f"Supported: {', '.join(_FORMATS)}")
    activation = _read_inputs(f"{key}.input_activations", group)
    scheme = _read_weights(f"{key}.weights", group["weights"], activation)
    if stored in _FORMATS[:3] and (stored == "pack-quantized") != (scheme.kind == "int"):
        raise _refuse(f"{key}.format", stored, f"Weights are of type {scheme.kind}, {scheme.bits} bits")
    return scheme, targets


def _read_weights(key: str, args: Any, activation: Activation | None) -> CTScheme:
    if not isinstance(args, Mapping):
        raise _refuse(key, args, "Expected an object")
    kind, bits = args.get("type", "int"), args.get("num_bits", 8)
    known = (("float", 8), ("int", 2), ("int", 3), ("int", 4), ("int", 8))
    if (kind, bits) not in known or type(bits) is not int:
        raise _refuse(f"{key}.num_bits", f"{bits} ({kind})", "Supported: float 8; int 2, 3, 4, 8")
    group, block = args.get("group_size"), args.get("block_structure")
    strategy = args.get("strategy")
    if strategy is None:
        strategy = "tensor" if group is None else "channel" if group == -1 else "group"
    allowed = ("tensor", "channel", "block") if kind == "float" else ("tensor", "channel", "group")
    if strategy not in allowed:
        raise _refuse(f"{key}.strategy", strategy, f"Supported for {kind}: {', '.join(allowed)}")
    if strategy == "group" and (type(group) is not int or group < 1):
        raise _refuse(f"{key}.group_size", group, "Expected a positive integer")
    if strategy == "block":
        if isinstance(block, str):
            block = [int(b) for b in block.split("x") if b.isdecimal() and len(b) < 10]
        if not checks.two_positive(block):
            raise _refuse(f"{key}.block_structure", block, "Expected two positive integers")
    symmetric = args.get("symmetric", True)
    if type(symmetric) is not bool or (kind == "float" and not symmetric):
        raise _refuse(f"{key}.symmetric", symmetric, "fp8 weights are symmetric")
    if args.get("dynamic"):
        raise _refuse(f"{key}.dynamic", args["dynamic"], "Weights are static")
    return CTScheme.model_validate(
        {
            "kind": kind,
            "bits": bits,
            "strategy": strategy,
            "group_size": group if strategy == "group" else None,
            "block": block if strategy == "block" else None,
            "symmetric": symmetric,
            "activation": activation,
        }
    )


def _read_inputs(key: str, group: Mapping[str, Any]) -> Activation | None:
    args = group.get("input_activations")
    if args is None:
        return None
    if not isinstance(args, Mapping) or args.get("type", "int") != "float" or args.get("num_bits", 8) != 8:
        raise _refuse(key, args, "Only fp8 inputs are supported")
    if args.get("symmetric", True) is not True:
        raise _refuse(f"{key}.symmetric", args["symmetric"], "fp8 inputs are symmetric")
    strategy, dynamic = args.get("strategy"), args.get("dynamic", False)
    if dynamic is False and strategy in (None, "tensor"):
        return "fp8_static"
    if dynamic is True and strategy == "token":
        return "fp8_token"
    if dynamic is True and strategy == "group" and args.get("group_size") == 128:
        return "fp8_group128"
    raise _refuse(key, args, "Supported: static per tensor, dynamic per token, dynamic per 128 columns")


def fp8_hf_config(layers: QuantizedLayers) -> dict[str, Any]:
    """`quantization_config` of an fp8 checkpoint: one group for the default options, one more for each
    other set of options that layers use (those list their modules by name)."""
    others: dict[FP8Config, list[str]] = {}
    default = _identity(layers.config)
    for name, config in layers.quantized.items():
        if _identity(config) != default:
            others.setdefault(_identity(config), []).append(name)
    groups = [_fp8_group(default, ["Linear"])]
    groups += [_fp8_group(config, sorted(names)) for config, names in others.items()]
    formats = {group["format"] for group in groups}
    ignore = sorted(layers.skipped)
    if layers.tied_lm_head and "lm_head" not in ignore:
        ignore.append("lm_head")
    return {
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "ignore": ignore,
        "kv_cache_scheme": None,
        "quant_method": CompressedTensors.quant_method,
        "quantization_status": "compressed",
    }


def _identity(config: FP8Config) -> FP8Config:
    """`config` with the options that only steer quantization reset."""
    return config.model_copy(
        update={"scale_search": False, "partial_blocks": "skip", "compute_dtype": "auto"}
    )


def _fp8_group(config: FP8Config, targets: list[str]) -> dict[str, Any]:
    weights: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
    weights["strategy"] = config.scheme
    if config.scheme == "block":
        weights["block_structure"] = [config.block_rows, config.block_cols]
    inputs: dict[str, Any] | None = None
    if config.activation != "none":
        inputs = {**_FP8_INPUT, "dynamic": config.activation == "dynamic"}
        if config.activation == "static":
            inputs["strategy"] = "tensor"
        elif config.scheme == "block":
            inputs.update(strategy="group", group_size=config.block_cols)
        else:
            inputs["strategy"] = "token"
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
        "format": "float-quantized" if inputs else "naive-quantized",
    }
