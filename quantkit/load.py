"""`quantkit.load`: any supported checkpoint, quantized or not, as a transformers model.

The model is built on the meta device, quantized linears become `QuantLinear`, and tensors are streamed
in one at a time. The checkpoint may come from quantkit or from the tools that own the formats.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quantkit.checkpoint import CheckpointReader, TensorInfo
from quantkit.config_checks import check_config
from quantkit.encoding import PackedWeight, dequantize
from quantkit.errors import CheckpointError, ConfigError, QuantkitError, UsageError, did_you_mean
from quantkit.formats import get_layout
from quantkit.formats.base import Layout, ReadConfig
from quantkit.hub import resolve_model
from quantkit.linear import (
    CPU_ACTIVATIONS,
    materialize,
    meta_tensors,
    replace_linear,
    set_cpu_activations,
)
from quantkit.meta_model import quiet_transformers
from quantkit.skeleton import Skeleton, Target, linear_shape
from quantkit.untrusted import MAX_SIDE_JSON_BYTES, read_json, side_file

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class QuantizedTensors:
    """The quantized layers of a checkpoint, by headers alone."""

    layout: Layout
    config: ReadConfig
    layers: dict[str, dict[str, str]]  # module name in the checkpoint -> {suffix: tensor name}
    dense: list[str]  # all other tensors


def find_quantized(reader: CheckpointReader) -> QuantizedTensors | None:
    """Group a checkpoint's tensors into quantized layers; None when config.json names no quantization.

    ConfigError when the quantization is unknown or its settings are not acceptable.
    """
    mapping = quantization_config(reader)
    if mapping is None:
        return None
    layout = get_layout(str(mapping.get("quant_method")))
    config = layout.from_hf_config(mapping)
    layers: dict[str, dict[str, str]] = {}
    names = reader.names()
    for marker in layout.markers:
        for name in names:
            if name.endswith("." + marker):
                layers.setdefault(name[: -len(marker) - 1], {})
    dense = []
    for name in names:
        split = _split(name, layout.suffixes, layers)
        if split is None:
            dense.append(name)
        else:
            layers[split[0]][split[1]] = name
    return QuantizedTensors(layout, config, layers, dense)


def quantization_config(reader: CheckpointReader) -> Mapping[str, Any] | None:
    """`quantization_config` of config.json (at the top or in `text_config`); None when there is none."""
    for scope in (reader.config, reader.config.get("text_config")):
        mapping = scope.get("quantization_config") if isinstance(scope, dict) else None
        if mapping is None:
            continue
        if not isinstance(mapping, dict) or not isinstance(mapping.get("quant_method"), str):
            raise ConfigError(
                f"{reader.path / 'config.json'}: quantization_config has no quant_method",
                hint="Correct config.json.",
            )
        return mapping
    return None


def _split(name: str, suffixes: tuple[str, ...], layers: Mapping[str, Any]) -> tuple[str, str] | None:
    """(layer, suffix) when `name` is a tensor of a quantized layer."""
    base, _, suffix = name.rpartition(".")
    while base:
        if base in layers:
            if any(fnmatch.fnmatchcase(suffix, pattern) for pattern in suffixes):
                return base, suffix
            return None
        base, _, head = base.rpartition(".")
        suffix = f"{head}.{suffix}"
    return None


def read_layer(
    reader: CheckpointReader, found: QuantizedTensors, name: str, shape: tuple[int, int]
) -> PackedWeight:
    """The packed weight of quantized layer `name` whose dense shape the model says is `shape`.

    CheckpointError names the file, the layer and the tensor that is wrong.
    """
    tensors = {suffix: reader.read(full) for suffix, full in found.layers[name].items()}
    try:
        return found.layout.from_checkpoint(tensors, found.config.config_for(name), shape)
    except QuantkitError as error:
        file = reader.info(next(iter(found.layers[name].values()))).file.name
        raise type(error)(f"{file}: layer {name!r}: {error.what}", hint=error.hint) from error
    except ValueError as error:  # PackedWeight's own shape check
        file = reader.info(next(iter(found.layers[name].values()))).file.name
        raise CheckpointError(
            f"{file}: layer {name!r}: {error}",
            hint="The file is damaged or its quantization_config is wrong.",
        ) from error


def load(
    model: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    dequantize_weights: bool = False,
    cpu_activations: str = "exact",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Load a checkpoint as a transformers model in eval mode.

    Parameters
    ----------
    model: directory or hub id; quantized in any format quantkit reads, or not quantized at all.
    device: where the weights go.
    dtype: of activations and of the tensors that are not quantized; None keeps what is stored.
    dequantize_weights: replace packed weights by dense ones in `dtype` (for comparison; large).
    cpu_activations: "exact", or "int8": affine layers (GPTQ, AWQ, HQQ) round their inputs to int8 per
        block while they run on a CPU, which is several times faster there with onnxruntime installed
        (extra `quantkit[cpu]`) and changes a layer's output by about half a percent.

    Raises CheckpointError or ConfigError, naming file and tensor, before or while reading; a tensor
    that is missing is never replaced by random numbers.
    """
    if cpu_activations not in CPU_ACTIVATIONS:  # before anything is read
        hint = did_you_mean(cpu_activations, list(CPU_ACTIVATIONS))
        raise UsageError(f"unknown cpu_activations {cpu_activations!r}", hint=hint)
    path = resolve_model(model, revision)
    if isinstance(dtype, str):
        dtype = parse_dtype(dtype)
    with CheckpointReader(path) as reader:
        found = find_quantized(reader)
        skeleton = Skeleton(path, reader.config, trust_remote_code=trust_remote_code, weights=reader)
        dense_names = found.dense if found else reader.names()
        modules = _quantized_modules(reader, skeleton, found) if found else {}
        covered = [m + ".weight" for m in modules.values()]
        carried = set(skeleton.check_complete(dense_names, covered))
        for name in dense_names:
            if name not in carried:  # shapes and dtypes, before anything is read
                _check_dtype(reader.info(name), skeleton, skeleton.targets(name, reader.info(name).shape))
        bias_factors: dict[str, float] = {}
        for name, module in modules.items():
            assert found is not None
            packed = read_layer(reader, found, name, linear_shape(skeleton.modules[module])).to(device)
            bias_factors[module + ".bias"] = found.layout.bias_factor(packed, found.config.config_for(name))
            if dequantize_weights:
                dense = dequantize(packed, dtype or _config_dtype(reader) or torch.float32)
                _put_dense(skeleton, module, dense)
            else:
                replace_linear(skeleton.model, module, packed)
        for name in dense_names:
            if name not in carried:
                _put_tensor(reader, skeleton, name, device, dtype)
        for path_of_bias, factor in bias_factors.items():
            if factor != 1.0 and path_of_bias in skeleton.params:
                skeleton.model.get_parameter(path_of_bias).data.mul_(factor)
    finish_model(skeleton, device)
    left = meta_tensors(skeleton.model)
    if left:
        raise CheckpointError(
            f"tensor {left[0]!r} is missing from {path}", hint="Download the checkpoint again."
        )
    set_cpu_activations(skeleton.model, cpu_activations)
    _load_generation_config(skeleton.model, path)
    skeleton.model.quantkit_layout = found.layout.name if found else None
    return skeleton.model


