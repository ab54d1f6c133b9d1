"""GPTQ's `quantization_config` (also written as quantize_config.json): writing and reading.

Per-layer exceptions live under `dynamic`, keyed by a regular expression that loaders match at the
START of the module's name: `"+:<regex>": {"bits": 8}` changes options, `"-:<regex>": {}` leaves the
module unquantized; the first match wins. vLLM fuses q/k/v and gate/up into one module and looks the
rules up under the FUSED name, so a rule shared by all parts is repeated for it. transformers (optimum)
does not read `dynamic`; for modules left unquantized it reads `modules_in_block_to_quantize`, name
endings of the modules that ARE quantized, which is therefore written too when there are any.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

import quantkit
from quantkit.errors import ConfigError, did_you_mean
from quantkit.formats.base import QuantizedLayers, ReadConfig

_DYNAMIC_KEYS = ("bits", "group_size", "sym", "desc_act")
_FUSED = {("q_proj", "k_proj", "v_proj"): "qkv_proj", ("gate_proj", "up_proj"): "gate_up_proj"}
_FORMATS = ("gptq", "gptq_v2")
_MAX_PATTERN = 4096
_MAX_PATTERN_COST = 9.0  # powers of ten, an upper bound far above what usual patterns cost
_MAX_RULES = 100_000
_NUMBER = re.compile(r"\d+")


def to_hf_config(layers: QuantizedLayers) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint that quantkit writes."""
    config = layers.config
    layout = "gptq" if config.version == 1 else "gptq_v2"
    result: dict[str, Any] = {
        "quant_method": "gptq",
        "method": "gptq",
        "bits": config.bits,
        "group_size": config.group_size,
        "desc_act": config.desc_act,
        "sym": config.sym,
        "lm_head": any(_is_lm_head(name) for name in layers.quantized),
        "format": layout,
        "checkpoint_format": layout,
        "pack_dtype": "int32",
        "meta": {
            "quantizer": [f"quantkit:{quantkit.__version__}"],
            "damp_percent": config.damp_percent,
            "static_groups": config.static_groups,
            "true_sequential": True,
            "act_group_aware": config.group_aware and not config.desc_act,
            "mse": 0.0 if config.search == "minmax" else 2.0,
        },
    }
    rules = dynamic_rules(layers)
    if rules:
        result["dynamic"] = rules
    if any(not _is_lm_head(name) for name in layers.skipped):
        result["modules_in_block_to_quantize"] = [quantized_endings(layers)]
    return result


def quantized_endings(layers: QuantizedLayers) -> list[str]:
    """Name endings shared by the quantized modules and by no skipped one, else the full names."""
    endings = {name: re.split(r"[.]\d+[.]", name)[-1] for name in layers.quantized}
    chosen = list(dict.fromkeys(endings.values()))
    if any(skipped.endswith(ending) for skipped in layers.skipped for ending in chosen):
        return list(layers.quantized)
    return chosen


def dynamic_rules(layers: QuantizedLayers) -> dict[str, dict[str, Any]]:
    """`dynamic`: rules for the layers that differ from the default or are left unquantized.

    Modules whose names differ in numbers only and that all have the same rule share one pattern, so
    that a model with thousands of experts does not get thousands of rules.
    """
    rules: dict[str, dict[str, Any] | None] = {}  # module -> what differs; None: not quantized
    for name, config in layers.quantized.items():
        rules[name] = {
            key: getattr(config, key)
            for key in _DYNAMIC_KEYS
            if getattr(config, key) != getattr(layers.config, key)
        }
    for name in layers.skipped:
        if not _is_lm_head(name):  # which has its own key
            rules[name] = None
    for name in list(rules):
        parent, _, leaf = name.rpartition(".")
        for parts, fused in _FUSED.items():
            members = [f"{parent}.{part}" for part in parts]
            if leaf == parts[0] and all(member in rules for member in members):
                alike = all(rules[member] == rules[name] for member in members)
                rules.setdefault(f"{parent}.{fused}", rules[name] if alike else {})
    families: dict[str, list[str]] = {}
    for name in rules:
        families.setdefault(_NUMBER.sub("#", name), []).append(name)
    result: dict[str, dict[str, Any]] = {}
    for names in families.values():
        first = rules[names[0]]
        if len(names) > 1 and all(rules[name] == first for name in names):
            patterns = {
                "".join(r"\d+" if _NUMBER.fullmatch(t) else re.escape(t) for t in _tokens(names[0])): first
            }
        else:
            patterns = {re.escape(name): rules[name] for name in names}
        for pattern, rule in patterns.items():
            if rule is None:
                result[f"-:^{pattern}$"] = {}
            elif rule:
                result[f"+:^{pattern}$"] = dict(rule)
    return result


