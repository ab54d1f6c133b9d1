"""Logits of a quantized checkpoint, computed by the library that owns its format; see docs/peers.md.

    python logits.py --loader transformers --model DIR --ids IDS.npy --out LOGITS.npy [--weights W.safetensors]

IDS.npy is int64 [B, T]; LOGITS.npy becomes float32 [B, T, vocab]. `--weights` also writes every quantized
layer's dequantized weight [out, in], under `<layer>.weight`, in the dtype the owner computes it in.
"""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from peer_common import dtype_of, prepare_environment, read_json, staged, versions

# A layer is quantized where the checkpoint holds one of these beside its name.
MARKERS = (
    ".W_q",
    ".qweight",
    ".weight_packed",
    ".weight_scale",
    ".weight_scale_inv",
    ".weight.absmax",
)
IDENTITY_ROWS = 512
# gptqmodel's torch kernels refuse float32; autoawq multiplies in float16 whatever it is given.
DEFAULT_DTYPES = {"gptqmodel": "float16", "autoawq": "float16"}


def checkpoint_keys(model: Path) -> list[str]:
    """Tensor names, from the safetensors headers alone."""
    from safetensors import safe_open

    names: list[str] = []
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names.extend(file.keys())
    return names


def quantized_layers(keys: list[str]) -> list[str]:
    found = {key.removesuffix(marker) for key in keys for marker in MARKERS if key.endswith(marker)}
    return sorted(found)


# --- loaders -----------------------------------------------------------------------------------


def from_transformers(model: Path, dtype: Any, args: argparse.Namespace) -> Any:
    """transformers reads `quantization_config` and calls the owner itself."""
    import transformers

    legacy = transformers.__version__.startswith("4.")
    config = read_json(model / "config.json").get("quantization_config", {})
    options: dict[str, Any] = {("torch_dtype" if legacy else "dtype"): dtype, "device_map": "cpu"}
    if config.get("quant_method") == "hqq" and legacy:
        from peer_patches import allow_hqq_without_gpu

        allow_hqq_without_gpu(dtype)
    if config.get("quant_method") == "bitsandbytes" and args.compute_dtype:
        config["bnb_4bit_compute_dtype"] = args.compute_dtype
        options["quantization_config"] = transformers.BitsAndBytesConfig.from_dict(config)
    if config.get("quant_method") == "gptq" and args.backend:
        options["quantization_config"] = transformers.GPTQConfig.from_dict(
            {**config, "backend": args.backend}
        )
    if config.get("quant_method") == "compressed-tensors" and not args.run_compressed:
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    network = transformers.AutoModelForCausalLM.from_pretrained(model, **options)
    if config.get("quant_method") == "bitsandbytes":
        from peer_patches import plain_bitsandbytes_on_cpu

        plain_bitsandbytes_on_cpu(network)
    if config.get("quant_method") in ("fp8", "bitnet"):
        network.to(dtype)  # in float32 these two would load tensors of two dtypes and fail to multiply them
    return network


def from_gptqmodel(model: Path, dtype: Any, args: argparse.Namespace) -> Any:
    from gptqmodel import BACKEND, GPTQModel

    method = read_json(model / "config.json").get("quantization_config", {}).get("quant_method")
    backend = BACKEND(args.backend or ("awq_torch" if method == "awq" else "gptq_torch"))
    wrapped = GPTQModel.load(str(model), device="cpu", dtype=dtype, backend=backend)
    return wrapped.model


def from_autoawq(model: Path, dtype: Any, args: argparse.Namespace) -> Any:
    from awq import AutoAWQForCausalLM
    from peer_patches import allow_autoawq_without_ipex

    allow_autoawq_without_ipex()
    wrapped = AutoAWQForCausalLM.from_quantized(
        str(model), fuse_layers=False, device_map={"": "cpu"}, torch_dtype=dtype, use_ipex=False
    )
    return wrapped.model


def from_hqq(model: Path, dtype: Any, args: argparse.Namespace) -> Any:
    """hqq's own layers, filled from safetensors (transformers' layout) or from hqq's qmodel.pt."""
    import torch
    from hqq.core.quantize import HQQLinear
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    if (model / "qmodel.pt").is_file():
        from hqq.models.hf.base import AutoHQQHFModel

        return AutoHQQHFModel.from_quantized(str(model), compute_dtype=dtype, device="cpu")
    tensors: dict[str, Any] = {}
    for path in sorted(model.glob("*.safetensors")):
        tensors.update(load_file(path))
    with staged(model, drop_quantization=True) as plain:
        network = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(plain)).to(dtype)
    for name in quantized_layers(list(tensors)):
        prefix = name + "."
        state = {
            key.removeprefix(prefix): tensors.pop(key) for key in list(tensors) if key.startswith(prefix)
        }
        layer = HQQLinear(None, None, compute_dtype=dtype, device="cpu")
        layer.load_state_dict(state)
        # The file's compute dtype wins inside hqq; scales and zeros must follow the one asked for.
        layer.meta.update(
            compute_dtype=dtype, scale=layer.meta["scale"].to(dtype), zero=layer.meta["zero"].to(dtype)
        )
        network.set_submodule(name, layer)
    own = {name for name, _ in network.named_parameters() if not name.endswith(".W_q")}
    rest = {name: value.to(dtype) for name, value in tensors.items()}
    for name in own & rest.keys():
        with torch.no_grad():
            network.get_parameter(name).copy_(rest[name])
    missing = own - rest.keys() - ({"lm_head.weight"} if network.config.tie_word_embeddings else set())
    if missing or rest.keys() - own - {"lm_head.weight"}:
        raise SystemExit(f"{model}: missing {sorted(missing)}, unexpected {sorted(rest.keys() - own)}")
    return network


