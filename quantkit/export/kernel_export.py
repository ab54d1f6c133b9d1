"""`--to kernels`: the Triton kernels that a checkpoint's layers need, as binaries with the plan to launch them.

For every distinct product among the layers (shape, encoding, dtypes, bias) and every target, the launches
are recorded (`quantkit.kernels.launch_plan`), compiled without a GPU (`quantkit.kernels.aot`) and written
with a manifest (`kernel_manifest`), a C header (`kernel_header`) and the packed weights in the canonical
layout. Each binary's own list of parameters is compared with what the plan passes.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import quantkit
from quantkit.encoding import Affine, Codebook, PackedWeight
from quantkit.errors import QuantkitError, UsageError
from quantkit.export import elf, kernel_header
from quantkit.export.kernel_manifest import FORMAT, MANIFEST, WEIGHTS, product_key
from quantkit.kernels import dispatch
from quantkit.linear import QuantLinear
from quantkit.load import parse_dtype

#: What Triton's kernels take after their own arguments: two pointers to scratch memory, null here.
HIDDEN = [("global_scratch", "*u8"), ("profile_scratch", "*u8")]
#: The type of x that a target's matrix units lack.
_LACKS = {"sm_75": torch.bfloat16}


def check_targets(targets: Sequence[str], dtype: torch.dtype | None) -> None:
    """UsageError for unknown chips, for no chip, and where Triton is not installed."""
    if not targets:
        raise UsageError("--to kernels needs a chip", hint="Name one or more: -t sm_80 -t sm_90.")
    aot = _triton("quantkit.kernels.aot")
    for name in targets:
        aot.parse_target(name)
        if dtype is not None and _LACKS.get(name) == dtype:
            raise UsageError(f"{name} has no {_name(dtype)} matrix units", hint="Use --dtype float16.")


def _triton(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as missing:
        if (missing.name or "").split(".")[0] != "triton":
            raise
        raise UsageError(
            "--to kernels compiles with Triton, which is not installed",
            hint="Install triton (Linux); the exported kernels run without it.",
        ) from missing


def choose_dtype(model: Any, wanted: str | None) -> torch.dtype:
    """The dtype of x: `wanted`, else the checkpoint's."""
    if wanted is None:
        return getattr(model, "dtype", None) or torch.float16
    dtype = parse_dtype(wanted)
    if dtype == torch.float64:
        raise UsageError("the kernels do not compute in float64", hint="Use float16, bfloat16 or float32.")
    return dtype


def write(
    model: Any, folder: Path, targets: Sequence[str], dtype: torch.dtype, report: Callable[[str], None]
) -> dict[str, int]:
    """Write everything into `folder`; how many binaries there are of each kernel.

    UsageError when the model has no quantized layers; QuantkitError names a layer that has no kernel.
    """
    from safetensors.torch import save_file

    check_targets(targets, dtype)
    layers = {path: m for path, m in model.named_modules() if isinstance(m, QuantLinear)}
    if not layers:
        raise UsageError("the checkpoint has no quantized layers", hint="Convert it first: quantkit convert.")
    products: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[int, Any], Any]] = {}
    of_layer: dict[str, int] = {}
    weights: dict[str, Tensor] = {}
    for path, layer in layers.items():
        tensors = weight_tensors(layer, dtype)
        op, params = operation(layer.packed)
        key = product_key(
            op, _name(dtype), layer.shape, params, {n: _name(t.dtype) for n, t in tensors.items()}
        )
        if key not in products:
            shapes = {n: [_name(t.dtype), list(t.shape)] for n, t in tensors.items()}
            products[key] = {
                "key": key, "op": op, "shape": list(layer.shape), "params": list(params),
                "tensors": shapes, "plans": {},
            }  # fmt: skip
            calls[key] = _call_of(op, params, tensors, layer.shape, dtype)
        of_layer[path] = list(products).index(key)
        weights |= {f"{path}.{n}": t.contiguous() for n, t in tensors.items()}
    kernels = _Kernels(folder, report)
    for target in dict.fromkeys(targets):
        for key, product in products.items():
            layer_name = next(name for name, i in of_layer.items() if i == list(products).index(key))
            try:
                product["plans"][target] = _plan(calls[key], target, kernels)
            except QuantkitError as error:
                raise QuantkitError(f"{layer_name} for {target}: {error.what}", hint=error.hint) from error
    manifest = {
        "format": FORMAT, "quantkit": quantkit.__version__, "triton": _triton("triton").__version__,
        "dtype": _name(dtype), "targets": list(dict.fromkeys(targets)), "kernels": kernels.entries,
        "products": list(products.values()), "layers": of_layer,
    }  # fmt: skip
    save_file(weights, folder / WEIGHTS)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    for target in manifest["targets"]:
        if target.startswith("sm_"):
            text = kernel_header.header(manifest, target)
            (folder / target / kernel_header.NAME).write_text(text, encoding="utf-8")
    counts: dict[str, int] = {}
    for entry in kernels.entries:
        counts[entry["kernel"]] = counts.get(entry["kernel"], 0) + 1
    return counts


def weight_tensors(layer: QuantLinear, dtype: torch.dtype) -> dict[str, Tensor]:
    """The packed tensors of a layer and its bias, as the kernels take them for an x of `dtype`."""
    tensors = layer.packed.tensors()
    if "input_scale" in tensors:
        tensors["input_scale"] = tensors["input_scale"].float()
    if layer.bias is not None:
        tensors["bias"] = layer.bias.data.to(dtype)
    return tensors