def _check_dtype(info: TensorInfo, skeleton: Skeleton, targets: list[Target]) -> None:
    """Refuse codes (integers, float8) where the model wants a dense weight: their scales are missing."""
    codes = not info.dtype.is_floating_point or info.dtype.itemsize == 1
    for target in targets:
        wanted = skeleton.params.get(target.param)
        if codes and wanted is not None and wanted.is_floating_point():
            raise CheckpointError(
                f"tensor {info.name!r} of {info.file.name} holds {str(info.dtype).removeprefix('torch.')}, "
                "not weights",
                hint="Its scales are missing, or config.json has no quantization_config for it.",
            )


def _quantized_modules(
    reader: CheckpointReader, skeleton: Skeleton, found: QuantizedTensors
) -> dict[str, str]:
    """Quantized layer name in the checkpoint -> module path; refuses layers the model lacks."""
    out: dict[str, str] = {}
    for name, tensors in found.layers.items():
        module = skeleton.module_for(name)
        kind = type(skeleton.modules.get(module or "", None)).__name__
        if module is None or not (isinstance(skeleton.modules.get(module), nn.Linear) or kind == "Conv1D"):
            file = reader.info(next(iter(tensors.values()))).file.name
            raise CheckpointError(
                f"{file}: quantized layer {name!r} has no linear layer in the model of config.json",
                hint="The config does not belong to these weights.",
            )
        if module in out.values():
            raise CheckpointError(
                f"two quantized layers fill {module!r} (one is {name!r})", hint="Remove one."
            )
        out[name] = module
    return out


