"""lm-evaluation-harness itself: our protocol gives its numbers, and its tasks run on loaded models.

Needs the extra `eval` (marked `peer`). Run last as docs/benchmarks/eval.md says, in an environment with
lm-eval 0.4.13.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import quantkit
from quantkit.builtin_text import text as builtin_text
from quantkit.errors import CalibrationError, UsageError
from quantkit.eval import protocols
from quantkit.eval.perplexity import perplexity
from quantkit.eval.text import load_text
from quantkit.load import load, load_tokenizer

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_without_lm_eval(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(UsageError, match=r"pip install 'quantkit\[eval\]'"):
        quantkit.evaluate(tiny("llama"), tasks=["arc_easy"])


@pytest.fixture(scope="module")
def harness() -> Any:
    return pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def task_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks with local data: rolling perplexity of documents, and a multiple choice."""
    folder = tmp_path_factory.mktemp("tasks")
    pages = [page for page in builtin_text("eval", max_chars=9000).split("\n\n\n") if len(page) > 500][:3]
    (folder / "pages.jsonl").write_text("".join(json.dumps({"page": page}) + "\n" for page in pages))
    rows = [
        {"q": f"{a} + {b} =", "choices": [" 1", " 5", " 9"], "answer": i % 3}
        for i, (a, b) in enumerate([(1, 0), (2, 3), (4, 5)] * 4)
    ]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "pages.yaml").write_text(
        f"""task: local_pages
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/pages.jsonl}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{page}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}, {{metric: bits_per_byte}}]
"""
    )
    (folder / "sums.yaml").write_text(
        f"""task: local_sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/sums.jsonl}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""
    )
    broken = (folder / "pages.yaml").read_text().replace("pages.jsonl", "missing.jsonl")
    (folder / "broken.yaml").write_text(broken.replace("local_pages", "local_broken"))
    return folder


@pytest.mark.peer
@pytest.mark.parametrize("name", ["pydoc-llama-7m", "pydoc-qwen2-3m"])
def test_rolling_loglikelihood_is_the_harness_s(harness: Any, name: str) -> None:
    """The same sum of log-likelihoods on the same text, to 1e-6 (the harness computes in float32)."""
    from lm_eval.api.instance import Instance

    from quantkit.eval.tasks import harness_model

    model, tokenizer = load(EXAMPLES / name, dtype="float32"), load_tokenizer(EXAMPLES / name)
    for max_length in (1024, 200):
        found = load_text("builtin", tokenizer, 3000)
        text = tokenizer.decode(found.ids, skip_special_tokens=True)
        wrapped = harness_model(model, tokenizer, batch=2, max_length=max_length)
        theirs = wrapped.loglikelihood_rolling(
            [Instance("loglikelihood_rolling", {}, (text,), 0)], disable_tqdm=True
        )
        ids = torch.tensor(wrapped.tok_encode(text))
        ours = perplexity(
            model, ids, protocols.lm_eval(max_length), bos_token_id=wrapped.prefix_token_id, batch=2
        )
        assert ours.tokens == len(ids)
        assert -ours.nll_total == pytest.approx(theirs[0], rel=1e-6)


@pytest.mark.peer
@pytest.mark.parametrize(("protocol", "context"), [(protocols.gptq(256), 1), (protocols.llama_cpp(256), 129)])
def test_windows_scored_by_the_harness(harness: Any, protocol: Any, context: int) -> None:
    """The protocols that lm-eval does not have, from the harness's log-likelihoods of their windows."""
    from quantkit.eval.tasks import harness_model

    source = EXAMPLES / "pydoc-llama-7m"
    model, tokenizer = load(source, dtype="float32"), load_tokenizer(source)
    found = load_text("builtin", tokenizer, 1300)
    wrapped = harness_model(model, tokenizer, batch=2)
    requests = []
    for start in range(0, 1300 - 255, 256):
        window = found.ids[start : start + 256].tolist()
        if protocol.bos:
            window[0] = tokenizer.bos_token_id
        requests.append((("", str(start)), window[:context], window[context:]))
    theirs = [total for total, _ in wrapped._loglikelihood_tokens(requests, disable_tqdm=True)]
    ours = perplexity(model, found.ids, protocol, bos_token_id=found.bos_token_id)
    assert ours.tokens == len(requests) * (256 - context)
    assert ours.ppl == pytest.approx(math.exp(-sum(theirs) / ours.tokens), rel=1e-6)


@pytest.mark.peer
def test_word_and_byte_perplexity(harness: Any, task_files: Path) -> None:
    """`--protocol lm-eval` against the harness's own task on the same single document: 1e-4 relative."""
    source = EXAMPLES / "pydoc-llama-7m"
    page = json.loads((task_files / "pages.jsonl").read_text().splitlines()[0])["page"]
    (task_files / "one.txt").write_text(page)
    ours = quantkit.evaluate(
        source, data=task_files / "one.txt", protocol="lm-eval", dtype="float32", checks=False
    )
    theirs = quantkit.evaluate(
        source,
        data=task_files / "one.txt",
        dtype="float32",
        checks=False,
        tasks=["local_pages"],
        task_path=task_files,
        task_limit=1,
    )
    found = {score.metric: score.value for score in theirs.rows[0].tasks}
    ppl = ours.rows[0].perplexity
    assert ppl.word_ppl == pytest.approx(found["word_perplexity"], rel=1e-4)
    assert ppl.byte_ppl == pytest.approx(found["byte_perplexity"], rel=1e-4)
    assert ppl.bits_per_byte == pytest.approx(found["bits_per_byte"], rel=1e-4)
    words = len(re.split(r"\s+", page))
    assert ppl.word_ppl == pytest.approx(math.exp(ppl.nll_total / words), rel=1e-9)


@pytest.mark.peer
def test_tasks_on_a_quantized_model(
    harness: Any, task_files: Path, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    quantkit.convert(tiny("llama"), tmp_path / "q", format="hqq")
    bos = json.loads((tmp_path / "q" / "tokenizer_config.json").read_text())
    for place in (tmp_path / "q",):  # the harness wants a token to begin with
        (place / "tokenizer_config.json").write_text(json.dumps({**bos, "eos_token": "!"}))
    result = quantkit.evaluate(
        tmp_path / "q",
        tokens=300,
        checks=False,
        tasks=["local_sums", "local_pages"],
        task_path=task_files,
        batch=2,
    )
    scores = {(score.task, score.metric): score for score in result.rows[0].tasks}
    assert scores["local_sums", "acc"].samples == 12 and 0 <= scores["local_sums", "acc"].value <= 1
    assert scores["local_sums", "acc"].stderr is not None
    assert scores["local_pages", "word_perplexity"].value > 1
    assert "local_sums acc" in result.to_text()


@pytest.mark.peer
def test_a_multiple_choice_by_hand(harness: Any, task_files: Path) -> None:
    """Accuracy recomputed from plain log-likelihoods of the example."""
    source = EXAMPLES / "pydoc-llama-7m"
    model, tokenizer = load(source, dtype="float32"), load_tokenizer(source)
    right = 0
    rows = [json.loads(line) for line in (task_files / "sums.jsonl").read_text().splitlines()]
    for row in rows:
        scores = []
        for choice in row["choices"]:
            context = tokenizer(row["q"])["input_ids"]
            whole = tokenizer(row["q"] + choice)["input_ids"]
            with torch.no_grad():
                table = model(input_ids=torch.tensor([whole])).logits[0].double().log_softmax(-1)
            scores.append(sum(float(table[i - 1, whole[i]]) for i in range(len(context), len(whole))))
        right += scores.index(max(scores)) == row["answer"]
    result = quantkit.evaluate(
        source, tokens=300, dtype="float32", checks=False, tasks=["local_sums"], task_path=task_files
    )
    assert result.rows[0].tasks[0].value == pytest.approx(right / len(rows))


@pytest.mark.peer
def test_what_the_harness_cannot_do(
    harness: Any, task_files: Path, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"no task 'arc_easi'\. Did you mean 'arc_easy'"):
        quantkit.evaluate(tiny("llama"), tasks=["arc_easi"])
    with pytest.raises(UsageError, match="no directory"):
        quantkit.evaluate(tiny("llama"), tasks=["arc_easy"], task_path=tmp_path / "none")
    with pytest.raises(CalibrationError, match="lm-eval: FileNotFoundError"):
        quantkit.evaluate(
            EXAMPLES / "pydoc-qwen2-3m",
            tokens=300,
            checks=False,
            tasks=["local_broken"],
            task_path=task_files,
        )
