"""Quantize a checkpoint with a peer tool, run by that peer's own python; see docs/peers.md.

    python quantize.py TOOL --model DIR --out DIR [--bits 4 --group-size 128 --calibration CALIB.jsonl ...]

An option that is left out takes the tool's own default. Writes the tool's checkpoint and `timing.json`
(`seconds.quantize` does not count imports; `bitsandbytes` and `transformers-*` quantize while loading).
"""

from __future__ import annotations

import argparse
import inspect
import shutil
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

from peer_common import (
    Meter,
    copy_tokenizer,
    dtype_of,
    prepare_environment,
    read_calibration,
    read_json,
    staged,
    write_json,
    write_timing,
)

Options = dict[str, Any]
Tool = Callable[[argparse.Namespace, Path], tuple[Meter, Options]]


def given(**options: Any) -> Options:
    """The options that were really given, so that the tool's defaults hold for the others."""
    return {key: value for key, value in options.items() if value is not None}


def calibration(args: argparse.Namespace) -> list[list[int]]:
    if args.calibration is None:
        raise SystemExit(f"{args.tool} needs --calibration FILE.jsonl or FILE.txt")
    return read_calibration(args.calibration, args.model, args.samples, args.seqlen)


def dense_model(model: Path, dtype: Any) -> Any:
    """The unquantized source in `dtype`, whichever transformers is installed."""
    import transformers

    key = "torch_dtype" if transformers.__version__.startswith("4.") else "dtype"
    return transformers.AutoModelForCausalLM.from_pretrained(model, **{key: dtype}).eval()


def warm_imports(source: Path, *modules: str) -> None:
    """Import what transformers would import lazily while it loads, so that no timing counts it."""
    from importlib import import_module

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    for name in ("accelerate", "safetensors.torch", *modules):
        import_module(name)
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))


def save_state(state: dict[str, Any], config: dict[str, Any], out: Path) -> None:
    """One safetensors file and a config.json; a tied lm_head is left out."""
    from safetensors.torch import save_file

    if config.get("tie_word_embeddings"):
        state.pop("lm_head.weight", None)
    out.mkdir(parents=True, exist_ok=True)
    save_file(
        {key: value.contiguous() for key, value in state.items()}, out / "model.safetensors", {"format": "pt"}
    )
    write_json(out / "config.json", config)


# --- tools -------------------------------------------------------------------------------------


def run_gptqmodel(args: argparse.Namespace, source: Path) -> tuple[Meter, Options]:
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in calibration(args)]
    wanted = given(
        bits=args.bits,
        group_size=args.group_size,
        sym=args.sym,
        desc_act=args.desc_act,
        act_group_aware=args.act_group_aware,
        damp_percent=args.damp,
        format=args.format,
        mse=args.mse,
        # "auto" would compile a C++ packer for minutes; it changes the speed, not the bytes.
        pack_impl="original",
        dynamic={f"-:.*{args.skip}": {}} if args.skip else None,
    )
    config = QuantizeConfig(**wanted, **({"method": "awq"} if args.tool == "gptqmodel-awq" else {}))
    meter = Meter()
    with meter.phase("load"):
        model = GPTQModel.load(
            str(source), config, device="cpu", **given(dtype=None if args.dtype == "auto" else args.dtype)
        )
    with meter.phase("quantize"):
        log = model.quantize(rows, batch_size=args.batch_size, backend=BACKEND.AUTO)
    with meter.phase("save"):
        model.save(str(args.out))
    losses = (
        [entry.get("loss") for entry in log.values()] if isinstance(log, dict) and "loss" in log else None
    )
    return meter, {**wanted, "config": config.to_dict(), "rows": len(rows), "losses": losses}


