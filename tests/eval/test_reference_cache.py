"""The reference's predictions on disk: exactness, both forms, damage, strangers' files, size."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit.errors import CheckpointError, DestinationError, UsageError
from quantkit.eval import protocols, reference_rows
from quantkit.eval.divergence import divergence, perplexity_of_cached
from quantkit.eval.perplexity import perplexity
from quantkit.eval.reference_cache import (
    MANIFEST,
    CachedReference,
    add_extra,
    cache_key,
    key_name,
    open_reference,
    prune,
    record_reference,
)

TEXT = torch.randint(3, 256, (300,), generator=torch.Generator().manual_seed(5))
PROTOCOL = protocols.gptq(60)


def load_pair(path: Path, dtype: torch.dtype, spread: float) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM

    models = [AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval() for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter.add_((torch.randn(parameter.shape, generator=generator) * spread).to(dtype))
    return models[0], models[1]


@pytest.fixture(scope="module")
def pair(tiny: Callable[..., Path]) -> tuple[Any, Any]:
    return load_pair(tiny("llama"), torch.float32, 0.002)


def key_for(protocol: protocols.Protocol = PROTOCOL) -> dict[str, str]:
    return cache_key("model", TEXT, protocol, None)


@pytest.mark.parametrize(
    "protocol", [PROTOCOL, protocols.hqq(64, 32), protocols.llama_cpp(64), protocols.lm_eval(64)]
)
def test_hidden_states_give_the_same_divergence(pair: tuple[Any, Any], tmp_path: Path, protocol: Any) -> None:
    """Float32: equal to 1e-5 relative, although the product with the head has another shape."""
    cached = record_reference(
        pair[0], TEXT, protocol, tmp_path / "c", key_for(protocol), batch=2, bos_token_id=1
    )
    assert cached.form == "hidden"
    direct = divergence(*pair, TEXT, protocol, bos_token_id=1)
    for batch in (1, 3):  # read back in other batches than it was written in
        found = divergence(cached, pair[1], TEXT, protocol, batch=batch, bos_token_id=1)
        for name in ("kl_mean", "kl_median", "kl_p99", "kl_max", "ppl_ratio", "rms_dp", "kl_stderr"):
            assert getattr(found, name) == pytest.approx(getattr(direct, name), rel=2e-5, abs=1e-9), name
        assert (found.top1, found.tokens) == (direct.top1, direct.tokens)
        assert found.reference.ppl == pytest.approx(direct.reference.ppl, rel=1e-6)
    alone = perplexity_of_cached(cached, TEXT, protocol, 1)
    assert alone.ppl == pytest.approx(perplexity(pair[0], TEXT, protocol, bos_token_id=1).ppl, rel=1e-6)
    assert cached.seconds > 0 and alone.tokens_per_second > 0


def test_codes_are_exact_enough(
    pair: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fallback: 16-bit log-probabilities. A KL of a few thousandths is right to 1e-3 relative, and no
    log-probability within 40 nats of the likeliest is off by more than half a step."""
    monkeypatch.setattr(reference_rows.Recorder, "_same", lambda *_: False)
    cached = record_reference(pair[0], TEXT, PROTOCOL, tmp_path / "c", key_for())
    assert cached.form == "codes" and cached._head is None
    direct = divergence(*pair, TEXT, PROTOCOL)
    found = divergence(cached, pair[1], TEXT, PROTOCOL)
    assert 1e-4 < direct.kl_mean < 0.05
    assert found.kl_mean == pytest.approx(direct.kl_mean, rel=1e-3)
    assert found.kl_median == pytest.approx(direct.kl_median, rel=5e-3)
    assert found.reference.ppl == pytest.approx(direct.reference.ppl, rel=1e-4)