LOADERS: dict[str, Callable[[Path, Any, argparse.Namespace], Any]] = {
    "transformers": from_transformers,
    "gptqmodel": from_gptqmodel,
    "autoawq": from_autoawq,
    "hqq": from_hqq,
    "bitsandbytes": from_transformers,
    "compressed-tensors": from_transformers,
}


# --- weights -----------------------------------------------------------------------------------


def identity_blocks(size: int, dtype: Any) -> Iterator[Any]:
    """The identity matrix, a few rows at a time."""
    import torch

    for start in range(0, size, IDENTITY_ROWS):
        rows = min(IDENTITY_ROWS, size - start)
        block = torch.zeros(rows, size, dtype=dtype)
        block[torch.arange(rows), torch.arange(start, start + rows)] = 1
        yield block


def dense_weight(layer: Any, dtype: Any) -> Any:
    """The weight [out, in] as this layer computes it: by its own function, or by multiplying the identity."""
    import torch

    if type(layer).__name__ == "HQQLinear":
        return layer.dequantize()
    weight = getattr(layer, "weight", None)
    if getattr(weight, "quant_state", None) is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    if type(layer).__name__ == "AutoBitLinear":
        return layer.weight * layer.weight_scale
    if type(layer).__name__ == "BitLinear":  # activations are int8, which the identity survives
        dtype = layer.dtype or dtype
    elif isinstance(layer, torch.nn.Linear) and weight.dtype in (
        torch.float32,
        torch.bfloat16,
        torch.float16,
    ):
        return weight
    bias, layer.bias = layer.bias, None  # adding and subtracting it would round
    columns = [layer(block).reshape(len(block), -1) for block in identity_blocks(layer.in_features, dtype)]
    layer.bias = bias
    return torch.cat(columns).T


def write_weights(network: Any, names: list[str], dtype: Any, path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    with torch.inference_mode():
        dense = {
            f"{name}.weight": dense_weight(network.get_submodule(name), dtype).detach().contiguous().clone()
            for name in names
        }
    save_file(dense, path, {"format": "pt"})


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=inspect.getdoc(inspect.getmodule(parse)))
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--loader", choices=LOADERS, default="transformers")
    parser.add_argument("--model", type=Path, required=True, help="quantized (or plain) checkpoint folder")
    parser.add_argument("--ids", type=Path, help="int64 [B, T] in a .npy")
    parser.add_argument("--out", type=Path, help="float32 logits [B, T, vocab], .npy")
    parser.add_argument("--weights", type=Path, help="dequantized weights, .safetensors")
    parser.add_argument(
        "--dtype",
        help="dtype of the model; auto: config.json's (default: float32; gptqmodel, autoawq: float16)",
    )
    parser.add_argument("--compute-dtype", help="overrides bnb_4bit_compute_dtype")
    parser.add_argument(
        "--backend",
        help="kernel for gptq and awq (gptqmodel: gptq_torch, awq_torch; transformers: its choice)",
    )
    parser.add_argument(
        "--run-compressed", action="store_true", help="compressed-tensors: keep the codes packed"
    )
    parser.add_argument("--threads", type=int, help="torch threads")
    args = parser.parse_args(argv)
    if (args.ids is None) != (args.out is None) or (args.out is None and args.weights is None):
        parser.error("give --ids with --out, or --weights, or all three")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    prepare_environment()
    import numpy as np
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    dtype = dtype_of(args.dtype or DEFAULT_DTYPES.get(args.loader, "float32"), args.model)
    with staged(args.model) as source:
        network = LOADERS[args.loader](source, dtype, args).eval()
        if args.out is not None:
            ids = torch.from_numpy(np.load(args.ids).astype(np.int64))
            with torch.inference_mode():
                logits = network(input_ids=ids, use_cache=False).logits
            np.save(args.out, logits.float().numpy())
    names = quantized_layers(checkpoint_keys(args.model))
    if args.weights is not None:
        write_weights(network, names, dtype, args.weights)
    kinds = sorted({type(network.get_submodule(name)).__name__ for name in names})
    print(json.dumps({"loader": args.loader, "layers": len(names), "kinds": kinds, "versions": versions()}))


if __name__ == "__main__":
    main()
