"""What of a config.json is refused before transformers sees it: absurd sizes, and ways to make it run code.

transformers decides about remote code by a flag of its caller's, but has more than once let the config
decide: `trust_remote_code` inside a nested config (CVE-2026-5241, fixed in 5.5.0) and an attention
implementation that names a repository of kernels (CVE-2026-4372, fixed in 5.3.0). pyproject.toml asks for
a version with both fixed; these checks do not rely on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from quantkit.errors import ConfigError

_MAX_COUNT = 10_000
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_SIZES = (
    *("hidden_size", "n_embd", "vocab_size", "intermediate_size", "num_attention_heads", "head_dim"),
    *("num_key_value_heads", "n_head", "n_positions", "max_position_embeddings", "n_inner"),
)
#: A kernel of the hub is spelled org/name, with @ and : for versions and functions.
_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
#: An expert has three matrices; none of a real model has fewer weights than this.
_FEWEST_WEIGHTS = 64


def check_config(config: Mapping[str, Any], where: Path, trust_remote_code: bool = False) -> None:
    """ConfigError for sizes that could only be a mistake or an attack and, unless `trust_remote_code`, for
    keys that ask for code from elsewhere. `auto_map` is no such key: it is not followed without the flag."""
    for scope in _scopes(config):
        for key in (*_LAYERS, *_EXPERTS):
            value = scope.get(key)
            if value is not None and not _is_count(value):
                raise ConfigError(
                    f"{where}: {key} is {value!r:.80}", hint="Expected a whole number of at most 10000."
                )
        for key in _SIZES:
            value = scope.get(key)
            if isinstance(value, int | float) and not 0 < value < 2**31:
                raise ConfigError(
                    f"{where}: {key} is {value!r:.80}", hint="Expected a positive 32-bit number."
                )
        if not trust_remote_code:
            _refuse_code(scope, where)


def check_counts(config: Mapping[str, Any], where: Path, tensors: int, elements: int) -> None:
    """ConfigError when a config promises more layers than the checkpoint has `tensors`, or more experts
    than its `elements` weights could make up: building such a model would take minutes and gigabytes."""
    for scope in _scopes(config):
        layers = max((scope[key] for key in _LAYERS if _is_count(scope.get(key))), default=1)
        experts = max((scope[key] for key in _EXPERTS if _is_count(scope.get(key))), default=1)
        if layers > tensors or layers * experts * _FEWEST_WEIGHTS > max(elements, _FEWEST_WEIGHTS):
            what = f"{layers} layers" + (f" of {experts} experts" if experts > 1 else "")
            raise ConfigError(
                f"{where} promises {what}, but there are {tensors} tensors with {elements} elements",
                hint="Give the config that belongs to these weights.",
            )


def _scopes(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """All objects of the configuration; its depth is limited by the parser. A quantization's keys are its
    format's business."""
    todo: list[Any] = [config]
    while todo:
        item = todo.pop()
        if isinstance(item, Mapping):
            yield item
            todo += [value for key, value in item.items() if key != "quantization_config"]
        elif isinstance(item, list):
            todo += [value for value in item if isinstance(value, Mapping | list)]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_COUNT


def _refuse_code(scope: Mapping[str, Any], where: Path) -> None:
    if scope.get("trust_remote_code"):
        raise ConfigError(
            f"{where} holds trust_remote_code: it is not for a checkpoint to say that it is trusted",
            hint="Remove the key, or use --trust-remote-code if you trust it.",
        )
    for key, value in scope.items():
        if key.strip("_").removesuffix("_internal") not in _IMPLEMENTATIONS:
            continue
        names = value.values() if isinstance(value, Mapping) else [value]
        for name in names:
            if name is not None and not (isinstance(name, str) and name.replace("_", "").isalnum()):
                raise ConfigError(
                    f"{where}: {key} {name!r:.80} would fetch code from elsewhere",
                    hint="Remove the key, or use --trust-remote-code if you trust it.",
                )
