"""The explicit table of formats: everything else (CLI flags, docs, conformance tests) follows it."""

from __future__ import annotations

import importlib
from functools import cache
from typing import TYPE_CHECKING

from quantkit.errors import ConfigError, UsageError, did_you_mean

if TYPE_CHECKING:
    from quantkit.formats.base import Format, Layout

#: Formats that `quantkit convert` writes -> "module:class".
FORMATS = {
    "nf4": "quantkit.formats.nf4:NF4",
    "gptq": "quantkit.formats.gptq:GPTQ",
    "awq": "quantkit.formats.awq:AWQ",
    "hqq": "quantkit.formats.hqq:HQQ",
    "fp8": "quantkit.formats.fp8:FP8",
    "ternary": "quantkit.formats.ternary:Ternary",
}

#: `quantization_config.quant_method` -> the layout that reads it.
LAYOUTS = {
    "bitsandbytes": FORMATS["nf4"],
    "gptq": FORMATS["gptq"],
    "awq": FORMATS["awq"],
    "hqq": FORMATS["hqq"],
    "fp8": FORMATS["fp8"],
    "bitnet": FORMATS["ternary"],
    "compressed-tensors": "quantkit.formats.compressed_tensors:CompressedTensors",
}


@cache
def _load(spec: str) -> Layout:
    module, _, name = spec.partition(":")
    return getattr(importlib.import_module(module), name)()


def get_format(name: str) -> Format:
    """The format called `name` on the command line; UsageError with a suggestion otherwise."""
    key = name.lower().replace("_", "-")
    if key not in FORMATS:
        raise UsageError(f"unknown format {name!r}", hint=did_you_mean(name, list(FORMATS)))
    return _load(FORMATS[key])  # type: ignore[return-value]


def get_layout(quant_method: str) -> Layout:
    """The layout that reads checkpoints with this `quant_method`."""
    if quant_method not in LAYOUTS:
        raise ConfigError(
            f"config.json: quantization_config.quant_method {quant_method!r} is not supported",
            hint=did_you_mean(str(quant_method), list(LAYOUTS)),
        )
    return _load(LAYOUTS[quant_method])
