"""Writes the seeds of the fuzzing corpus: small valid inputs, from which atheris mutates.

python tests/fuzz/make_corpus.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import fuzz_targets
import torch
from safetensors.torch import save

CORPUS = Path(__file__).parent / "corpus"

CONFIGS: dict[str, dict[str, object]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": True,
             "checkpoint_format": "gptq_v2", "dynamic": {"+:^model[.]layers[.]1[.]": {"bits": 4}, "-:lm_head": {}}},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True},
    "hqq": {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64, "axis": 1}}},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
                     "bnb_4bit_use_double_quant": False, "bnb_4bit_compute_dtype": "float16"},
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]},
    "bitnet": {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"},
    "compressed": {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": {
        "targets": ["Linear", "re:.*down_proj$"], "weights": {"num_bits": 4, "type": "int", "strategy": "group",
        "group_size": 64, "symmetric": True}, "input_activations": None}}},
}  # fmt: skip


def main() -> None:
    for name in fuzz_targets.TARGETS:
        (CORPUS / name).mkdir(parents=True, exist_ok=True)
    tensors = {
        "a.weight": torch.zeros(2, 3),
        "b": torch.ones(4, dtype=torch.bfloat16),
        "c": torch.zeros(0, 5),
    }
    (CORPUS / "reader" / "three-tensors").write_bytes(save(tensors))
    (CORPUS / "reader" / "metadata").write_bytes(
        save({"w": torch.zeros(1, dtype=torch.uint8)}, {"format": "pt"})
    )
    hqq = {"l.W_q": torch.zeros(4, dtype=torch.uint8), "l.shape": torch.tensor([2, 4])}
    (CORPUS / "reader" / "shape-tensor").write_bytes(save(hqq))
    good = {"metadata": {"total_size": 36}, "weight_map": {"a": fuzz_targets.ONE, "b": fuzz_targets.ONE,
            "c": fuzz_targets.TWO}}  # fmt: skip
    (CORPUS / "index" / "good").write_text(json.dumps(good))
    good["weight_map"]["c"] = "../outside.safetensors"
    (CORPUS / "index" / "outside").write_text(json.dumps(good))
    for name, config in CONFIGS.items():
        (CORPUS / "quantization_config" / name).write_text(json.dumps(config))
    folder = fuzz_targets.workspace()
    try:
        journal = fuzz_targets.make_journal(folder).seed  # type: ignore[attr-defined]
    finally:
        shutil.rmtree(folder)
    (CORPUS / "journal" / "two-units").write_bytes(journal)
    (CORPUS / "journal" / "one-unit").write_bytes(journal[: journal.index(b"\n") + 1])
    shard = b'{"type": "shard", "file": "model-00001-of-00003.safetensors", "sha256": "00", "size": 8}\n'
    (CORPUS / "journal" / "with-shard").write_bytes(journal + shard)
    commit = b'{"type": "commit", "device": 1, "inode": 2, "manifest": "00"}\n'
    (CORPUS / "journal" / "with-commit").write_bytes(journal + commit)


if __name__ == "__main__":
    main()