def test_rounding_of_codes() -> None:
    logits = torch.randn(7, 1000, generator=torch.Generator().manual_seed(1)) * 8
    logits[0, 5] = -torch.inf
    logits[1] -= torch.arange(1000.0)  # much of this row is more than 40 nats down
    coded = reference_rows.encode(logits)
    again = reference_rows.decode(coded, 1000, Path("x"))
    logp = logits.log_softmax(-1)
    kept = logp >= logp.amax(-1, keepdim=True) - 40
    assert float((again - logp)[kept].abs().max()) <= 40 / 65533 / 2 * 1.05
    assert bool((again[~kept] == -torch.inf).all()) and not bool(kept.all()) and kept.sum() > 5000
    assert coded["codes"].dtype == torch.int16


def test_soft_capped_logits_are_recomputed(tiny: Callable[..., Path], tmp_path: Path) -> None:
    model, other = load_pair(tiny("gemma2"), torch.float32, 0.002)
    assert model.config.final_logit_softcapping
    cached = record_reference(model, TEXT, PROTOCOL, tmp_path / "c", key_for())
    assert (cached.form, cached.softcap) == ("hidden", 30.0)
    direct = divergence(model, other, TEXT, PROTOCOL)
    assert divergence(cached, other, TEXT, PROTOCOL).kl_mean == pytest.approx(direct.kl_mean, rel=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "mixtral"])
def test_other_families(tiny: Callable[..., Path], tmp_path: Path, family: str) -> None:
    model, other = load_pair(tiny(family), torch.float32, 0.002)
    cached = record_reference(model, TEXT, PROTOCOL, tmp_path / "c", key_for())
    assert cached.form == "hidden"
    direct = divergence(model, other, TEXT, PROTOCOL)
    assert divergence(cached, other, TEXT, PROTOCOL).kl_mean == pytest.approx(direct.kl_mean, rel=1e-4)


