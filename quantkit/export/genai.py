"""`genai_config.json`: what onnxruntime-genai reads beside the graph to generate text."""

from __future__ import annotations

from typing import Any

from quantkit.export.onnx_graph import MODEL, CacheShape

#: Model types of transformers that onnxruntime-genai 0.18 knows under the same name.
_KNOWN = frozenset(
    [
        "gemma",
        "gemma2",
        "gemma3_text",
        "granite",
        "llama",
        "mistral",
        "nemotron",
        "olmo",
        "phi",
        "phi3",
        "phimoe",
        "qwen2",
        "qwen3",
    ]
)


def genai_config(
    model: Any, shape: CacheShape, *, contrib: bool, positions: bool, tokenizer_pad: int | None = None
) -> dict[str, Any]:
    """The file's content for a loaded model whose graph has `onnx_graph`'s input and output names.

    contrib: the graph's attention writes into a shared cache buffer. positions: it has `position_ids`.
    """
    config = model.config.get_text_config()
    generation = getattr(model, "generation_config", None)

    def token(name: str) -> Any:
        value = getattr(generation, name, None)
        return getattr(config, name, None) if value is None else value

    eos = token("eos_token_id")
    first = eos[0] if isinstance(eos, list) and eos else eos
    pad = token("pad_token_id")
    pad = tokenizer_pad if pad is None else pad
    length = int(getattr(config, "max_position_embeddings", 2048))
    options: dict[str, Any] = {"log_id": "onnxruntime-genai", "provider_options": []}
    if not contrib:  # or onnxruntime fuses DequantizeLinear + MatMul with int8 activations
        options["session.qdq_matmulnbits_accuracy_level"] = "1"
    return {
        "model": {
            "type": config.model_type if config.model_type in _KNOWN else "decoder",
            "bos_token_id": _or_zero(token("bos_token_id")),
            "eos_token_id": _or_zero(eos),
            "pad_token_id": _or_zero(first if pad is None else pad),
            "context_length": length,
            "vocab_size": int(config.vocab_size),
            "decoder": {
                "session_options": options,
                "filename": MODEL,
                "head_size": shape.size,
                "hidden_size": int(config.hidden_size),
                "num_attention_heads": int(config.num_attention_heads),
                "num_hidden_layers": shape.layers,
                "num_key_value_heads": shape.heads,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    **({"position_ids": "position_ids"} if positions else {}),
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": length,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": contrib,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }


def _or_zero(value: Any) -> Any:
    return 0 if value is None else value