def run_autoawq(args: argparse.Namespace, source: Path) -> tuple[Meter, Options]:
    from awq import AutoAWQForCausalLM
    from peer_patches import keep_autoawq_weights_apart, leave_out_autoawq_layers

    keep_autoawq_weights_apart()
    rows = calibration(args)
    zero_point = True if args.sym is None else not args.sym
    wanted = {
        "zero_point": zero_point,
        "q_group_size": args.group_size or 128,
        "w_bit": args.bits or 4,
        "version": (args.format or "gemm").upper(),
        **given(modules_to_not_convert=[args.skip] if args.skip else None),
    }
    meter = Meter()
    with meter.phase("load"):
        model = AutoAWQForCausalLM.from_pretrained(
            str(source),
            device_map="cpu",
            use_cache=False,
            **given(torch_dtype=None if args.dtype == "auto" else dtype_of(args.dtype, source)),
        )
    if args.skip:
        leave_out_autoawq_layers(model, args.skip)
    calib = {"max_calib_samples": len(rows), "max_calib_seq_len": len(rows[0])}
    with meter.phase("quantize"):
        model.quantize(None, quant_config=wanted, calib_data=rows, apply_clip=args.clip, **calib)
    with meter.phase("save"):
        model.save_quantized(str(args.out))
    return meter, {
        **wanted,
        **calib,
        "apply_clip": args.clip,
        "rows": len(rows),
        "dtype": str(next(model.model.parameters()).dtype),
    }


def hqq_parameters(args: argparse.Namespace) -> Options:
    """hqq's `BaseQuantizeConfig` arguments: its defaults are 4 bits, groups of 64, axis 1."""
    return {"nbits": args.bits or 4, "group_size": args.group_size or 64, "axis": args.axis}


def run_hqq(args: argparse.Namespace, source: Path) -> tuple[Meter, Options]:
    """The hqq package itself; written as safetensors in the layout that transformers uses for hqq."""
    from hqq.core.quantize import BaseQuantizeConfig
    from hqq.models.hf.base import AutoHQQHFModel

    dtype = dtype_of(args.compute_dtype or args.dtype, source)
    wanted = hqq_parameters(args)
    quant_config = BaseQuantizeConfig(**wanted)
    warm_imports(source)
    meter = Meter()
    with meter.phase("load"):
        model = dense_model(source, dtype)
    with meter.phase("quantize"):
        AutoHQQHFModel.quantize_model(model, quant_config=quant_config, compute_dtype=dtype, device="cpu")
    with meter.phase("save"):
        if args.format == "pt":  # hqq's own pickle
            args.out.mkdir(parents=True, exist_ok=True)
            AutoHQQHFModel.save_quantized(model, str(args.out))
        else:
            config = read_json(args.model / "config.json")
            config["quantization_config"] = {
                "quant_method": "hqq",
                "quant_config": quant_config,
                "skip_modules": ["lm_head"],
            }
            save_state(dict(model.state_dict()), config, args.out)
    return meter, {**wanted, "quant_config": quant_config, "compute_dtype": str(dtype)}


def run_transformers_hqq(args: argparse.Namespace, source: Path) -> tuple[Meter, Options]:
    """transformers 4.51 with HqqConfig; its check for a GPU is skipped, the arithmetic needs none."""
    from peer_patches import allow_hqq_without_gpu
    from transformers import AutoModelForCausalLM, HqqConfig

    dtype = dtype_of(args.compute_dtype or args.dtype, source)
    allow_hqq_without_gpu(dtype)
    wanted = hqq_parameters(args)
    warm_imports(source, "hqq.core.quantize")
    meter = Meter()
    with meter.phase("quantize"):
        model = AutoModelForCausalLM.from_pretrained(
            source, torch_dtype=dtype, device_map="cpu", quantization_config=HqqConfig(**wanted)
        )
    with meter.phase("save"):
        model.save_pretrained(args.out)
    return meter, {**wanted, "compute_dtype": str(dtype)}


def run_bitsandbytes(args: argparse.Namespace, source: Path) -> tuple[Meter, Options]:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if args.bits not in (None, 4):
        raise SystemExit("bitsandbytes: only 4 bits (nf4, fp4)")
    dtype = dtype_of(args.dtype, source)
    wanted = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": args.quant_type,
        "bnb_4bit_use_double_quant": args.double_quant,
        "bnb_4bit_compute_dtype": dtype_of(args.compute_dtype, source) if args.compute_dtype else dtype,
    }
    warm_imports(source, "bitsandbytes", "transformers.integrations.bitsandbytes")
    meter = Meter()
    with meter.phase("quantize"):
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, device_map="cpu", quantization_config=BitsAndBytesConfig(**wanted)
        )
    with meter.phase("save"):
        model.save_pretrained(args.out)
    return meter, {key: str(value) for key, value in wanted.items()}


