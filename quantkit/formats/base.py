"""What a format is: the contract between the conversion driver, the algorithms and the files.

A *layout* knows one family of files: how a `PackedWeight` becomes named tensors and back, and how
its settings look in `config.json`. A *format* is a layout that `quantkit convert` can write: it adds
its options (`Config`) and how codes are chosen (`quantize`). Formats see one weight at a time, never
a model, a file or a kernel; `quantkit.convert` and `quantkit.load` do the rest from these methods.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from quantkit.encoding import PackedWeight


class Needs(enum.Enum):
    """What `quantize` wants to know besides the weight."""

    NONE = "none"  # the weight alone: conversion streams tensors, no model is built
    HESSIAN = "hessian"  # LayerStats.hessian from calibration
    SMOOTHING = "smoothing"  # AWQ: a whole decoder layer is rescaled before its weights are quantized


class FormatConfig(BaseModel):
    """Base of every format's options. Fields become the command line's flags and overrides."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


@dataclass
class LayerStats:
    """Calibration statistics of one linear layer's input, summed over `tokens` tokens.

    `hessian` is float32 `[K, K]`, the plain sum of `x x^T` (divide by `tokens` for the mean);
    `abs_sum` is float32 `[K]`, the sum of `|x|`; `abs_max` is float32 `[K]`, the largest `|x|` (static
    fp8 activations need it). For MoE experts `tokens` counts the tokens that were
    routed to this expert; it may be 0, and then `hessian` is all zeros.
    """

    tokens: int = 0
    hessian: Tensor | None = None
    abs_sum: Tensor | None = None
    abs_max: Tensor | None = None


