"""How a text is cut into windows, and which tokens count: perplexities agree only under one protocol.

gptq        windows of `seqlen` tokens (2048, or the model's limit) side by side, the rest dropped; all tokens
            of a window but its first are scored. GPTQ's, AWQ's and most papers' figure (Frantar et al.,
            "GPTQ", 2022, code at IST-DASLab/gptq): mean over windows of the mean loss.
hqq         windows of 1024 that advance by 512; only the new tokens are scored, with up to 512 before them
            as context. The strided figure of the transformers guide, which hqq reports. The first window's
            mean covers 511 tokens and counts as 512.
llama.cpp   windows of 512 side by side; only targets 257..511 are scored, so each has at least 256 tokens
            before it; the first token of a window is replaced by BOS where the tokenizer adds one
            (tools/perplexity in ggml-org/llama.cpp). Reads at least two windows.
lm-eval     the text after one prefix token (BOS, or EOS where there is none), in windows that feed `max_length`
            tokens and predict as many; the last window reaches back so that it is full too; every token of the
            text is scored once (loglikelihood_rolling in EleutherAI/lm-evaluation-harness). Its word_perplexity
            is exp(summed loss / words), its byte_perplexity exp(summed loss / UTF-8 bytes).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from quantkit.errors import CalibrationError, UsageError, did_you_mean

DEFAULT_PROTOCOL = "gptq"
_GPTQ_SEQLEN = 2048


@dataclass(frozen=True)
class Window:
    """Tokens `start..stop` are fed; those from `start + first` on are scored, each counting `weight`."""

    start: int
    stop: int
    first: int
    weight: float = 1.0
    feeds_last: bool = True  # the published scripts feed the last token too, though it predicts nothing

    @property
    def length(self) -> int:
        """Tokens from `start` to `stop`."""
        return self.stop - self.start

    @property
    def fed(self) -> int:
        """Tokens that go through the model."""
        return self.length - (not self.feeds_last)

    def kind(self) -> tuple[object, ...]:
        """Windows of one kind can run as one batch."""
        return self.length, self.first, self.weight, self.feeds_last


@dataclass(frozen=True)
class Protocol:
    """Window `length`, how far windows `advance`, and the `first` index scored in a full window."""

    name: str
    length: int
    advance: int
    first: int
    bos: bool = False  # the first token of a window becomes BOS
    least: int = 2  # tokens that a text must have
    prefix: bool = False  # one token goes before the text, so that its first token is scored too

    @property
    def fed(self) -> int:
        """Positions that a model needs: with a prefix the last token of a window is only predicted."""
        return self.length - self.prefix

    def describe(self) -> str:
        """Name and numbers, for reports: "gptq (windows of 2048)"."""
        if self.prefix:
            return f"{self.name} (windows of {self.fed})"
        if self.advance != self.length:
            return f"{self.name} (windows of {self.length}, advancing {self.advance})"
        tail = f", scored from {self.first}" if self.first > 1 else ""
        return f"{self.name} (windows of {self.length}{tail})"

    def windows(self, tokens: int) -> list[Window]:
        """The windows of a text of `tokens` tokens; CalibrationError when it is too short for one."""
        if tokens < self.least:
            raise CalibrationError(
                f"the text has {tokens} tokens, and protocol {self.describe()} needs {self.least}",
                hint="Give a longer text, or ask for more tokens.",
            )
        if self.prefix:
            return self._rolling(tokens)
        if self.advance == self.length:
            starts = range(0, tokens - self.length + 1, self.length)
            return [Window(start, start + self.length, self.first) for start in starts]
        made = []
        for new in range(0, tokens, self.advance):
            stop = min(new + self.advance, tokens)
            start = max(new + self.advance - self.length, 0)
            first = max(new - start, 1)  # the very first token has nothing before it
            scored = stop - start - first
            if scored > 0:
                made.append(Window(start, stop, first, (stop - new) / scored))
        return made

    def _rolling(self, tokens: int) -> list[Window]:
        """lm-eval's windows of a text of `tokens` tokens, the prefix counted."""
        made = [Window(0, min(self.length, tokens), 1, feeds_last=False)]
        while (done := made[-1].stop) < tokens:
            stop = min(done + self.advance, tokens)
            start = stop - self.length
            made.append(Window(start, stop, done - start, feeds_last=False))
        return made


