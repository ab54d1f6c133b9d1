"""What quantkit writes, read by the libraries that own the formats: the same logits on every family.

The libraries that install as plain wheels run here; GPTQModel and hqq's own loader run in the peers'
environments (`make peers`, QUANTKIT_PEERS), marked `peer`. docs/peers.md says when they last ran.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tests_support import CAUSAL, bitsandbytes_reads_straddling_blocks

import quantkit

ROOT = Path(__file__).resolve().parents[1]
#: Beyond the dense families: what the owner's loader also reads (docs/adr/0002 says what it does not).
ALSO = {"nf4": ["gpt2"], "fp8-channel": ["mixtral", "qwen3_moe"], "fp8-tensor": ["mixtral", "qwen3_moe"]}
DENSE = [f for f in CAUSAL if f not in ("mixtral", "qwen3_moe", "gpt2")]

#: name -> (format, options, library, dtype of the owner's arithmetic, tolerance of the logits' relative L2)
#: Owner and quantkit dequantize to the same float32 weights: only the order of sums may differ. BitNet
#: also rounds activations to int8, where one tie may move logits by a percent.
OWNERS = {
    "nf4": ("nf4", {"compute_dtype": "float32"}, "bitsandbytes", torch.float32, 2e-6),
    "nf4-plain": (
        "nf4",
        {"compute_dtype": "float32", "double_quant": False},
        "bitsandbytes",
        torch.float32,
        2e-6,
    ),
    "fp4": ("nf4", {"compute_dtype": "float32", "quant_type": "fp4"}, "bitsandbytes", torch.float32, 2e-6),
    "fp8-channel": (
        "fp8",
        {"scheme": "channel", "layout": "compressed-tensors"},
        "compressed_tensors",
        torch.float32,
        2e-6,
    ),
    "fp8-tensor": ("fp8", {"scheme": "tensor"}, "transformers", torch.float32, 2e-6),
    "ternary-bitlinear": (
        "ternary",
        {"fit": "weight", "linear_class": "bitlinear"},
        "transformers",
        torch.float32,
        0.05,
    ),
    "ternary": ("ternary", {"fit": "weight"}, "transformers", torch.float32, 0.05),
}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def quantkit_logits(path: Path, ids: torch.Tensor, dtype: torch.dtype, *, exact: bool) -> torch.Tensor:
    model = quantkit.load(path, dtype=dtype, dequantize_weights=exact)
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


@pytest.mark.parametrize("case, family", [(c, f) for c in OWNERS for f in DENSE + ALSO.get(c, [])])
def test_transformers_and_the_owner_read_our_files(tiny, tmp_path, ids, case, family):
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    fmt, options, library, dtype, tolerance = OWNERS[case]
    pytest.importorskip(library)
    whole = library == "bitsandbytes" and family != "gpt2" and not bitsandbytes_reads_straddling_blocks()
    source = tiny(family, **({"intermediate_size": 128} if whole else {}))
    quantkit.convert(source, tmp_path / "out", format=fmt, options=options)
    extra = (
        {"quantization_config": CompressedTensorsConfig(dequantize=True)}
        if library == "compressed_tensors"
        else {}
    )
    owner = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype, device_map="cpu", **extra)
    for module in owner.modules():  # see scripts/peers/peer_patches.plain_bitsandbytes_on_cpu
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if library == "transformers":  # it loads fp8 and BitNet models with tensors of two dtypes
        for parameter in owner.parameters():
            if parameter.dtype in (torch.float32, torch.bfloat16):
                parameter.data = parameter.data.to(dtype)
    with torch.no_grad():
        theirs = owner(input_ids=ids).logits.float()
    ours = quantkit_logits(tmp_path / "out", ids, dtype, exact=fmt != "ternary")
    assert relative(ours, theirs) < tolerance


@pytest.mark.parametrize("family", DENSE)
def test_hqq_reads_our_files(tiny, tmp_path, ids, family):
    pytest.importorskip("hqq")
    quantkit.convert(
        tiny(family), tmp_path / "out", format="hqq", options={"group_size": 32, "compute_dtype": "float32"}
    )
    owner = peer_logits(sys.executable, "hqq", [tmp_path / "out"], ids, tmp_path, "float32")[0]
    assert relative(quantkit_logits(tmp_path / "out", ids, torch.float32, exact=True), owner) < 2e-6


def peers_python() -> Path:
    python = Path(os.environ.get("QUANTKIT_PEERS", ROOT / ".peers")) / "new/bin/python"
    if not python.exists():
        pytest.skip("no peers' environment: make peers")
    return python


WORKER = """
import sys, numpy as np, torch
sys.path.insert(0, sys.argv[1])
from peer_common import prepare_environment
prepare_environment()
import argparse, logits
loader, dtype, ids = sys.argv[2], getattr(torch, sys.argv[3]), torch.from_numpy(np.load(sys.argv[4]))
from pathlib import Path
args = argparse.Namespace(backend=None, compute_dtype=None, run_compressed=False)
for path in sys.argv[5:]:
    model = logits.LOADERS[loader](Path(path), dtype, args).eval()
    with torch.inference_mode():
        np.save(path + ".logits.npy", model(input_ids=ids).logits.float().numpy())