def _tokens(name: str) -> list[str]:
    return re.findall(r"\d+|\D+", name)


def _is_lm_head(name: str) -> bool:
    return name.rpartition(".")[2] == "lm_head"


def from_hf_config(mapping: Mapping[str, Any], config_type: type) -> ReadConfig:
    """Parse a GPTQ `quantization_config`; ConfigError names the key that cannot be accepted."""
    layout = mapping.get("checkpoint_format", mapping.get("format", "gptq"))
    if mapping.get("is_marlin_format"):
        layout = "marlin"
    if not isinstance(layout, str) or layout.lower() not in _FORMATS:
        raise ConfigError(
            f"quantization_config.checkpoint_format {layout!r} is not supported",
            hint=did_you_mean(str(layout), _FORMATS),
        )
    pack_dtype = mapping.get("pack_dtype", "int32")
    if pack_dtype not in ("int32", None):
        raise ConfigError(f"quantization_config.pack_dtype {pack_dtype!r} is not supported, only int32")
    base: dict[str, Any] = {"checkpoint_format": layout.lower()}
    for key, kind in (("bits", int), ("group_size", int), ("desc_act", bool), ("sym", bool)):
        if key in mapping:
            base[key] = _typed(mapping[key], kind, f"quantization_config.{key}")
        elif key in ("bits", "group_size"):
            raise ConfigError(f"quantization_config.{key} is missing")
    config = _build(config_type, base, "quantization_config")
    return ReadConfig(config, tuple(_overrides(mapping.get("dynamic"), base, config_type)))


def _overrides(dynamic: Any, base: dict[str, Any], config_type: type) -> list[tuple[str, Any]]:
    if dynamic is None:
        return []
    if not isinstance(dynamic, Mapping):
        raise ConfigError(f"quantization_config.dynamic must be an object, is {type(dynamic).__name__}")
    if len(dynamic) > _MAX_RULES:
        raise ConfigError(f"quantization_config.dynamic has {len(dynamic)} rules, at most {_MAX_RULES}")
    result: list[tuple[str, Any]] = []
    for key, changes in dynamic.items():
        if key.startswith("-:"):
            continue  # whether a layer is quantized is decided by its tensors
        where = f"quantization_config.dynamic[{key[:80]!r}]"
        pattern = key.removeprefix("+:")
        check_pattern(pattern, where)
        if not isinstance(changes, Mapping):
            raise ConfigError(f"{where} must be an object, is {type(changes).__name__}")
        update = dict(base)
        for name in _DYNAMIC_KEYS:
            if name in changes:
                kind = bool if name in ("sym", "desc_act") else int
                update[name] = _typed(changes[name], kind, f"{where}.{name}")
        # Loaders match at the start of the name only; ReadConfig matches whole names.
        result.append((f"(?:{pattern})(?s:.*)", _build(config_type, update, where)))
    return result


def check_pattern(pattern: str, where: str) -> None:
    """ConfigError unless `pattern` compiles and matching a module's name with it is surely quick.

    A backtracking matcher can be made to run for years by a few characters, so repeated groups are
    refused, and so is too much of what multiplies: repeats (about 100 positions in a name each),
    optional items (2) and alternatives.
    """
    if len(pattern) > _MAX_PATTERN:
        raise ConfigError(f"{where} is a regular expression of {len(pattern)} characters")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of doubtful syntax ("[[a]"), once per pattern on stderr
            re.compile(pattern)
    except (re.error, RecursionError, OverflowError, Warning) as error:
        raise ConfigError(f"{where} is not a regular expression: {error}") from None
    bare = re.sub(r"\[\^?\]?[^\]]*\]", "c", re.sub(r"\\.", "x", pattern, flags=re.DOTALL))
    repeats = len(re.findall(r"[*+{]", bare))
    optional = len(re.findall(r"(?<![(*+?}])[?]", bare))
    choices = sum(math.log10(1 + part.count("|")) for part in re.split(r"[()]", bare))
    if re.search(r"\)[*+{]", bare) or 2 * repeats + 0.3 * optional + choices > _MAX_PATTERN_COST:
        raise ConfigError(f"{where} is a regular expression that could take too long to match")


def _typed(value: Any, kind: type, where: str) -> Any:
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not kind:
        wanted = "true or false" if kind is bool else "a whole number"
        raise ConfigError(f"{where} must be {wanted}, is {value!r:.60}")
    return value


def _build(config_type: type, values: dict[str, Any], where: str) -> Any:
    try:
        return config_type(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or "?"
        raise ConfigError(f"{where}.{name} is not acceptable: {first['msg']}") from None
