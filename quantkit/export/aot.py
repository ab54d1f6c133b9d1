"""Exported kernels without Triton: `quantkit export CHECKPOINT --to kernels` loaded and launched.

    from quantkit.export import aot

    kernels = aot.load("out-kernels")                                 # binaries for the GPU that is here
    y = kernels.linear("model.layers.0.self_attn.q_proj", x)          # weights of the export
    y = kernels.affine_linear(x, codes, scale, zero, bias, perm, 4, 128, None)      # the op's arguments
    kernels.register()                                                # quantkit's ops answer with them

torch holds the memory and the stream; ctypes calls the driver; Triton is not imported. Up to the rows that
the manifest's plans cover, a product is what the plan says; beyond, the weight is dequantized by the
exported kernel and torch multiplies.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import QuantkitError, UsageError, did_you_mean
from quantkit.export.gpu_driver import Driver
from quantkit.export.kernel_manifest import ALIGN, TENSORS, WEIGHTS, product_key, read_manifest, rule_at
from quantkit.kernels import dispatch

_C_TYPES: dict[str, Any] = {
    "i32": ctypes.c_int32,
    "i64": ctypes.c_int64,
    "u32": ctypes.c_uint32,
    "fp32": ctypes.c_float,
}
OPS = ("affine_linear", "codebook_linear", "float8_linear")


def load(directory: str | os.PathLike[str], *, target: str | None = None) -> KernelLibrary:
    """The exported kernels in `directory` for the GPU that torch sees (or for `target`, of the manifest's).

    CheckpointError for a directory without a manifest, UsageError when no binary is for this GPU.
    """
    folder = Path(directory)
    manifest = read_manifest(folder)
    chosen = _chip(manifest["targets"]) if target is None else target
    if chosen not in manifest["targets"]:
        listed = ", ".join(manifest["targets"])
        raise UsageError(f"{folder} has no kernels for {chosen}, only {listed}", hint="Export them with -t.")
    return KernelLibrary(folder, manifest, chosen, Driver("cuda" if chosen.startswith("sm_") else "hip"))


def _chip(targets: list[str]) -> str:
    """The target to use on the GPU that is here."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if found is None or found.type != "cuda":
        raise UsageError("torch sees no GPU that these kernels could run on", hint="Check torch's build.")
    module = torch.get_device_module(found)
    properties = module.get_device_properties()
    amd = getattr(properties, "gcnArchName", "") if torch.version.hip else ""
    if amd:
        return str(amd).split(":")[0]
    major, minor = module.get_device_capability()
    exact = f"sm_{major}{minor}"
    # A cubin runs on later chips of its generation; Triton's for 9.0 and 10.0 are for that chip alone.
    older = [t for t in targets if t.startswith("sm_8") and major == 8 and int(t[3:]) < 10 * major + minor]
    return exact if exact in targets or not older else max(older)


class Layer:
    """A layer of the export: its product's index and its tensors, on one device."""

    def __init__(self, product: int, tensors: dict[str, Tensor]) -> None:
        self.product, self.tensors = product, tensors


class KernelLibrary:
    """Kernels of one target; see the module's docstring. `layers` are the names of the export's layers."""

    def __init__(self, folder: Path, manifest: dict[str, Any], target: str, driver: Driver) -> None:
        self.folder, self.manifest, self.target, self.driver = folder, manifest, target, driver
        self.products: list[dict[str, Any]] = manifest["products"]
        self.layers = list(manifest["layers"])
        self._index = {p["key"]: i for i, p in enumerate(self.products)}
        self._keys: dict[tuple[Any, ...], int | None] = {}
        self._functions: dict[tuple[int | None, int], int] = {}
        self._loaded: dict[tuple[str, str], Layer] = {}
        self._regimes = [p["plans"][target]["regimes"] for p in self.products]

    # -- by the export's layers --------------------------------------------------------------------

    def layer(self, name: str, device: torch.device | str) -> Layer:
        """The layer's tensors on `device`, read once."""
        from safetensors import safe_open

        if name not in self.manifest["layers"]:
            raise UsageError(f"the export has no layer {name!r}", hint=did_you_mean(name, self.layers))
        key = (name, str(device))
        if key not in self._loaded:
            product = int(self.manifest["layers"][name])
            with safe_open(self.folder / WEIGHTS, framework="pt") as file:
                names = self.products[product]["tensors"]
                tensors = {part: file.get_tensor(f"{name}.{part}").to(device) for part in names}
            self._loaded[key] = Layer(product, tensors)
        return self._loaded[key]

    def linear(self, name: str, x: Tensor) -> Tensor:
        """`x [..., K]` times the layer's weight, plus its bias: `[..., N]`."""
        layer = self.layer(name, x.device)
        return self._product(layer.product, x, layer.tensors)

    # -- by the ops' arguments ---------------------------------------------------------------------

    def affine_linear(
        self, x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, perm: Tensor | None,
        bits: int, group_size: int, activation: str | None,
    ) -> Tensor:  # fmt: skip
        """quantkit::affine_linear; NotImplemented for a product that was not exported."""
        tensors = {"codes": codes, "scale": scale, "zero": zero, "bias": bias, "perm": perm}
        shape = (codes.shape[0], x.shape[-1])
        return self._call("affine_linear", x, shape, (bits, group_size, activation), tensors)

    def codebook_linear(
        self, x: Tensor, codes: Tensor, scale: Tensor, lut: Tensor, bias: Tensor | None, out_features: int,
        block_size: int,
    ) -> Tensor:  # fmt: skip
        """quantkit::codebook_linear; NotImplemented for a product that was not exported."""
        tensors = {"codes": codes, "scale": scale, "lut": lut, "bias": bias}
        return self._call("codebook_linear", x, (out_features, x.shape[-1]), (block_size,), tensors)

    def float8_linear(
        self, x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, block_n: int, block_k: int,
        activation: str | None, input_scale: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """quantkit::float8_linear; NotImplemented for a product that was not exported."""
        given = None if input_scale is None else input_scale.float()
        tensors = {"codes": codes, "scale": scale, "bias": bias, "input_scale": given}
        shape = (codes.shape[0], codes.shape[1])
        return self._call("float8_linear", x, shape, (block_n, block_k, activation), tensors)

    def register(self) -> None:
        """Let quantkit's ops on this library's kind of device run these kernels (the reference where none fits)."""
        for op in OPS:
            dispatch.install(op, "cuda", getattr(self, op))

    def _call(
        self,
        op: str,
        x: Tensor,
        shape: tuple[int, int],
        params: tuple[Any, ...],
        given: dict[str, Tensor | None],
    ) -> Tensor:
        tensors = {name: t for name in TENSORS if (t := given.get(name)) is not None}
        quick = (op, x.dtype, shape, params, tuple((n, t.dtype) for n, t in tensors.items()))
        if quick not in self._keys:
            dtypes = {n: str(t.dtype).removeprefix("torch.") for n, t in tensors.items()}
            key = product_key(op, str(x.dtype).removeprefix("torch."), shape, params, dtypes)
            self._keys[quick] = self._index.get(key)
        product = self._keys[quick]
        if product is None or x.numel() == 0:
            return NotImplemented
        return self._product(product, x, tensors)

    # -- launching ---------------------------------------------------------------------------------

    def _product(self, index: int, x: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        product = self.products[index]
        n, k = product["shape"]
        wanted = self.manifest["dtype"]
        if x.shape[-1] != k or str(x.dtype) != f"torch.{wanted}":
            raise UsageError(
                f"x is {x.dtype} with {x.shape[-1]} features; this product takes {wanted} with {k}"
            )
        rows = _aligned(x.reshape(-1, k))
        tensors = {name: _aligned(t) for name, t in tensors.items()}
        out = rows.new_empty(rows.shape[0], n)
        if rows.shape[0] > 0:
            with _on(x):
                self._rows(index, rows, tensors, out)
        return out.view(*x.shape[:-1], n)

    def _rows(self, index: int, x: Tensor, tensors: dict[str, Tensor], out: Tensor) -> None:
        count = x.shape[0]
        regimes = self._regimes[index]
        regime = next((r for r in regimes if count <= r["rows"][1]), None)
        if regime is not None:
            self._run(regime["launches"], regime["scratch"], count, {"x": x, "out": out, **tensors})
        elif self.products[index]["op"] == "codebook_linear" or self.products[index]["params"][-1] is None:
            self._dense(index, x, tensors, out)
        else:  # inputs are rounded by the plan's kernels
            most = regimes[-1]["rows"][1]
            for start in range(0, count, most):
                self._rows(index, x[start : start + most], tensors, out[start : start + most])

    def _dense(self, index: int, x: Tensor, tensors: dict[str, Tensor], out: Tensor) -> None:
        n, k = self.products[index]["shape"]
        dense = x.new_empty(n, k)
        launches = self.products[index]["plans"][self.target]["dequantize"]
        self._run(launches, [], 1, {"out": dense, **tensors})
        bias = tensors.get("bias")
        torch.mm(x, dense.T, out=out) if bias is None else torch.addmm(bias, x, dense.T, out=out)

    def _run(
        self, launches: list[dict[str, Any]], scratch: list[Any], rows: int, tensors: dict[str, Tensor]
    ) -> None:
        addresses = {name: t.data_ptr() for name, t in tensors.items()} | {"null": 0}
        x = tensors["out"]
        sizes = [-(-rule_at(rule, rows) // ALIGN) * ALIGN for rule in scratch]
        if sizes:
            memory = torch.empty(sum(sizes), dtype=torch.uint8, device=x.device)
            for i in range(len(sizes)):
                addresses[f"scratch{i}"] = memory.data_ptr() + sum(sizes[:i])
        stream = (
            0 if x.device.type == "cpu" else torch.get_device_module(x.device).current_stream().cuda_stream
        )
        for launch in launches:
            entry = self.manifest["kernels"][launch["kernel"]]
            values = [
                _value(argument, kind, addresses, rows)
                for argument, (_, kind) in zip(launch["arguments"], entry["parameters"])
            ]
            pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
            grid = launch["grid"]
            sizes3 = (rule_at(grid[0], rows), rule_at(grid[1], rows), rule_at(grid[2], rows))
            function = self._function(launch["kernel"], x.device.index)
            self.driver.launch(function, sizes3, entry["threads"], entry["shared"], stream, pointers)

    def _function(self, kernel: int, device: int | None) -> int:
        key = (device, kernel)
        if key not in self._functions:
            entry = self.manifest["kernels"][kernel]
            file = self.folder / entry["file"]
            self._functions[key] = self.driver.load(file, entry["symbol"], entry["shared"])
        return self._functions[key]


def _aligned(tensor: Tensor) -> Tensor:
    """Contiguous, at an address that 16 divides: what the kernels were compiled for."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _value(argument: Any, kind: str, addresses: dict[str, int], rows: int) -> Any:
    """The ctypes value of an ARGUMENT."""
    if isinstance(argument, str):
        if argument not in addresses:
            raise QuantkitError(f"the product needs the tensor {argument!r}")
        return ctypes.c_uint64(addresses[argument])
    if isinstance(argument, dict) and "float" in argument:
        return ctypes.c_float(argument["float"])
    return _C_TYPES[kind](rule_at(argument, rows))


def _on(x: Tensor) -> Any:
    """Launches go to the current device: make it that of `x`."""
    import contextlib

    if x.device.type == "cpu":
        return contextlib.nullcontext()
    return torch.accelerator.device_index(x.device.index)
