"""Checks that every layout needs when it reads a file nobody vouches for, and the list of skipped modules.

Everything here raises `CheckpointError` (tensors) or `ConfigError` (`quantization_config`) with the
suffix or the key in the message; the caller adds the module and the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import CheckpointError, ConfigError
from quantkit.formats.base import QuantizedLayers

#: Names that checkpoints use for the floating dtypes that a layer may compute in.
FLOAT_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def resolve_dtype(name: str) -> torch.dtype:
    """torch dtype of a `compute_dtype` option; "auto" that nobody resolved means bfloat16.

    The conversion driver replaces "auto" by the source weight's dtype before it quantizes.
    """
    return FLOAT_DTYPES["bfloat16" if name == "auto" else name]


def dtype_name(dtype: torch.dtype) -> str:
    """ "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def need(
    tensors: Mapping[str, Tensor],
    suffix: str,
    dtypes: torch.dtype | Sequence[torch.dtype],
    shapes: tuple[int, ...] | list[tuple[int, ...]] | None = None,
) -> Tensor:
    """The tensor called `suffix`, after checking its dtype and shape (any one of those given)."""
    if suffix not in tensors:
        present = ", ".join(sorted(tensors)) or "nothing"
        raise CheckpointError(f"{suffix} is missing", hint=f"Present: {present}.")
    tensor = tensors[suffix]
    allowed = [dtypes] if isinstance(dtypes, torch.dtype) else list(dtypes)
    if tensor.dtype not in allowed:
        names = " or ".join(dtype_name(d) for d in allowed)
        raise CheckpointError(f"{suffix} has dtype {dtype_name(tensor.dtype)}, expected {names}")
    if shapes is not None:
        options = shapes if isinstance(shapes, list) else [shapes]
        if tuple(tensor.shape) not in options:
            wanted = " or ".join(str(list(s)) for s in options)
            raise CheckpointError(f"{suffix} has shape {list(tensor.shape)}, expected {wanted}")
    return tensor


def need_finite(tensor: Tensor, suffix: str) -> Tensor:
    """`tensor` unchanged; CheckpointError when it holds NaN or Inf."""
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{suffix} holds NaN or Inf")
    return tensor


def need_positive(tensor: Tensor, suffix: str) -> Tensor:
    """`tensor` unchanged; CheckpointError unless every entry is finite and above zero."""
    need_finite(tensor, suffix)
    if not bool((tensor > 0).all()):
        raise CheckpointError(f"{suffix} holds a scale that is not above zero")
    return tensor


def config_value(mapping: Mapping[str, Any], key: str, allowed: Sequence[Any], default: Any) -> Any:
    """`mapping[key]` (or the default), ConfigError naming the key unless it is one of `allowed`."""
    value = mapping.get(key, default)
    if not any(type(value) is type(a) and value == a for a in allowed):
        raise ConfigError(
            f"config.json: quantization_config.{key} is {value!r}",
            hint=f"Supported: {', '.join(repr(a) for a in allowed)}.",
        )
    return value


def config_dtype(mapping: Mapping[str, Any], key: str, default: str) -> str:
    """A floating dtype name such as "bfloat16" ("torch.bfloat16" is accepted)."""
    value = mapping.get(key)
    value = default if value is None else value
    name = value.removeprefix("torch.") if isinstance(value, str) else value
    return str(config_value({key: name}, key, list(FLOAT_DTYPES), default))


def two_positive(value: Any) -> bool:
    """Is `value` a list of two positive integers?"""
    return (
        isinstance(value, list | tuple) and len(value) == 2 and all(type(v) is int and v > 0 for v in value)
    )


def _matches(key: str, name: str) -> bool:
    """transformers' rule for `modules_to_not_convert`: a pattern from the start, or a suffix."""
    return re.match(rf"(?:{key})(?:(?<=\.)|(?=\.|$))", name) is not None or name.endswith(key)


def skip_list(layers: QuantizedLayers) -> list[str]:
    """Modules that loaders must leave alone, as transformers matches them.

    The list is always explicit: `null` would mean "the output embedding, if any" to transformers,
    which is wrong when that layer is quantized. A name that would also match a quantized module
    (transformers matches suffixes) is written as an anchored pattern instead.
    """
    names = sorted(layers.skipped)
    if layers.tied_lm_head and "lm_head" not in names:
        names.append("lm_head")
    result = []
    for name in names:
        clash = any(_matches(name, other) for other in layers.quantized)
        result.append(f"^{re.escape(name)}$" if clash else name)
    return result
