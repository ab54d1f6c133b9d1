"""What `quantkit bench kernels` multiplies with: random weights of every format, and who multiplies.

A *candidate* takes a `PackedWeight` and answers with a function of `x [M, K]`, or None where it does not
cover the weight, the device or the dtype. Peers take part where they are installed.

    quantkit        the ops (on a CPU: exact activations)        quantkit-int8   CPU: int8 activations
    reference       plain torch: dequantize, then BLAS           dense           torch on the dense weight
    torch-int4      aten::_weight_int4pack_mm                    onnxruntime     MatMulNBits, level 1 / 4
    bitsandbytes    matmul_4bit (NF4, FP4)                       gemlite         GemLiteLinear (affine)
    marlin          vLLM's GPTQ-Marlin product (affine, 4 and 8 bits, NVIDIA)

Peers get the weight in their own layout, packed before the clock starts.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from quantkit.encoding import Affine, Codebook, Float8, PackedWeight, affine_codes, dequantize
from quantkit.kernels import bench_marlin, ops, reference

Product = Callable[[Tensor], Tensor]
Candidate = Callable[[PackedWeight, torch.dtype], Product | None]

#: The package behind each peer; any of several, where there are several.
PACKAGES = {
    "onnxruntime": "onnxruntime", "onnxruntime-int8": "onnxruntime", "bitsandbytes": "bitsandbytes",
    "gemlite": "gemlite", "marlin": "vllm",
}  # fmt: skip


def missing(candidates: Iterable[str]) -> dict[str, str]:
    """Which of `candidates` cannot take part because a package is not installed: name -> package."""
    wanted = {name: PACKAGES[name] for name in candidates if name in PACKAGES}
    return {name: package for name, package in wanted.items() if find_spec(package) is None}


#: NF4 and FP4 tables as bitsandbytes has them are taken from it where it is installed; these are enough
#: for timing, and for errors against the same table.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


def random_weight(form: str, n: int, k: int, device: torch.device) -> PackedWeight:
    """A weight `[n, k]` of format `form` with random codes, scaled so that rows have norm about 1."""
    kind, _, detail = form.partition("-")
    size = (3.0 / k) ** 0.5
    if kind in ("affine", "hqq", "ternary"):
        bits, group = (2, k) if kind == "ternary" else (int(detail[0]), int(detail.split("g")[1]))
        groups, top = -(-k // group), 2**bits - 1
        width = (k * bits + 7) // 8 if bits != 3 else (k + 3) // 4 + (k + 7) // 8
        codes = torch.randint(0, 256, (n, width), dtype=torch.uint8, device=device)
        scale = (torch.rand(n, groups, device=device) + 0.5) * (2 * size / top)
        if kind == "ternary":
            codes = (codes & 0x55) + ((codes >> 1) & 0x55)  # pairs of bits 00, 01, 10: codes 0, 1, 2
            zero = torch.ones(n, 1, dtype=torch.uint8, device=device)
            return PackedWeight(Affine(2, k), (n, k), codes, scale, zero)
        if kind == "hqq":
            zero = (torch.rand(n, groups, device=device) * top).half()  # as loaded from hqq's files
        else:
            zero = torch.randint(0, top + 1, (n, groups), dtype=torch.uint8, device=device)
        return PackedWeight(Affine(bits, group), (n, k), codes, scale.half(), zero)
    if kind == "nf4":
        codes = torch.randint(0, 256, ((n * k + 1) // 2,), dtype=torch.uint8, device=device)
        scale = (torch.rand(-(-n * k // 64), device=device) + 0.5) * size
        lut = torch.tensor(_NF4, device=device)
        return PackedWeight(Codebook(4, 64), (n, k), codes, scale, lut=lut)
    if kind == "fp8":
        block = {"tensor": (n, k), "channel": (1, k), "block": (128, 128)}[detail.split("-")[0]]
        codes = (torch.randn(n, k, device=device) * 64).clamp_(-448, 448).to(torch.float8_e4m3fn)
        shape = (-(-n // block[0]), -(-k // block[1]))
        scale = (torch.rand(shape, device=device) + 0.5) * (size / 64)
        activation = {"a8": "fp8_group128" if "block" in detail else "fp8_token"}.get(detail.split("-")[-1])
        return PackedWeight(
            Float8(block),
            (n, k),
            codes.view(torch.uint8),
            scale,
            activation=activation,  # type: ignore[arg-type]
        )
    raise ValueError(f"unknown format {form!r}")


#: Names that `random_weight` takes and the command line offers.
FORMATS = (
    "affine-4g128", "affine-4g32", "affine-8g128", "affine-3g128", "affine-2g128", "affine-1g128", "hqq-4g64",
    "ternary", "nf4", "fp8-tensor", "fp8-channel", "fp8-block", "fp8-channel-a8", "fp8-block-a8",
)  # fmt: skip


def run_op(packed: PackedWeight) -> Product:
    """The layer as `QuantLinear` calls it."""
    enc, codes, scale = packed.encoding, packed.codes, packed.scale
    if isinstance(enc, Affine):
        tail = (packed.zero, None, packed.perm, enc.bits, enc.group_size, packed.activation)
        return lambda x: ops.affine_linear(x, codes, scale, *tail)
    if isinstance(enc, Codebook):
        n = packed.shape[0]
        return lambda x: ops.codebook_linear(x, codes, scale, packed.lut, None, n, enc.block_size)
    tail8 = (None, *enc.block, packed.activation, packed.input_scale)
    return lambda x: ops.float8_linear(x, codes, scale, *tail8)


def _quantkit(packed: PackedWeight, dtype: torch.dtype) -> Product:
    return run_op(packed)


def _quantkit_int8(packed: PackedWeight, dtype: torch.dtype) -> Product | None:
    if packed.codes.device.type != "cpu" or not isinstance(packed.encoding, Affine) or packed.activation:
        return None
    return run_op(replace(packed, activation="int8_block"))


def _reference(packed: PackedWeight, dtype: torch.dtype) -> Product:
    return lambda x: reference.quant_linear(x, packed)


def _dense(packed: PackedWeight, dtype: torch.dtype) -> Product:
    weight = dequantize(packed, dtype)
    return lambda x: torch.nn.functional.linear(x, weight)


def _torch_int4(packed: PackedWeight, dtype: torch.dtype) -> Product | None:
    enc, device = packed.encoding, packed.codes.device.type
    if not isinstance(enc, Affine) or enc.bits != 4 or enc.group_size not in (32, 64, 128, 256):
        return None
    if device not in ("cpu", "cuda") or (device == "cuda" and dtype != torch.bfloat16):
        return None
    assert packed.zero is not None
    scale = packed.scale.float()
    pairs = torch.stack([scale.t(), ((8 - packed.zero.float()) * scale).t()], dim=-1).to(dtype).contiguous()
    codes, group = affine_codes(packed), enc.group_size
    if device == "cpu":
        weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
        return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight, group, pairs)
    # On CUDA the operator takes bytes with the first code in the high nibble.
    weight = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, weight, group, pairs)


def _bitsandbytes(packed: PackedWeight, dtype: torch.dtype) -> Product | None:
    if not isinstance(packed.encoding, Codebook) or find_spec("bitsandbytes") is None:
        return None
    bnb = importlib.import_module("bitsandbytes")
    state = bnb.functional.QuantState(
        packed.scale,
        shape=torch.Size(packed.shape),
        code=packed.lut,
        blocksize=packed.encoding.block_size,
        quant_type="nf4",
        dtype=dtype,
    )
    weight = packed.codes.view(-1, 1)
    return lambda x: bnb.matmul_4bit(x, weight.t(), quant_state=state)


def _gemlite(packed: PackedWeight, dtype: torch.dtype) -> Product | None:
    enc = packed.encoding
    if packed.codes.device.type == "cpu" or find_spec("gemlite") is None:
        return None
    if not isinstance(enc, Affine) or enc.bits == 3 or dtype == torch.float32:
        return None
    core: Any = importlib.import_module("gemlite.core")
    kind = {torch.float16: core.DType.FP16, torch.bfloat16: core.DType.BF16}[dtype]
    n, k = packed.shape
    layer = core.GemLiteLinear(enc.bits, enc.group_size, k, n, input_dtype=kind, output_dtype=kind)
    assert packed.zero is not None
    layer.pack(affine_codes(packed), packed.scale.to(dtype), packed.zero.to(dtype), None)
    return lambda x: layer(x)


def _onnxruntime(level: int) -> Candidate:
    def prepare(packed: PackedWeight, dtype: torch.dtype) -> Product | None:
        from quantkit.kernels import cpu_sessions

        enc, k = packed.encoding, packed.shape[1]
        if packed.codes.device.type != "cpu" or dtype != torch.float32 or not cpu_sessions.available():
            return None
        if not isinstance(enc, Affine) or enc.bits not in (2, 4, 8) or k % enc.group_size:
            return None
        if packed.zero is None or packed.zero.is_floating_point() or enc.group_size & (enc.group_size - 1):
            return None
        return _plain_session(packed, enc, level)

    return prepare


def _plain_session(packed: PackedWeight, enc: Affine, level: int) -> Product:
    """onnxruntime as its own documentation uses it: `run` with numpy arrays, weights inside the model."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    from quantkit import bitpack

    n, k = packed.shape
    assert packed.zero is not None
    weights = {
        "b": packed.codes.view(n, k // enc.group_size, -1).numpy(),
        "scales": packed.scale.float().numpy(),
        "zeros": bitpack.pack_low(packed.zero, enc.bits).numpy(),
    }
    node = helper.make_node(
        "MatMulNBits", ["x", *weights], ["y"], domain="com.microsoft", N=n, K=k, bits=enc.bits,
        block_size=enc.group_size, accuracy_level=level,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "peer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["M", n])],
        initializer=[numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


CANDIDATES: dict[str, Candidate] = {
    "quantkit": _quantkit,
    "quantkit-int8": _quantkit_int8,
    "reference": _reference,
    "dense": _dense,
    "torch-int4": _torch_int4,
    "onnxruntime": _onnxruntime(1),
    "onnxruntime-int8": _onnxruntime(4),
    "bitsandbytes": _bitsandbytes,
    "gemlite": _gemlite,
    "marlin": bench_marlin.prepare,
}
#: What runs unless asked otherwise: everything but the slow definition.
DEFAULT_CANDIDATES = tuple(name for name in CANDIDATES if name != "reference")