"""


def peer_logits(
    python, loader: str, paths: list[Path], ids: torch.Tensor, tmp_path: Path, dtype: str
) -> list[torch.Tensor]:
    np.save(tmp_path / "ids.npy", ids.numpy())
    command = [
        str(python),
        "-c",
        WORKER,
        str(ROOT / "scripts/peers"),
        loader,
        dtype,
        str(tmp_path / "ids.npy"),
    ]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, *map(str, paths)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.from_numpy(np.load(f"{p}.logits.npy")) for p in paths]


@pytest.mark.peer
@pytest.mark.parametrize("case", ["gptq-sym", "gptq-asym", "gptq-act", "gptq-8bit", "awq"])
def test_gptqmodel_reads_our_files(tiny, tmp_path, ids, case):
    """All dense families in one process of GPTQModel; float16 weights and arithmetic there."""
    python = peers_python()
    fmt, options = {
        "gptq-sym": ("gptq", {"group_size": 32}),
        "gptq-asym": ("gptq", {"group_size": 32, "sym": False}),
        "gptq-act": ("gptq", {"group_size": 32, "desc_act": True}),
        "gptq-8bit": ("gptq", {"group_size": 32, "bits": 8}),
        "awq": ("awq", {"group_size": 32}),
    }[case]
    families = DENSE + (["gpt2", "qwen3_moe"] if fmt == "gptq" else [])
    outs = [tmp_path / family for family in families]
    for family, out in zip(families, outs):
        quantkit.convert(
            tiny(family),
            out,
            format=fmt,
            options=options,
            calibration=ids,
            samples=6,
            seqlen=48,
            device="cpu",
        )
    # GPTQModel 7.7 splits Phi-3's gate_up_proj and wants files split like that; transformers, which uses
    # GPTQModel's kernels, reads the names that the source has. Likewise it wants Mixtral's experts under
    # transformers 5's names, where we keep those of the source (w1, w2, w3), which vLLM reads.
    direct = [out for out in outs if out.name != "phi3"]
    theirs = peer_logits(python, "gptqmodel", direct, ids, tmp_path, "float16")
    theirs += peer_logits(python, "transformers", [tmp_path / "phi3"], ids, tmp_path, "float16")
    worst = {}
    for out, owner in zip([*direct, tmp_path / "phi3"], theirs):
        ours = quantkit_logits(out, ids, torch.float16, exact=True)
        worst[out.name] = relative(ours, owner)
        if out.name == "qwen3_moe":
            # Where two experts score alike, float16 noise sends a token elsewhere (float32 against float16
            # on equal weights: 3.5e-2 in one run of five, 1.4e-3 in the others), so the typical token counts.
            worst[out.name] = float(((ours - owner).norm(dim=-1) / owner.norm(dim=-1)).median())
    # float16 on both sides: 1.5e-3 was seen between equal weights, a wrong zero or order gives more than 0.1.
    assert max(worst.values()) < 5e-3, worst
