"""Small checks that always run, by log-likelihood, so that the smallest model can be measured on them.

passkey     a number is planted in a longer text and asked for at its end. Scored: is the planted number likelier
            than in the same text with another number planted? (chance 0.5). As in passkey retrieval
            (Mohtashami and Jaggi, "Landmark attention", 2023), but without generating.
copying     random words, twice. Scored: share of the second copy's tokens that the model ranks first, against the
            first copy; an induction head does this (Olsson et al., "In-context learning and induction
            heads", 2022).
arithmetic  sums of one-digit numbers after four examples. Scored: is the right sum the likeliest of ten?

`gain` is the log-likelihood per token that the context adds: with the number planted against another one, in
the second copy against the first, of the right sum against the mean of the wrong ones. It moves where an
accuracy is still 0 or already 1.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quantkit.eval.protocols import Window
from quantkit.eval.results import CheckScore
from quantkit.eval.scoring import Scorer, chunks, model_positions

_PASSKEYS = 12
_CONTEXT = 384  # tokens of a passkey text, fewer where the model has fewer positions
_FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
_WORDS = """apple river window seven garden cloud paper stone music yellow horse letter bridge winter
    candle forest silver table ocean mirror carpet engine flower pencil shadow rocket basket valley
    copper hammer"""
_COPIES = 12
_COPIED = 12  # words
_SUMS = 16


def run_checks(model: Any, tokenizer: Any, *, seed: int = 0) -> list[CheckScore]:
    """Passkey, copying and arithmetic for a causal model; those whose texts do not fit are left out."""
    scorer = _Likelihood(model, tokenizer)
    limit = model_positions(model) or 1 << 30
    made = (_passkey(scorer, limit, seed), _copying(scorer, limit, seed), _arithmetic(scorer, limit, seed))
    return [score for score in made if score is not None]


class _Likelihood:
    """Log-likelihoods of the last tokens of some texts."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._scorer = Scorer(model)
        self._tokenizer = tokenizer
        bos = tokenizer.bos_token_id
        self._bos = [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []
        self._vocabulary = int(model.get_input_embeddings().weight.shape[0])

    def ids(self, text: str) -> list[int]:
        """Tokens of `text`, without special ones."""
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def tail(self, context: Sequence[int], answer: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(log-likelihood, whether it is ranked first) of each token of `answer` after `context`."""
        values, ranked = self.tails(context, [answer])
        return values[0], ranked[0]

    def tails(self, context: Sequence[int], answers: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """The same `[len(answers), tokens]` for answers of one length, in one batch."""
        rows = [[*self._bos, *context, *answer] for answer in answers]
        ids = torch.tensor(rows, dtype=torch.int64).clamp_max(self._vocabulary - 1)
        count, length = ids.shape[1], len(answers[0])
        window = Window(0, count, count - length, feeds_last=False)
        logits = self._scorer.logits(ids[:, :-1], window).flatten(0, 1)
        targets = ids[:, count - length :].flatten().to(logits.device)
        values, ranked = torch.empty(len(targets), dtype=torch.float64), torch.empty(len(targets))
        for part_of in chunks(logits):
            part = logits[part_of].float()
            true = part.gather(1, targets[part_of, None])[:, 0]
            values[part_of] = (true - part.logsumexp(1)).cpu().double()
            ranked[part_of] = (part.argmax(1) == targets[part_of]).float().cpu()
        return values.view(len(answers), length), ranked.view(len(answers), length)


def _passkey(scorer: _Likelihood, limit: int, seed: int) -> CheckScore | None:
    draw = random.Random(seed)
    question = scorer.ids("What is the pass key? The pass key is")
    filler = scorer.ids(_FILLER)
    room = min(_CONTEXT, limit) - len(question) - 1
    correct, gains = [], []
    for item in range(_PASSKEYS):
        key, other = draw.sample(range(10000, 100000), 2)
        answer = scorer.ids(f" {key}")
        contexts = []
        for planted in (key, other):
            needle = scorer.ids(f"The pass key is {planted}. Remember it. {planted} is the pass key. ")
            space = room - len(needle) - len(answer)
            if space < len(filler):
                return None
            text = (filler * (space // len(filler) + 1))[:space]
            at = (item * 2 + 1) * space // (2 * _PASSKEYS)  # every depth of the text
            contexts.append([*text[:at], *needle, *text[at:], *question])
        with_key, without = (scorer.tail(context, answer)[0] for context in contexts)
        correct.append(float(with_key.sum() > without.sum()))
        gains.append(float((with_key - without).mean()))
    said = f"a 5-digit number planted in {min(_CONTEXT, limit)} tokens is likelier than without it"
    return _score("passkey", correct, gains, 0.5, said)


def _copying(scorer: _Likelihood, limit: int, seed: int) -> CheckScore | None:
    draw = random.Random(seed + 1)
    ranked: list[float] = []
    gains = []
    for _ in range(_COPIES):
        words = draw.sample(_WORDS.split(), _COPIED)
        once = [token for word in words for token in scorer.ids(f" {word}")]
        start = scorer.ids("Words:")
        if len(start) + 2 * len(once) + 1 > limit:
            return None
        values, first = scorer.tail(start, [*once, *once])
        half = len(once)
        ranked.append(float(first[half:].mean()))
        gains.append(float(values[half:].mean() - values[:half].mean()))
    text = f"{_COPIED} random words repeated: share of the repetition's tokens ranked first"
    return _score("copying", ranked, gains, 0.0, text)


def _arithmetic(scorer: _Likelihood, limit: int, seed: int) -> CheckScore | None:
    draw = random.Random(seed + 2)
    correct, gains = [], []
    for _ in range(_SUMS):
        terms = [(a, draw.randint(0, 9 - a)) for a in (draw.randint(0, 9) for _ in range(5))]
        shots = "".join(f"{a} + {b} = {a + b}\n" for a, b in terms[:4])
        a, b = terms[4]
        context = scorer.ids(f"{shots}{a} + {b} =")
        if len(context) + 4 > limit:
            return None
        answers = [scorer.ids(f" {n}") for n in range(10)]
        if len({len(answer) for answer in answers}) == 1:
            values = scorer.tails(context, answers)[0].sum(1)
        else:
            values = torch.stack([scorer.tail(context, answer)[0].sum() for answer in answers])
        correct.append(float(int(values.argmax()) == a + b))
        wrong = torch.cat([values[: a + b], values[a + b + 1 :]])
        gains.append(float(values[a + b] - wrong.mean()))
    return _score(
        "arithmetic", correct, gains, 0.1, "one-digit sums after four examples, the best of ten answers"
    )


def _score(name: str, correct: list[float], gains: list[float], chance: float, text: str) -> CheckScore:
    count = len(correct)
    mean = sum(correct) / count
    spread = sum((value - mean) ** 2 for value in correct) / max(count - 1, 1)
    return CheckScore(name, mean, math.sqrt(spread / count), chance, sum(gains) / count, count, text)