def run_transformers_fp8(args: argparse.Namespace, source: Path) -> tuple[Meter, Options]:
    """transformers' fine-grained fp8; its refusal to quantize without a GPU is skipped."""
    from peer_patches import allow_fp8_without_gpu
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    allow_fp8_without_gpu()
    dtype = dtype_of(args.dtype, source)
    size = args.group_size
    wanted: Options = {}
    if size is not None:
        wanted["weight_block_size"] = None if size == -1 else (size, size)
    warm_imports(source, "transformers.integrations.finegrained_fp8")
    meter = Meter()
    with meter.phase("quantize"):
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, device_map="cpu", quantization_config=FineGrainedFP8Config(**wanted)
        )
    # A shape that is no multiple of the block is left as it was, beside a scale of 0, without a word.
    bad = [
        name
        for name, module in model.named_modules()
        if hasattr(module, "weight_scale_inv") and module.weight.element_size() != 1
    ]
    if bad:
        raise SystemExit(
            f"transformers-fp8: {len(bad)} weights are no multiple of the block, such as {bad[0]}"
        )
    with meter.phase("save"):
        model.save_pretrained(args.out)
    return meter, wanted


def run_compressed_tensors(args: argparse.Namespace, source: Path) -> tuple[Meter, Options]:
    """llm-compressor's oneshot with a preset scheme; `--algorithm` chooses the modifier."""
    from peer_patches import llmcompressor_modifier

    if args.scheme:
        scheme = args.scheme
    elif args.tool == "compressed-tensors-fp8":
        scheme = "FP8_DYNAMIC"
    else:
        scheme = f"W{args.bits or 4}A16" + ("_ASYM" if args.sym is False else "")
    modifier, wanted = llmcompressor_modifier(
        args.algorithm, scheme, args.group_size, args.desc_act, args.damp, ignore=["lm_head"]
    )
    from llmcompressor import oneshot

    needs_data = args.algorithm != "rtn" or scheme in ("FP8", "INT8", "W8A8")
    extra: Options = {}
    if needs_data:
        from datasets import Dataset

        rows = calibration(args)
        extra = {
            "dataset": Dataset.from_list(
                [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]
            ),
            "num_calibration_samples": len(rows),
            "max_seq_length": len(rows[0]),
            "shuffle_calibration_samples": False,
        }
    warm_imports(source)
    meter = Meter()
    with meter.phase("load"):
        model = dense_model(source, dtype_of(args.dtype, source))
    with meter.phase("quantize"):
        oneshot(model=model, recipe=modifier, **extra)
    with meter.phase("save"):
        model.save_pretrained(args.out, save_compressed=True)
    return meter, {**wanted, "algorithm": args.algorithm, "rows": extra.get("num_calibration_samples", 0)}


def run_bitnet(args: argparse.Namespace, source: Path) -> tuple[Meter, Options]:
    """Ternary codes and packing by transformers' own bitnet functions (it has no save path of its own)."""
    import torch
    from transformers.integrations.bitnet import WeightQuant, pack_weights

    warm_imports(source)
    meter = Meter()
    with meter.phase("load"):
        model = dense_model(source, dtype_of(args.dtype, source))
    state = dict(model.state_dict())
    with meter.phase("quantize"), torch.no_grad():
        for name, module in model.named_modules():
            if not isinstance(module, torch.nn.Linear) or name == "lm_head":
                continue
            weight = module.weight.data
            mean = weight.float().abs().mean().clamp(min=1e-5).reshape(1)
            state[f"{name}.weight"] = pack_weights(WeightQuant.apply(weight).sign().to(torch.int8))
            # `bitlinear` divides by the stored scale, `autobitlinear` multiplies by it.
            scale = 1 / mean if args.linear_class == "bitlinear" else mean
            state[f"{name}.weight_scale"] = scale.to(weight.dtype)
    config = read_json(args.model / "config.json")
    wanted = {
        "linear_class": args.linear_class,
        "quantization_mode": "offline",
        "modules_to_not_convert": None,
    }
    config["quantization_config"] = {"quant_method": "bitnet", **wanted}
    with meter.phase("save"):
        save_state(state, config, args.out)
    return meter, wanted


