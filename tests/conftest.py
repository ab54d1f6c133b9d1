"""Tiny random checkpoints of every architecture family the project names, made once per session."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may wait for a network
# Idle OpenMP threads spin by default: beside another test process on the same processors they took most of the time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("QUANTKIT_CACHE", tempfile.mkdtemp(prefix="quantkit-test-cache-"))

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 30000.0}}  # on purpose not 10000
BERT = {k: v for k, v in SMALL.items() if k not in ("num_key_value_heads", "bos_token_id", "eos_token_id")}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16}
GPT2 = {
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "vocab_size": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

#: family -> (config class, arguments, model class or None for AutoModelForCausalLM)
FAMILIES: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "llama": ("LlamaConfig", {**SMALL, **ROPE}, None),
    "mistral": ("MistralConfig", {**SMALL, **ROPE, "sliding_window": 64}, None),
    "qwen2": ("Qwen2Config", {**SMALL, **ROPE, "tie_word_embeddings": True}, None),
    "qwen3": ("Qwen3Config", {**SMALL, **ROPE, "head_dim": 16}, None),
    "gemma2": ("Gemma2Config", {**SMALL, "head_dim": 16}, None),
    "gemma3": ("Gemma3TextConfig", {**SMALL, "head_dim": 16}, None),
    "phi3": ("Phi3Config", {**SMALL}, None),
    "mixtral": ("MixtralConfig", {**SMALL, **ROPE, "num_local_experts": 4, "num_experts_per_tok": 2}, None),
    "qwen3_moe": ("Qwen3MoeConfig", {**SMALL, **ROPE, **EXPERTS}, None),
    "gpt2": ("GPT2Config", GPT2, None),
    "bert": ("BertConfig", BERT, "BertForMaskedLM"),
}
CAUSAL = [name for name in FAMILIES if name != "bert"]


def _write_tokenizer(path: Path) -> None:
    """A byte-level tokenizer: id = byte value, so that every text has ids below 256."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny("llama", dtype=..., **config)` -> directory of a random checkpoint with a tokenizer.

    Weights are drawn with a spread like that of trained models (a few outlier channels included).
    """
    import torch
    import transformers

    made: dict[tuple[Any, ...], Path] = {}

    def make(family: str, dtype: Any = None, max_shard_size: str = "5GB", **changes: Any) -> Path:
        key = (family, dtype, max_shard_size, repr(sorted(changes.items())))
        if key not in made:
            config_class, arguments, model_class = FAMILIES[family]
            config = getattr(transformers, config_class)(**{**arguments, **changes})
            torch.manual_seed(len(made))
            if model_class is None:
                model = transformers.AutoModelForCausalLM.from_config(config)
            else:
                model = getattr(transformers, model_class)(config)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if parameter.dim() >= 2:
                        gain = 1 + 2 * (torch.rand(parameter.shape[-1]) < 0.05)
                        parameter.copy_(torch.randn_like(parameter) * 0.08 * gain)
                    elif "norm" in name or "ln_" in name:
                        parameter.add_(torch.randn_like(parameter) * 0.1)
                    else:
                        parameter.copy_(torch.randn_like(parameter) * 0.05)
            path = tmp_path_factory.mktemp(f"tiny-{family}") / family
            model.to(dtype or torch.float32).save_pretrained(path, max_shard_size=max_shard_size)
            _write_tokenizer(path)
            made[key] = path
        return made[key]

    return make


@pytest.fixture(scope="session")
def shared() -> Path:
    """The developers' shared folder; tests that need it skip themselves where it is absent."""
    path = Path(__file__).resolve().parents[2] / "shared"
    if not path.is_dir():
        pytest.skip("../shared is absent")
    return path


@pytest.fixture
def ids() -> Any:
    """Fresh token ids `[6, 48]` below 256, for calibration and comparison."""
    import torch

    return torch.randint(3, 256, (6, 48))