def gptq(seqlen: int = _GPTQ_SEQLEN) -> Protocol:
    """Non-overlapping windows of `seqlen` tokens, all but the first scored."""
    return Protocol("gptq", seqlen, seqlen, 1, least=seqlen)


def hqq(length: int = 1024, stride: int = 512) -> Protocol:
    """Windows of `length` that advance by `stride`; each token is scored once."""
    return Protocol("hqq", length, stride, 1)


def llama_cpp(n_ctx: int = 512) -> Protocol:
    """Non-overlapping windows of `n_ctx`, the second half scored."""
    return Protocol("llama.cpp", n_ctx, n_ctx, n_ctx // 2 + 1, bos=True, least=2 * n_ctx)


def lm_eval(max_length: int = _GPTQ_SEQLEN) -> Protocol:
    """Rolling log-likelihood: windows that feed `max_length` tokens, every token scored once."""
    return Protocol("lm-eval", max_length + 1, max_length, 1, prefix=True)


PROTOCOLS: dict[str, Callable[[], Protocol]] = {
    "gptq": gptq,
    "hqq": hqq,
    "llama.cpp": llama_cpp,
    "lm-eval": lm_eval,
}
_SPELLINGS = {
    "llama_cpp": "llama.cpp",
    "llamacpp": "llama.cpp",
    "lm_eval": "lm-eval",
    "lmeval": "lm-eval",
    "lm-evaluation-harness": "lm-eval",
}


def resolve_protocol(
    protocol: str | Protocol,
    max_positions: int | None = None,
    tokens: int | None = None,
    window: int | None = None,
) -> tuple[Protocol, str]:
    """A protocol that fits the model and the text, and a remark where it is not the published one.

    `protocol` by name adapts: windows no longer than `max_positions`, and gptq's no longer than the text.
    lm-eval's own default is a window of all positions; ours stops at 2048 so that logits stay small.
    `window`: use windows of so many tokens. A `Protocol` object is taken as it is, or refused with UsageError.
    """
    limit = max_positions or 1 << 62
    if isinstance(protocol, Protocol):
        if protocol.fed > limit:
            raise UsageError(
                f"protocol {protocol.describe()} is longer than the model's {max_positions} positions",
                hint="Use shorter windows.",
            )
        return protocol, ""
    key = _SPELLINGS.get(protocol.lower(), protocol.lower())
    if key not in PROTOCOLS:
        raise UsageError(f"unknown protocol {protocol!r}", hint=did_you_mean(protocol, list(PROTOCOLS)))
    if window is not None:
        return _with_window(key, window, limit), f"windows of {window} as asked"
    made = PROTOCOLS[key]()
    if key == "gptq":
        length = max(2, min(made.length, limit, tokens or limit))
        return gptq(length), "" if length == made.length else f"windows of {length} instead of {made.length}"
    if key == "lm-eval":
        length = min(made.fed, limit)
        return lm_eval(
            length
        ), "" if length == max_positions else f"windows of {length} (lm-eval: max_length)"
    if made.length <= limit:
        return made, ""
    shorter = hqq(limit, max(1, limit // 2)) if key == "hqq" else llama_cpp(limit)
    return shorter, f"the model has {limit} positions: windows of {limit} instead of {made.length}"


def _with_window(key: str, window: int, limit: int) -> Protocol:
    if not 2 <= window <= limit:
        most = f" to {limit}" if limit < 1 << 62 else ""
        raise UsageError(f"windows of {window} tokens do not fit", hint=f"Choose from 2{most}.")
    if key == "hqq":
        return hqq(window, max(1, window // 2))
    factories: dict[str, Callable[[int], Protocol]] = {
        "gptq": gptq,
        "llama.cpp": llama_cpp,
        "lm-eval": lm_eval,
    }
    return factories[key](window)