TOOLS: dict[str, Tool] = {
    "gptqmodel": run_gptqmodel,
    "gptqmodel-awq": run_gptqmodel,
    "autoawq": run_autoawq,
    "hqq": run_hqq,
    "transformers-hqq": run_transformers_hqq,
    "bitsandbytes": run_bitsandbytes,
    "transformers-fp8": run_transformers_fp8,
    "compressed-tensors-fp8": run_compressed_tensors,
    "compressed-tensors-int4": run_compressed_tensors,
    "bitnet": run_bitnet,
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=inspect.getdoc(inspect.getmodule(parse)))
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("--model", type=Path, required=True, help="source checkpoint folder")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--overwrite", action="store_true", help="delete --out first")
    parser.add_argument("--bits", type=int)
    parser.add_argument(
        "--group-size", type=int, help="-1: one group per row (gptqmodel), per tensor (transformers-fp8)"
    )
    parser.add_argument("--sym", action=argparse.BooleanOptionalAction)
    parser.add_argument("--asym", dest="sym", action="store_false", help="the same as --no-sym")
    parser.add_argument("--desc-act", action=argparse.BooleanOptionalAction)
    parser.add_argument("--act-group-aware", action=argparse.BooleanOptionalAction)
    parser.add_argument("--damp", type=float, help="dampening fraction of the Hessian's mean diagonal")
    parser.add_argument(
        "--clip", action=argparse.BooleanOptionalAction, default=True, help="autoawq's clip search"
    )
    parser.add_argument("--skip", help="gptqmodel, autoawq: leave modules with this in their name alone")
    parser.add_argument("--mse", type=float, help="gptqmodel's mse exponent (0: off)")
    parser.add_argument(
        "--format", help="gptqmodel: gptq, gptq_v2; autoawq: gemm, gemv; hqq: safetensors, pt"
    )
    parser.add_argument("--calibration", type=Path, help=".jsonl of {'input_ids': [...]}, or a text file")
    parser.add_argument("--samples", type=int, help="use this many rows (default: all)")
    parser.add_argument("--seqlen", type=int, help="tokens per row (default: as in the .jsonl; text: 512)")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--dtype", default="auto", help="dtype the model is loaded in (auto: config.json's)")
    parser.add_argument("--compute-dtype", help="bitsandbytes and hqq (default: --dtype)")
    parser.add_argument("--axis", type=int, default=1, choices=(0, 1), help="hqq's grouping axis")
    parser.add_argument("--quant-type", default="nf4", choices=("nf4", "fp4"))
    parser.add_argument("--double-quant", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--scheme", help="a compressed-tensors preset, such as FP8_BLOCK")
    parser.add_argument(
        "--algorithm", default="rtn", choices=("rtn", "gptq", "awq"), help="llm-compressor's modifier"
    )
    parser.add_argument("--linear-class", default="autobitlinear", choices=("autobitlinear", "bitlinear"))
    parser.add_argument("--threads", type=int, help="torch threads")
    args = parser.parse_args(argv)
    for name in ("model", "out", "calibration"):
        if (path := getattr(args, name)) is not None:
            setattr(args, name, path.resolve())
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.out.exists():
        if not args.overwrite:
            raise SystemExit(f"{args.out} exists; give --overwrite")
        shutil.rmtree(args.out)
    prepare_environment()
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    # gptqmodel writes ./logs wherever it is started: let that be the staging folder, which goes away.
    with staged(args.model) as source, chdir(source):
        meter, used = TOOLS[args.tool](args, source)
    copy_tokenizer(args.model, args.out)
    write_timing(args.out, meter, args, used, args.model)


if __name__ == "__main__":
    main()
