"""Logits of a whole text are never in memory: measured as resident memory of a process of its own."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch

from quantkit.eval.memory import PeakMemory, peak_resident

TOKENS, VOCABULARY = 2048, 50_000

SCRIPT = f"""
import sys, torch
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
from quantkit.eval import protocols
from quantkit.eval.divergence import divergence
from quantkit.eval.memory import PeakMemory
from quantkit.eval.perplexity import perplexity
from quantkit.eval.reference_cache import record_reference
torch.set_num_threads(1)
sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
model = LlamaForCausalLM(LlamaConfig(vocab_size={VOCABULARY}, max_position_embeddings=512, **sizes)).eval()
ids = torch.randint(0, {VOCABULARY}, ({TOKENS},))
protocol = protocols.gptq(128)
perplexity(model, ids[:128], protocol)  # what is allocated once
with PeakMemory("cpu") as before:
    pass
base = before.peak
with PeakMemory("cpu") as memory:
    first = perplexity(model, ids, protocol)
    cached = record_reference(model, ids, protocol, Path(sys.argv[1]) / "c", {{"k": "v"}})
    found = divergence(cached, model, ids, protocol)
assert first.tokens == found.tokens == {TOKENS} // 128 * 127
assert found.kl_mean < 1e-6
print(base, memory.peak)
"""


@pytest.mark.skipif(
    sys.platform != "linux", reason="restarting the kernel's count of resident memory needs Linux"
)
def test_logits_of_a_long_text_are_never_in_memory(tmp_path: object) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    base, peak = map(int, done.stdout.split())
    whole = TOKENS * VOCABULARY * 4  # 410 MB of float32, which a single such tensor would add
    one_window = 128 * VOCABULARY * 4  # expected: four of these, and float64 pieces of 2 ** 20 logits
    assert 4 * one_window + 12 * (1 << 20) * 8 < 0.5 * whole
    assert peak - base < 0.6 * whole  # measured: 142 to 178 MB in eight runs


def test_peak_memory() -> None:
    with PeakMemory("cpu") as memory:
        block = torch.ones(60_000_000)
        time.sleep(0.01)
        size = block.nbytes
        del block
    assert memory.peak >= size
    assert peak_resident() > 0