def operation(packed: PackedWeight) -> tuple[str, tuple[Any, ...]]:
    """The op of `quantkit.kernels.ops` for a weight and its plain arguments."""
    encoding = packed.encoding
    if isinstance(encoding, Affine):
        return "affine_linear", (encoding.bits, encoding.group_size, packed.activation)
    if isinstance(encoding, Codebook):
        return "codebook_linear", (encoding.block_size,)
    return "float8_linear", (*encoding.block, packed.activation)


def arguments(
    op: str, params: tuple[Any, ...], x: Any, tensors: dict[str, Any], shape: tuple[int, int]
) -> Any:
    """Positional arguments of `op`."""
    get = tensors.get
    if op == "affine_linear":
        return (x, get("codes"), get("scale"), get("zero"), get("bias"), get("perm"), *params)
    if op == "codebook_linear":
        return (x, get("codes"), get("scale"), get("lut"), get("bias"), shape[0], *params)
    return (x, get("codes"), get("scale"), get("bias"), *params, get("input_scale"))


def _call_of(
    op: str, params: tuple[Any, ...], tensors: dict[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
) -> Callable[[int, Any], Any]:
    """call(rows, target) -> the recorded run of the product; rows 0: of its dequantization."""
    plan = _triton("quantkit.kernels.launch_plan")
    backend = importlib.import_module(dispatch.BACKENDS["cuda"][op.removesuffix("_linear")])
    meta = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in tensors.items()}

    def call(rows: int, target: Any) -> Any:
        if rows == 0:
            inputs = {k: v for k, v in meta.items() if k in ("codes", "scale", "zero", "perm", "lut")}
            dense = {
                "affine_linear": lambda: (*(meta.get(n) for n in ("codes", "scale", "zero", "perm")),
                                          *params[:2], shape[1], dtype),
                "codebook_linear": lambda: (meta["codes"], meta["scale"], meta["lut"], *shape, *params, dtype),
                "float8_linear": lambda: (meta["codes"], meta["scale"], *params[:2], dtype),
            }[op]()  # fmt: skip
            function = getattr(backend, "dequantize_" + op.removesuffix("_linear"))
            return plan.record_run(function, inputs, dense, target, 1)
        x = torch.empty(rows, shape[1], dtype=dtype, device="meta")
        given = arguments(op, params, x, meta, shape)
        return plan.record_run(getattr(backend, op), {"x": x, **meta}, given, target, rows)

    return call


def _plan(call: Callable[[int, Any], Any], target: str, kernels: _Kernels) -> dict[str, Any]:
    launch_plan = _triton("quantkit.kernels.launch_plan")
    chip = _triton("quantkit.kernels.aot").parse_target(target)
    regimes = [
        {
            "rows": [regime.first, regime.last],
            "scratch": [rule.to_json() for rule in regime.scratch.values()],
            "launches": [kernels.launch(step, target) for step in regime.steps],
        }
        for regime in launch_plan.regimes(lambda rows: call(rows, chip))
    ]
    dense = launch_plan.regime_of([call(0, chip)])
    return {"regimes": regimes, "dequantize": [kernels.launch(step, target) for step in dense.steps]}


class _Kernels:
    """The binaries written so far; equal launches share one."""

    def __init__(self, folder: Path, report: Callable[[str], None]) -> None:
        self.folder, self.report = folder, report
        self.entries: list[dict[str, Any]] = []
        self.index: dict[tuple[str, str], int] = {}

    def launch(self, step: Any, target: str) -> dict[str, Any]:
        """LAUNCH of the manifest for a recorded step."""
        passed = [value if isinstance(value, str) else _number(value) for _, value in step.arguments]
        grid = [rule.to_json() for rule in step.grid]
        return {
            "kernel": self._compiled(step.record, target),
            "grid": grid,
            "arguments": [*passed, "null", "null"],
        }

    def _compiled(self, record: Any, target: str) -> int:
        key = (target, record.key())
        if key not in self.index:
            aot = _triton("quantkit.kernels.aot")
            with aot.triton.knobs.compilation.scope():
                aot.triton.knobs.compilation.disable_line_info = True  # it names this machine's paths
                built = aot.compile_record(record, target)
            self.index[key] = len(self.entries)
            self.entries.append(self._checked(built, target))
            path = self.folder / built.entry["file"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(built.binary)
            self.report(built.entry["file"])
        return self.index[key]

    def _checked(self, built: Any, target: str) -> dict[str, Any]:
        entry, binary, cuda = dict(built.entry), built.binary, target.startswith("sm_")
        if any(entry.pop("scratch")):
            raise QuantkitError(
                f"{entry['kernel']} wants scratch memory of Triton's own", hint="Report this."
            )
        entry["parameters"] = [[n, t] for n, t in (*entry.pop("arguments").items(), *HIDDEN)]
        elf.check_signature(binary, entry["symbol"], [t for _, t in entry["parameters"]], cuda=cuda)
        entry["static_shared"] = elf.static_shared(binary, entry["symbol"]) if cuda else 0
        return entry


def _number(value: Any) -> Any:
    return {"float": value} if isinstance(value, float) else value.to_json()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
