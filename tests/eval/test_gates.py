"""Limits: exit codes, what is said, and what cannot be asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import quantkit
from quantkit.cli.app import run


@pytest.fixture(scope="module")
def pair(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    out = tmp_path_factory.mktemp("gates") / "hqq3"
    quantkit.convert(tiny("llama"), out, format="hqq", options={"bits": 3})
    return tiny("llama"), out


def call(capsys: Any, *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = run([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_limits(pair: tuple[Path, Path], capsys: Any) -> None:
    source, out = pair
    base = ("eval", out, "--reference", source, "--tokens", "300")
    code, text, err = call(capsys, *base, "--json")
    assert code == 0, err
    found = json.loads(text)["rows"][1]["divergence"]
    kl, ratio = found["kl_mean"], found["ppl_ratio"]
    assert call(capsys, *base, "--max-kl", kl * 1.01, "--max-ppl-ratio", ratio * 1.01)[0] == 0
    code, text, err = call(capsys, *base, "--max-kl", kl * 0.99)
    assert code == 1 and "worst layers" in text  # the table is printed all the same
    assert err.splitlines()[-1].startswith("error: ") and "KL" in err and "hqq3" in err
    code, text, err = call(capsys, *base, "--max-ppl-ratio", ratio * 0.99, "--max-kl", kl * 0.99, "--json")
    assert code == 1 and json.loads(text)["rows"]
    assert "perplexity ratio" in err.splitlines()[-1] and "; " in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-kl", "0.1"], "compares with a reference"),
        (["--reference", "x", "--max-kl", "0"], "is no limit"),
        (["--reference", "x", "--max-ppl-ratio", "nan"], "is no limit"),
        (["--speed", "--speed-batches", "1,b"], "no list of numbers"),
        (["--speed", "--speed-batches", "0"], "at least 1"),
    ],
)
def test_what_is_refused(pair: tuple[Path, Path], capsys: Any, arguments: list[str], message: str) -> None:
    code, out, err = call(capsys, "eval", pair[1], *arguments)
    assert code == 2 and out == "" and message in err


def test_nan_breaks_a_limit() -> None:
    from types import SimpleNamespace

    from quantkit.eval.gates import Gates

    row = SimpleNamespace(
        checkpoint="x", divergence=SimpleNamespace(kl_mean=float("nan"), ppl_ratio=float("inf"))
    )
    result: Any = SimpleNamespace(candidates=[row])
    assert len(Gates(max_ppl_ratio=2.0, max_kl=1.0).failures(result)) == 2
