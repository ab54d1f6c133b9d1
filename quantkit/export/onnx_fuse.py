"""Fewer, larger nodes in a traced decoder, with onnxruntime's own operators where they do the work of several.

    - Transpose of a Transpose, Reshape of a Reshape around attention                 nothing
    - products of one input with several packed weights (q, k, v; gate, up)           one product
    - q, k and v taken from one product by GroupQueryAttention                        packed input
    - Add, then RMSNormalization                                                      SkipSimplifiedLayerNormalization

Weights are joined by Concat nodes over initializers: onnxruntime computes those once, when it opens the file.
A small model's decode step is little but the overhead of its nodes: see docs/benchmarks/export.md.
"""

from __future__ import annotations

from typing import Any

_MS = "com.microsoft"


def fuse(model: Any) -> None:
    """Rewrite an onnx_ir model in place; the numbers it computes stay the same."""
    from onnx_ir.passes import common

    common.CommonSubexpressionEliminationPass()(model)
    graph = model.graph
    for node in list(graph):
        if node.op_type == "GroupQueryAttention":
            _drop_reshapes(node)
    common.RemoveUnusedNodesPass()(model)
    for nodes in _siblings(graph):
        _join_products(graph, nodes)
    for node in list(graph):
        if node.op_type == "GroupQueryAttention":
            _pack_attention(node)
        elif node.op_type == "RMSNormalization":
            _absorb_add(graph, node)
    common.RemoveUnusedNodesPass()(model)
    common.TopologicalSortPass()(model)
    if any(node.domain == _MS for node in graph):
        model.opset_imports.setdefault(_MS, 1)


# -- reshapes around attention ---------------------------------------------------------------------


def _drop_reshapes(attention: Any) -> None:
    """`[B, S, H*D]` -> heads apart -> transposed -> transposed back -> `[B, S, H*D]` is no work at all."""
    for i in range(3):
        source = _before_reshapes(attention.inputs[i])
        if source is not None:
            attention.replace_input_with(i, source)
    out = attention.outputs[0]
    for first in [n for n, _ in out.uses() if n.op_type == "Reshape"]:
        for second in [n for n, _ in first.outputs[0].uses() if n.op_type == "Reshape"]:
            second.outputs[0].replace_all_uses_with(out)


def _before_reshapes(value: Any) -> Any:
    """What two Reshapes, or a pair of Transposes between two, made `value` of, numbers where they were; or None."""
    kinds = []
    while (node := value.producer()) is not None and node.op_type in ("Reshape", "Transpose"):
        kinds.append(node.op_type)
        if node.op_type == "Transpose" and list(node.attributes["perm"].as_ints()) != [0, 2, 1, 3]:
            return None
        value = node.inputs[0]
    chains = (["Reshape", "Reshape"], ["Reshape", "Transpose", "Transpose", "Reshape"])
    return value if kinds in chains and len(value.shape or ()) in (0, 3) else None


# -- products of one input --------------------------------------------------------------------------


def _siblings(graph: Any) -> list[list[Any]]:
    """Groups of MatMulNBits nodes that multiply the same input and differ in nothing but N."""
    groups: dict[Any, list[Any]] = {}
    for node in graph:
        if node.op_type == "MatMulNBits":
            key = tuple((n, a.value) for n, a in sorted(node.attributes.items()) if n != "N")
            given = tuple(value is not None for value in node.inputs)
            groups.setdefault((node.inputs[0], key, given), []).append(node)
    return [nodes for nodes in groups.values() if len(nodes) > 1]


def _join_products(graph: Any, nodes: list[Any]) -> None:
    import onnx_ir as ir

    first = nodes[0]
    sizes = [node.attributes["N"].as_int() for node in nodes]
    inputs = [first.inputs[0]]
    for i in range(1, len(first.inputs)):
        parts = [node.inputs[i] for node in nodes]
        if parts[0] is None:
            inputs.append(None)
            continue
        joined = ir.node("Concat", parts, {"axis": 0})
        graph.append(joined)
        inputs.append(joined.outputs[0])
    attributes = {name: a.value for name, a in first.attributes.items()} | {"N": sum(sizes)}
    product = ir.node("MatMulNBits", inputs, attributes, domain=_MS)
    split_sizes = ir.tensor(sizes, dtype=ir.DataType.INT64, name=f"{first.outputs[0].name}_sizes")
    value = ir.Value(name=split_sizes.name, const_value=split_sizes)
    value.shape, value.dtype = ir.Shape([len(sizes)]), ir.DataType.INT64
    graph.register_initializer(value)
    split = ir.node("Split", [product.outputs[0], value], {"axis": -1}, num_outputs=len(sizes))
    graph.extend([product, split])
    for node, out in zip(nodes, split.outputs):
        node.outputs[0].replace_all_uses_with(out)


def _pack_attention(attention: Any) -> None:
    """q, k, v that are all of one product, in order: the operator takes the product itself."""
    if attention.attributes.get("do_rotary") is None:
        return
    parts = [value.producer() for value in attention.inputs[:3]]
    if any(p is None for p in parts):
        return
    if parts[0].op_type == "Split" and parts[0] is parts[1] is parts[2]:
        whole = parts[0].inputs[0]
        if list(parts[0].outputs) != list(attention.inputs[:3]):
            return
    else:
        whole = _sliced(parts)
    if whole is not None:
        for i, value in enumerate((whole, None, None)):
            attention.replace_input_with(i, value)


def _sliced(parts: list[Any]) -> Any:
    """The value whose last axis three Slice nodes divide among them (Phi-3's qkv_proj); None otherwise."""
    if any(p.op_type != "Slice" or p.inputs[0] is not parts[0].inputs[0] for p in parts):
        return None
    end = 0
    for part in parts:
        if len(part.inputs) < 4 or any(value.const_value is None for value in part.inputs[1:]):
            return None
        start, stop, axis = (int(value.const_value.numpy()[0]) for value in part.inputs[1:4])
        if start != end or axis not in (2, -1):
            return None
        end = stop
    return parts[0].inputs[0]


# -- norms --------------------------------------------------------------------------------------------


def _absorb_add(graph: Any, norm: Any) -> None:
    """`RMSNormalization(a + b)` as one operator that returns the sum too."""
    import onnx_ir as ir

    add = norm.inputs[0].producer()
    if add is None or add.op_type != "Add" or any(v.is_initializer() for v in add.inputs):
        return
    if any(v.shape is None or v.shape != add.outputs[0].shape for v in add.inputs):
        return
    attributes = {"epsilon": norm.attributes["epsilon"].as_float()}
    node = ir.node(
        "SkipSimplifiedLayerNormalization",
        [*add.inputs, norm.inputs[1]],
        attributes,
        domain=_MS,
        num_outputs=4,
    )
    for unused in node.outputs[1:3]:
        unused.name = ""
    for value in (node.outputs[0], node.outputs[3]):
        value.shape, value.dtype = add.outputs[0].shape, add.outputs[0].dtype
    graph.append(node)
    norm.outputs[0].replace_all_uses_with(node.outputs[0])
    add.outputs[0].replace_all_uses_with(node.outputs[3])