def iter_dense(reader: CheckpointReader, skeleton: Skeleton, name: str) -> Iterator[tuple[str, Tensor]]:
    """(parameter path, CPU tensor) pairs that checkpoint tensor `name` fills."""
    for target in skeleton.targets(name, reader.info(name).shape):
        if target.index is None:
            value = reader.read(name, check_finite=True)
        else:
            value = reader.read_index(name, target.index, check_finite=True)
        if target.rows is not None:
            value = value[target.rows[0] : target.rows[1]].clone()
        yield target.param, value


def _put_tensor(
    reader: CheckpointReader,
    skeleton: Skeleton,
    name: str,
    device: str | torch.device,
    dtype: torch.dtype | None,
) -> None:
    for param, value in iter_dense(reader, skeleton, name):
        if dtype is not None and value.is_floating_point():
            value = value.to(dtype)
        materialize(skeleton.model, param, value.to(device))


def _put_dense(skeleton: Skeleton, module: str, weight: Tensor) -> None:
    if type(skeleton.modules[module]).__name__ == "Conv1D":
        weight = weight.t().contiguous()
    materialize(skeleton.model, module + ".weight", weight)


def finish_model(skeleton: Skeleton, device: str | torch.device) -> None:
    """Tie weights and compute the buffers that no file holds (rotary frequencies, position ids)."""
    model = skeleton.model
    with quiet_transformers():
        model.tie_weights()
        fill_buffers(model, device)


def fill_buffers(model: Any, device: str | torch.device) -> None:
    """Give every non-persistent buffer its value, by the model's own initialisation; parameters and
    persistent buffers keep theirs."""
    from transformers import PreTrainedModel

    for tensor in (*model.parameters(), *model.buffers()):
        tensor._is_hf_initialized = True
    owners: list[tuple[str, Any]] = [
        (n, m) for n, m in model.named_modules() if isinstance(m, PreTrainedModel)
    ]
    for path, module in model.named_modules():
        names = [n for n in module._non_persistent_buffers_set if module._buffers.get(n) is not None]
        fresh = [n for n in names if module._buffers[n].device.type == "meta"]
        if not fresh:
            continue
        for name in fresh:
            module._buffers[name] = torch.empty_like(module._buffers[name], device=device)
        owner = max(
            (o for o in owners if path == o[0] or path.startswith(o[0] + ".") or not o[0]),
            key=lambda o: len(o[0]),
        )
        with torch.no_grad():
            owner[1]._init_weights(module)


def _load_generation_config(model: Any, path: os.PathLike[str]) -> None:
    from transformers import GenerationConfig

    if os.path.exists(os.path.join(path, "generation_config.json")) and hasattr(model, "generation_config"):
        with quiet_transformers():
            try:
                model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
            except Exception as error:  # whatever transformers makes of it
                raise ConfigError(
                    f"{path}/generation_config.json: {error}", hint="Correct or remove it."
                ) from error


def _config_dtype(reader: CheckpointReader) -> torch.dtype | None:
    value = reader.config.get("dtype", reader.config.get("torch_dtype"))
    return parse_dtype(value) if isinstance(value, str) else None


def parse_dtype(name: str) -> torch.dtype:
    """`"bfloat16"`, `"bf16"`, `"torch.float32"`, ... -> the floating point dtype."""
    short = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
    key = name.removeprefix("torch.")
    dtype = getattr(torch, short.get(key, key), None)
    if dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise ConfigError(f"dtype {name!r} is not supported", hint="Use float32, bfloat16 or float16.")
    return dtype


def load_tokenizer(
    model: str | os.PathLike[str], *, revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """The checkpoint's tokenizer; CheckpointError when it has none."""
    from transformers import AutoTokenizer

    path = resolve_model(model, revision).resolve()
    for name in sorted(os.listdir(path)):
        if name.endswith((".json", ".jinja", ".txt", ".model")) and not name.startswith("."):
            if not name.endswith(".index.json"):
                side_file(path / name, path)
    if (path / "config.json").exists():  # transformers looks into it for the tokenizer's class
        config = read_json(path / "config.json", path, MAX_SIDE_JSON_BYTES)
        if isinstance(config, dict):
            check_config(config, path / "config.json", trust_remote_code)
    with quiet_transformers():
        try:
            return AutoTokenizer.from_pretrained(
                path, local_files_only=True, trust_remote_code=trust_remote_code
            )
        except BaseException as error:
            # A panic of the Rust library is no Exception.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise CheckpointError(
                f"{path}: no usable tokenizer ({type(error).__name__}: {error})",
                hint="Copy the tokenizer files of the source model there.",
            ) from error
