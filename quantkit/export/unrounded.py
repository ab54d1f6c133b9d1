"""An artifact's graph with the rounding of activations taken out, for the proof.

A rounded artifact and its reference agree only up to what rounding does: a last bit that falls the other way
changes all roundings after it. Behind that an error in the weights or the wiring can hide. So the proof also
runs the written artifact, its weights as they lie in the file, with these changes to the graph alone:

    ONNX             MatMulNBits: accuracy_level 1. Round of activations: nothing.
                     Clip, then Cast to float8, of activations: nothing (a stored scale clips outliers).
    torch.export     the same, in aten; quantkit's own operators: activation None

What then remains is float32 arithmetic, which is compared with the reference without rounding as tightly as
any other export. Rounding of weights (zeros, when the file is opened) stays.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def onnx_bytes(file: Path) -> bytes:
    """The graph of an ONNX file without rounding, serialized; external data stays where it is."""
    import onnx

    model = onnx.load(str(file), load_external_data=False)
    graph = model.graph
    active = {value.name for value in graph.input}  # what depends on inputs, not on weights alone
    source: dict[str, str] = {}  # outputs of nodes that go -> what stands for them
    clipped: dict[str, str] = {}
    kept = []
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = source.get(name, name)
        if active.isdisjoint(node.input):
            kept.append(node)
            continue
        active.update(node.output)
        if node.op_type == "MatMulNBits":
            _set(node, "accuracy_level", 1)
        elif node.op_type == "Clip":
            clipped[node.output[0]] = node.input[0]
        elif node.op_type == "Round":
            source[node.output[0]] = node.input[0]
            continue
        elif node.op_type == "Cast" and _to(node) == onnx.TensorProto.FLOAT8E4M3FN:
            source[node.output[0]] = clipped.get(node.input[0], node.input[0])
            continue
        kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)
    return bytes(model.SerializeToString())


def _set(node: Any, name: str, value: int) -> None:
    for attribute in node.attribute:
        if attribute.name == name:
            attribute.i = value


def _to(node: Any) -> int:
    return next(int(a.i) for a in node.attribute if a.name == "to")


def program(exported: Any) -> Any:
    """The module of an `ExportedProgram` without rounding; `exported` itself is left as it is."""
    module, aten = exported.module(), torch.ops.aten
    graph = module.graph
    active: set[Any] = set()  # what depends on inputs, not on weights alone
    for node in list(graph.nodes):
        if node.op == "placeholder" or not active.isdisjoint(node.all_input_nodes):
            active.add(node)
        if node not in active or node.op != "call_function":
            continue
        if node.target == aten.round.default:
            node.replace_all_uses_with(node.args[0])
        elif node.target == aten._to_copy.default and node.kwargs.get("dtype") == torch.float8_e4m3fn:
            before = node.args[0]
            node.replace_all_uses_with(before.args[0] if before.target == aten.clamp.default else before)
        elif node.target == aten._assert_tensor_metadata.default:  # of a dtype that is float32 now
            graph.erase_node(node)
        elif getattr(node.target, "namespace", "") == "quantkit":
            for i, argument in enumerate(node.target._schema.arguments):
                if argument.name == "activation":
                    node.update_arg(i, None)
    graph.eliminate_dead_code()
    module.recompile()
    return module