def test_bfloat16_reference(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """In half precision the logits themselves are rounded; the cache repeats that rounding."""
    model, other = load_pair(tiny("llama"), torch.bfloat16, 0.004)
    cached = record_reference(model, TEXT, PROTOCOL, tmp_path / "c", key_for())
    assert cached.form == "hidden"
    direct = divergence(model, other, TEXT, PROTOCOL)
    assert divergence(cached, other, TEXT, PROTOCOL).kl_mean == pytest.approx(direct.kl_mean, rel=0.02)


def test_it_is_compact(pair: tuple[Any, Any], tmp_path: Path) -> None:
    cached = record_reference(pair[0], TEXT, PROTOCOL, tmp_path / "c", key_for())
    head = pair[0].lm_head.weight.nbytes
    hidden = cached.rows * 64 * 4
    assert cached.rows == 5 * 59
    assert head + hidden <= cached.nbytes < head + hidden + 2000


def test_many_small_files(pair: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_rows, "_FILE_BYTES", 40 * 64 * 4)
    cached = record_reference(pair[0], TEXT, PROTOCOL, tmp_path / "c", key_for())
    assert len(list(cached.folder.glob("rows-*"))) == 5
    direct = divergence(*pair, TEXT, PROTOCOL)
    assert divergence(cached, pair[1], TEXT, PROTOCOL, batch=3).kl_mean == pytest.approx(
        direct.kl_mean, rel=1e-5
    )


def test_key(pair: tuple[Any, Any], tmp_path: Path) -> None:
    base = key_for()
    assert open_reference(tmp_path / "none", base) is None
    record_reference(pair[0], TEXT, PROTOCOL, tmp_path / "c", base)
    assert open_reference(tmp_path / "c", base) is not None
    others = [
        cache_key("other", TEXT, PROTOCOL, None),
        cache_key("model", TEXT + 1, PROTOCOL, None),
        cache_key("model", TEXT, protocols.gptq(61), None),
        cache_key("model", TEXT, PROTOCOL, 1),
        cache_key("model", TEXT, PROTOCOL, None, dtype="float16"),
    ]
    assert len({key_name(key) for key in [base, *others]}) == 6
    assert all(open_reference(tmp_path / "c", key) is None for key in others)


def damage(folder: Path, what: str) -> None:
    manifest = folder / MANIFEST
    meta = json.loads(manifest.read_text())
    rows = folder / "rows-00000.safetensors"
    if what == "flipped byte":
        data = bytearray(rows.read_bytes())
        data[-3] ^= 1
        rows.write_bytes(data)
    elif what == "pickle":
        rows.write_bytes(pickle.dumps({"hidden": [1.0]}))
    elif what == "missing":
        rows.unlink()
    elif what == "link":
        outside = folder.parent / "outside.safetensors"
        shutil.move(rows, outside)
        rows.symlink_to(outside)
    elif what == "other path":
        meta["files"]["rows-/../../x"] = {"sha256": "0", "size": 1}
        manifest.write_text(json.dumps(meta))
    elif what == "other vocabulary":
        meta["vocabulary"] = 300
        manifest.write_text(json.dumps(meta))
    elif what == "fewer rows":
        meta["rows"] -= 1
        manifest.write_text(json.dumps(meta))
    elif what == "types":
        meta["files"] = [1]
        manifest.write_text(json.dumps(meta))
    elif what == "bomb":
        manifest.write_text("[" * 100_000)


@pytest.mark.parametrize(
    "what",
    [
        "flipped byte",
        "pickle",
        "missing",
        "link",
        "other path",
        "other vocabulary",
        "fewer rows",
        "types",
        "bomb",
    ],
)
def test_damage_is_noticed(pair: tuple[Any, Any], tmp_path: Path, what: str) -> None:
    record_reference(pair[0], TEXT, PROTOCOL, tmp_path / "c", key_for())
    damage(tmp_path / "c", what)
    with pytest.raises(CheckpointError) as caught:
        found = open_reference(tmp_path / "c", key_for())
        assert found is not None
        divergence(found, pair[1], TEXT, PROTOCOL)
    assert "\n" not in str(caught.value)


def test_another_vocabulary_is_refused(
    pair: tuple[Any, Any], tmp_path: Path, tiny: Callable[..., Path]
) -> None:
    from transformers import AutoModelForCausalLM

    wide = AutoModelForCausalLM.from_pretrained(tiny("llama", vocab_size=300)).eval()
    cached = record_reference(pair[0], TEXT, PROTOCOL, tmp_path / "c", key_for())
    with pytest.raises(UsageError, match="predicts 256 tokens and the candidate 300"):
        divergence(cached, wide, TEXT, PROTOCOL)


def test_it_appears_whole_or_not(
    pair: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reference_rows, "write_safetensors", full)
    with pytest.raises(DestinationError, match="No space left"):
        record_reference(pair[0], TEXT, PROTOCOL, tmp_path / "c", key_for())
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(DestinationError, match="--cache"):
        record_reference(pair[0], TEXT, PROTOCOL, tmp_path / "file" / "c", key_for())


def test_extra_facts_and_pruning(pair: tuple[Any, Any], tmp_path: Path) -> None:
    made = []
    for i in range(3):
        made.append(record_reference(pair[0], TEXT, PROTOCOL, tmp_path / str(i), key_for()))
        add_extra(made[-1], number=i)
    assert CachedReference((tmp_path / "1").resolve()).extra == {"number": 1}
    size = sum(f.stat().st_size for f in (tmp_path / "0").iterdir())
    prune(tmp_path, tmp_path / "0", 2 * size + 100)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "2"]  # the oldest that may go went
    prune(tmp_path, tmp_path / "0", 0)
    assert [p.name for p in tmp_path.iterdir()] == ["0"]


def test_rows_are_never_all_in_memory(
    pair: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference_rows, "_FILE_BYTES", 59 * 64 * 4)
    largest: list[int] = []
    cat = torch.cat

    def watched(tensors: list[Tensor], *args: Any, **kwargs: Any) -> Tensor:
        out = cat(tensors, *args, **kwargs)
        largest.append(out.numel())
        return out

    monkeypatch.setattr(torch, "cat", watched)
    record_reference(pair[0], TEXT, PROTOCOL, tmp_path / "c", key_for())
    assert largest and max(largest) <= 128 * 128  # one window's states or less, five windows were run
