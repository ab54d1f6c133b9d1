"""From a prepared decoder to an ONNX file: torch.onnx traces, onnxscript simplifies, onnx_ir writes.

The graph's inputs and outputs have the names that Hugging Face's and onnxruntime-genai's runtimes expect:
`input_ids`, `attention_mask`, `position_ids`, `past_key_values.{i}.key|value`; `logits`,
`present.{i}.key|value`. Batch, sequence and past are dynamic. Weights lie in `model.onnx.data`.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantkit.errors import UsageError
from quantkit.export import onnx_fuse
from quantkit.export.decoder import Decoder
from quantkit.export.onnx_layers import UINT4

#: The file of the graph and the file of the weights.
MODEL, DATA = "model.onnx", "model.onnx.data"
#: Oldest opset that has what the graphs need: blocked DequantizeLinear and UINT4 (21).
OLDEST, DEFAULT, NEWEST = 21, 23, 23


@dataclass(frozen=True)
class CacheShape:
    """What one layer's keys (and values) look like: `[B, heads, P, size]`."""

    layers: int
    heads: int
    size: int

    @staticmethod
    def of(model: Any) -> CacheShape:
        """Read off the model's configuration."""
        config = model.config.get_text_config()
        heads = int(config.num_attention_heads)
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        return CacheShape(
            int(config.num_hidden_layers),
            int(getattr(config, "num_key_value_heads", None) or heads),
            int(size),
        )


def names(shape: CacheShape, prefix: str) -> list[str]:
    """`{prefix}.0.key`, `{prefix}.0.value`, `{prefix}.1.key`, ..."""
    return [f"{prefix}.{i}.{kind}" for i in range(shape.layers) for kind in ("key", "value")]


def example_inputs(shape: CacheShape, *, past: int, new: int, batch: int = 2) -> tuple[Any, ...]:
    """Inputs to trace with; every dynamic size is larger than 1 and none equals another by accident."""
    ids = torch.arange(batch * new).view(batch, new) % 7 + 1
    mask = torch.ones(batch, past + new, dtype=torch.int64)
    positions = torch.arange(past, past + new)[None].repeat(batch, 1)
    if past == 0:
        return ids, mask, positions
    one = torch.zeros(batch, shape.heads, past, shape.size)
    return ids, mask, positions, [(one.clone(), one.clone()) for _ in range(shape.layers)]


def to_onnx(decoder: Decoder, shape: CacheShape, opset: int, folder: Path, *, fused: bool) -> Counter[str]:
    """Write `folder/model.onnx` and its data file; returns how many nodes of each type the graph has.

    `fused`: with onnxruntime's operators for what several standard ones do (`onnx_fuse`).
    """
    import onnx_ir as ir

    check_opset(opset)
    cached = decoder.use_cache
    args = example_inputs(shape, past=5 if cached else 0, new=3)
    batch, new, past = (torch.export.Dim.DYNAMIC for _ in range(3))
    shapes: list[Any] = [{0: batch, 1: new}, {0: batch, 1: torch.export.Dim.DYNAMIC}, {0: batch, 1: new}]
    if cached:
        shapes.append([({0: batch, 2: past}, {0: batch, 2: past}) for _ in range(shape.layers)])
    inputs = ["input_ids", "attention_mask", "position_ids"]
    outputs = ["logits"]
    if cached:
        inputs += names(shape, "past_key_values")
        outputs += names(shape, "present")
    if not decoder.takes_positions:
        del shapes[2], inputs[2]
        args = args[:2] + args[3:]
    with quiet(), torch.no_grad():
        program = torch.export.export(decoder, args, dynamic_shapes=tuple(shapes), strict=False)
        made = torch.onnx.export(
            program,
            (),
            dynamo=True,
            opset_version=opset,
            optimize=False,
            verbose=False,
            input_names=inputs,
            output_names=outputs,
        )
    assert made is not None
    model = made.model
    simplify(model)
    if fused:
        onnx_fuse.fuse(model)
    name_dimensions(model)
    pack_uint4(model)
    strip(model)
    model.producer_name = "quantkit"
    ir.save(model, folder / MODEL, external_data=DATA, size_threshold_bytes=1024)
    return Counter(_kind(node) for node in model.graph.all_nodes())


def check_opset(opset: int) -> None:
    """UsageError unless the graphs can be written for `opset`."""
    if not OLDEST <= opset <= NEWEST:
        raise UsageError(
            f"opset {opset} is {'too old' if opset < OLDEST else 'too new'}",
            hint=f"Use {OLDEST} to {NEWEST}; blocked and 4-bit DequantizeLinear came with {OLDEST}.",
        )


def simplify(model: Any) -> None:
    """Fold constants, drop what is unused; never fold weights, which would unpack them."""
    from onnx_ir.passes import common
    from onnxscript import optimizer

    optimizer.optimize_ir(model, input_size_limit=64, output_size_limit=64, num_iterations=2)
    common.DeduplicateInitializersPass(size_limit=2**31)(model)  # tables that layers share


def name_dimensions(model: Any) -> None:
    """Readable names for the dynamic dimensions of inputs and outputs."""
    import onnx_ir as ir

    def rename(value: Any, dims: dict[int, str]) -> None:
        if value.shape is not None:
            value.shape = ir.Shape([dims.get(i, d) for i, d in enumerate(value.shape)])

    for value in model.graph.inputs:
        if value.name.startswith("past"):
            rename(value, {0: "batch_size", 2: "past_sequence_length"})
        else:
            second = "total_sequence_length" if value.name == "attention_mask" else "sequence_length"
            rename(value, {0: "batch_size", 1: second})
    for value in model.graph.outputs:
        if value.name.startswith("present"):
            rename(value, {0: "batch_size", 2: "total_sequence_length"})
        else:
            rename(value, {0: "batch_size", 1: "sequence_length"})


def strip(model: Any) -> None:
    """Remove stack traces (which name this machine's paths) and inferred shapes: most of a graph's bytes."""
    outputs = set(model.graph.outputs)
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            if value not in outputs:  # runtimes infer these
                value.shape = value.type = None
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def pack_uint4(model: Any) -> None:
    """Give the parameters of `DequantizeAffine` their type: bytes `[R, C/2]` become UINT4 `[R, C]`."""
    import onnx_ir as ir

    for name, value in list(model.graph.initializers.items()):
        if not name.rpartition(".")[2].startswith(UINT4):
            continue
        data = value.const_value.numpy()
        shape = [data.shape[0], data.shape[1] * 2]
        value.const_value = ir.PackedTensor(
            data.reshape(-1), ir.DataType.UINT4, shape=ir.Shape(shape), name=name
        )
        value.shape, value.dtype = ir.Shape(shape), ir.DataType.UINT4


def _kind(node: Any) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporters' chatter, which is about their own internals."""
    loggers = [logging.getLogger(n) for n in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels):
                logger.setLevel(level)


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all distinct parameters and buffers."""
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers()) if t.numel()}
    return sum(math.prod(t.shape) * t.element_size() for t in tensors.values())