@dataclass(frozen=True)
class TensorSpec:
    """dtype and shape of a tensor to be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        count = 1
        for extent in self.shape:
            count *= extent
        return count * self.dtype.itemsize


@dataclass(frozen=True)
class Fit:
    """Whether and how a weight of some shape can be stored: the stated policy for odd shapes.

    `config` is what will be used (it may differ from what was asked, then `note` says how), or
    None when the layer must stay as it is, and `note` gives the reason.
    """

    config: Any | None
    note: str = ""


@dataclass
class QuantizedLayers:
    """Which modules of a checkpoint are quantized, with which options: for `to_hf_config`.

    Names are module names as the checkpoint spells them ("model.layers.0.mlp.down_proj").
    """

    config: Any  # the default options
    quantized: dict[str, Any] = field(default_factory=dict)  # name -> options actually used
    skipped: dict[str, str] = field(default_factory=dict)  # linear modules left alone -> reason
    tied_lm_head: bool = False


@dataclass(frozen=True)
class ReadConfig:
    """A parsed `quantization_config`: default options and per-layer exceptions (first match wins).

    `overrides` maps a regular expression (matched with `re.fullmatch` on the module's checkpoint
    name) to that layer's options. Whether a layer IS quantized is decided by the tensors present,
    never by this object alone.
    """

    config: Any
    overrides: tuple[tuple[str, Any], ...] = ()

    def config_for(self, name: str) -> Any:
        """Options of the layer called `name`."""
        for pattern, config in self.overrides:
            if re.fullmatch(pattern, name):
                return config
        return self.config


class Layout:
    """Files of one `quant_method`: reading side. Subclasses are stateless singletons."""

    name: ClassVar[str]  # the format's name on quantkit's command line
    quant_method: ClassVar[str]  # config.json's quantization_config.quant_method
    loaders: ClassVar[tuple[str, ...]] = ()  # tools that read these files, for docs and model cards

    #: Suffixes whose presence marks a module as quantized, e.g. ("qweight",). A module `m` is
    #: quantized when `m + "." + marker` is in the checkpoint for any marker (layouts whose weight
    #: keeps the name "weight" use a companion, e.g. "weight_scale_inv").
    markers: ClassVar[tuple[str, ...]]
    #: All suffixes that belong to a quantized weight (the bias is not among them); entries may end
    #: in "*" for a family ("weight.quant_state.*").
    suffixes: ClassVar[tuple[str, ...]]

    def from_hf_config(self, mapping: Mapping[str, Any]) -> ReadConfig:
        """Parse `quantization_config`; ConfigError (naming the key) when it is not acceptable."""
        raise NotImplementedError

    def bias_factor(self, packed: PackedWeight, config: Any) -> float:
        """What the owner's runtime multiplies a quantized layer's stored bias with (1 but for a quirk)."""
        return 1.0

    def from_checkpoint(
        self, tensors: Mapping[str, Tensor], config: Any, shape: tuple[int, int]
    ) -> PackedWeight:
        """PackedWeight of one layer from its tensors (keys are suffixes after the module's name).

        `shape` is the dense weight's (out_features, in_features) as the model wants it; everything
        found in the file is checked against it and against `config`: dtypes, shapes, code ranges,
        finite scales. Raises CheckpointError naming the suffix (the caller adds module and file).
        """
        raise NotImplementedError


class Format(Layout):
    """A layout that `quantkit convert --format <name>` writes."""

    Config: ClassVar[type[FormatConfig]]
    summary: ClassVar[str] = ""  # one line for the docs table and --help
    #: "" when the owner's loaders read routed experts, else what to tell the user.
    experts_note: ClassVar[str] = ""
    supports_conv1d: ClassVar[bool] = True  # do the owner's loaders accept GPT-2's Conv1D layers?

    def resolve(self, config: Any, source_dtype: torch.dtype, biases: bool) -> Any:
        """`config` with every "auto" replaced by what this source calls for; `biases` says whether any
        layer to be quantized has one."""
        if getattr(config, "compute_dtype", None) == "auto":
            return merge_config(config, {"compute_dtype": str(source_dtype).removeprefix("torch.")})
        return config

    def readers(self, config: Any) -> tuple[str, ...]:
        """Those of `loaders` that read files written under these options."""
        return self.loaders

    def needs(self, config: Any) -> Needs:
        """What calibration `quantize` wants under these options."""
        raise NotImplementedError

    def fit(self, shape: tuple[int, int], config: Any) -> Fit:
        """The policy for a weight of this shape (e.g. in_features not divisible by the group)."""
        raise NotImplementedError

    def check_overrides(self, config: Any, override: Any) -> str:
        """Empty when a layer may use `override` beside the default `config` in one checkpoint, else
        the reason why this layout cannot express it."""
        return ""

    def quantize(self, weight: Tensor, config: Any, stats: LayerStats | None) -> PackedWeight:
        """Choose codes for `weight` (float32 `[N, K]`, finite, any device; must not be modified).

        All tensors of the result are on `weight.device`. May append remarks via `notes` (see
        `quantkit.formats.notes`).
        """
        raise NotImplementedError

    def checkpoint_spec(self, shape: tuple[int, int], config: Any) -> dict[str, TensorSpec]:
        """The tensors that `to_checkpoint` will return, known before any work (dry run, disk check).

        Only entries whose length depends on the content (a JSON blob) may be approximate.
        """
        raise NotImplementedError

    def to_checkpoint(self, packed: PackedWeight, config: Any) -> dict[str, Tensor]:
        """CPU tensors to write, keyed by the suffix after the module's name."""
        raise NotImplementedError

    def to_hf_config(self, layers: QuantizedLayers) -> dict[str, Any]:
        """The `quantization_config` for config.json."""
        raise NotImplementedError

    def extra_files(self, layers: QuantizedLayers) -> dict[str, dict[str, Any]]:
        """Further JSON files that loaders of this format expect (name -> content)."""
        return {}


def merge_config(config: FormatConfig, update: Mapping[str, Any]) -> Any:
    """`config` with some fields replaced and everything validated again."""
    return type(config).model_validate({**config.model_dump(), **update})


def take_notes(remarks: Sequence[str] | None = None) -> list[str]:
    """Return and clear the remarks that algorithms left for the layer just quantized."""
    notes = list(_NOTES)
    _NOTES.clear()
    if remarks:
        notes.extend(remarks)
    return notes


def note(remark: str) -> None:
    """Leave a remark about the layer being quantized (a fallback taken, damping raised); it appears
    in the report beside that layer."""
    if remark not in _NOTES:
        _NOTES.append(remark)


_NOTES: list[str] = []
