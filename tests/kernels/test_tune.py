"""`quantkit tune`: what it chooses is written, validated, read back and used."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from kernel_support import interpreted

from quantkit.cli.app import run
from quantkit.kernels import tuned

TILE = {"rows": 32, "columns": 8, "inputs": 64, "slices": 4, "split": 2, "stages": 3, "warps": 4}
ENTRY = {
    "family": "affine", "bits": 4, "m": 8, "n": 64, "k": 128, "dtype": "bfloat16", "tile": TILE,
    "shipped_us": 10.0, "tuned_us": 8.0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(tuned, "device_class", lambda device=None: "a-chip")
    monkeypatch.setattr(tuned, "_tiles", None)
    return tmp_path / "tuning" / "a-chip.json"


def test_choose_write_read_and_use(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    result = interpreted("tune_cases.py", QUANTKIT_CACHE=str(tmp_path))
    assert result.pop("ignored") is True
    assert set(result) == {"affine", "codebook", "float8"}
    for family, found in result.items():
        assert found["used"] and found["other_shape_is_shipped"], (family, found)
        assert found["tried"] > 3 and found["gain"] > 1.05, (family, found)


def write(file: Path, **changes: object) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"format": 1, "device": "a-chip", "torch": "2", "entries": [ENTRY]} | changes))


def test_a_tuned_tile_answers_for_its_bucket_only(cache: Path) -> None:
    from quantkit.kernels.tuning import GemmConfig, gemm_config

    shipped = gemm_config(5, 64, 128, 4)
    write(cache)
    tuned.reload()
    for m in range(2, 9):
        assert gemm_config(m, 64, 128, 4) == GemmConfig(**TILE) != shipped
    assert gemm_config(8, 64, 128, 4) is gemm_config(2, 64, 128, 4), "built once"
    for m, n, k, bits in ((1, 64, 128, 4), (9, 64, 128, 4), (8, 65, 128, 4), (8, 64, 128, 3)):
        assert gemm_config(m, n, k, bits) != GemmConfig(**TILE)


@pytest.mark.parametrize(
    "changes",
    [
        {"device": "another"},
        {"format": 2},
        {"entries": [ENTRY | {"tile": TILE | {"rows": 33}}]},
        {"entries": [ENTRY | {"tile": TILE | {"warps": 1 << 20}}]},
        {"entries": [ENTRY | {"tile": TILE | {"rows": "32"}}]},
        {"entries": [ENTRY | {"unknown": 1}]},
    ],
)
def test_an_unsound_file_is_ignored_and_said(
    changes: dict[str, object], cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from quantkit.kernels.tuning import GemmConfig, gemm_config

    write(cache, **changes)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert gemm_config(8, 64, 128, 4) != GemmConfig(**TILE)
    assert sum("is ignored" in message for message in caplog.messages) == 1


def test_writing_replaces_the_file_in_one_step(cache: Path) -> None:
    one = tuned.Cache(device="a-chip", torch="2", entries=[tuned.Entry(**ENTRY)])  # type: ignore[arg-type]
    assert tuned.write(one) == cache
    assert tuned.read("a-chip") == one
    assert [p.name for p in cache.parent.iterdir()] == [cache.name]


def test_command_without_an_accelerator(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: None)
    assert run(["tune", "--shape", "64x64"]) == 2
    error = capsys.readouterr().err
    assert "there is no accelerator to tune for" in error and error.count("\n") == 1


def test_show_and_clear(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    write(cache)
    assert run(["tune", "--show", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["entries"][0]["tile"] == TILE
    assert run(["tune", "--clear"]) == 0
    assert not cache.exists()
