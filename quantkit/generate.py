"""`quantkit.generate`: continue a text with any checkpoint that `quantkit.load` reads."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import UsageError
from quantkit.load import load, load_tokenizer
from quantkit.report_types import Report


@dataclass
class GenerateResult(Report):
    """The new text and what it took."""

    text: str  # without the prompt
    new_tokens: int
    seconds: float  # prompt included, loading not
    load_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """New tokens by wall time, the prompt's included."""
        return self.new_tokens / self.seconds if self.seconds > 0 else 0.0


def generate(
    checkpoint: str | os.PathLike[str],
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: str | None = None,
    trust_remote_code: bool = False,
    on_text: Callable[[str], None] | None = None,
) -> GenerateResult:
    """Continue `prompt`; greedy at temperature 0. `on_text` receives the text as it appears.

    UsageError when the prompt is empty or leaves no room in the model's context.
    """
    began = time.perf_counter()
    tokenizer = load_tokenizer(checkpoint, trust_remote_code=trust_remote_code)
    model = load(checkpoint, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    if not model.can_generate():
        raise UsageError(
            f"{type(model).__name__} does not generate text", hint="Give a causal language model."
        )
    ids = torch.tensor([tokenizer(prompt)["input_ids"]], dtype=torch.long, device=device)
    if ids.shape[1] == 0:
        raise UsageError("the prompt has no tokens", hint="Give some text.")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None:
        max_new_tokens = min(max_new_tokens, int(limit) - ids.shape[1])
        if max_new_tokens < 1:
            raise UsageError(f"the prompt has {ids.shape[1]} tokens, the model's context {limit}")
    loaded = time.perf_counter()
    decoder = _StreamDecoder(tokenizer, ids[0].tolist())
    count = 0
    for token in _tokens(model, ids, max_new_tokens, temperature, seed):
        count += 1
        piece = decoder.push(token)
        if piece and on_text is not None:
            on_text(piece)
    piece = decoder.finish()
    if piece and on_text is not None:
        on_text(piece)
    return GenerateResult(decoder.text, count, time.perf_counter() - loaded, loaded - began)


@torch.inference_mode()
def _tokens(model: Any, ids: Tensor, count: int, temperature: float, seed: int) -> Iterator[int]:
    """New tokens one by one, until the model ends or `count` are made."""
    ends = _end_tokens(model)
    random = torch.Generator().manual_seed(seed)  # on the CPU: the same choice on every device
    cache = None
    step = ids
    for _ in range(count):
        out = model(input_ids=step, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits = out.logits[0, -1].float().cpu()
        if temperature > 0:
            chance = torch.softmax(logits / temperature, dim=-1)
            token = int(torch.multinomial(chance, 1, generator=random))
        else:
            token = int(logits.argmax())
        if token in ends:
            return
        yield token
        step = torch.tensor([[token]], dtype=torch.long, device=ids.device)


def _end_tokens(model: Any) -> set[int]:
    for config in (getattr(model, "generation_config", None), model.config):
        value = getattr(config, "eos_token_id", None)
        if value is not None:
            return {int(v) for v in value} if isinstance(value, list | tuple) else {int(value)}
    return set()


class _StreamDecoder:
    """Tokens to text without cutting characters: bytes of one character may span several tokens."""

    def __init__(self, tokenizer: Any, prompt: list[int]) -> None:
        self._tokenizer = tokenizer
        self._prompt = prompt
        self._tokens: list[int] = []
        self._before = self._decode(prompt)
        self.text = ""

    def push(self, token: int) -> str:
        """The text that `token` completes; "" while a character is unfinished."""
        self._tokens.append(token)
        text = self._new_text()
        if text.endswith("�"):
            return ""
        return self._advance(text)

    def finish(self) -> str:
        """What is left at the end."""
        return self._advance(self._new_text())

    def _new_text(self) -> str:
        # Decoded with the prompt, since some tokenizers strip a space at the start of a text.
        whole = self._decode(self._prompt + self._tokens)
        if whole.startswith(self._before):
            return whole[len(self._before) :]
        return self._decode(self._tokens)

    def _advance(self, text: str) -> str:
        if not text.startswith(self.text):
            return ""
        piece = text[len(self.text) :]
        self.text = text
        return piece

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text
