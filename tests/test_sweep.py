"""Sweeps: settings as text, what is done again and what is not, failures, several workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import quantkit
from quantkit.cli.app import run
from quantkit.errors import UsageError
from quantkit.eval.results import EvalResult, EvalRow, from_plain
from quantkit.eval.speed import SpeedPlan
from quantkit.sweep import SweepError, parse_setting, parse_settings, read_row, sweep

pytest.importorskip("matplotlib")
QUICK = {"tokens": 300, "checks": False}


def test_settings() -> None:
    assert parse_setting("nf4").options == {} and parse_setting("nf4").name == "nf4"
    found = parse_setting("gptq:3:g64:asym:sweeps=0")
    assert (found.name, found.format) == ("gptq-3-g64-asym-sweeps=0", "gptq")
    assert found.options == {"bits": 3, "group_size": 64, "sym": False, "sweeps": 0}
    assert parse_setting("awq:sym").options == {"zero_point": False}
    assert parse_setting("gptq:g-1").options == {"group_size": -1}
    assert [s.name for s in parse_settings("awq:4, gptq:3,hqq:4:g64,nf4")] == [
        "awq-4",
        "gptq-3",
        "hqq-4-g64",
        "nf4",
    ]
    for text, message in (
        ("gptk", "Did you mean 'gptq'"),
        ("gptq:5", "option bits is 5"),
        ("gptq:big", "not understood"),
        ("gptq:3:4", "gives bits twice"),
        ("fp8:4", "no option 'bits'"),
        ("nf4,nf4", "appears twice"),
        ("hqq:4,hqq:4", "appears twice"),
        (" ,", "no setting"),
        ("nf4:double=1", "no option 'double'"),
    ):
        with pytest.raises(UsageError, match=message):
            parse_settings(text)


def conversions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the directories that conversions are asked for."""
    seen: list[str] = []
    plain = quantkit.convert

    def convert(source: str, out: Path, **kwargs: Any) -> Any:
        seen.append(Path(out).name)
        return plain(source, out, **kwargs)

    monkeypatch.setitem(vars(quantkit), "convert", convert)
    return seen


def test_a_sweep(tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = conversions(monkeypatch)
    result = sweep(tiny("llama"), "hqq:4,nf4,hqq:2", tmp_path / "s", **QUICK)
    assert isinstance(result, EvalResult) and seen == ["hqq-4", "nf4", "hqq-2"]
    assert [Path(row.checkpoint).name for row in result.rows] == ["llama", "hqq-4", "nf4", "hqq-2"]
    assert result.rows[0].is_reference and all(row.sha256 for row in result.rows)
    kl = {Path(row.checkpoint).name: row.divergence.kl_mean for row in result.rows if row.divergence}
    assert kl["hqq-2"] > kl["hqq-4"] > 0
    assert (tmp_path / "s" / "report" / "report.html").is_file()
    direct = quantkit.evaluate(tmp_path / "s" / "nf4", tiny("llama"), **QUICK).rows[1]
    assert direct.divergence is not None and direct.divergence.kl_mean == pytest.approx(kl["nf4"], rel=1e-6)

    seen.clear()  # one more setting: only that one is converted
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "s").glob("*.json")}
    result = sweep(tiny("llama"), "hqq:4,fp8,nf4,hqq:2", tmp_path / "s", **QUICK)
    assert seen == ["fp8"] and len(result.rows) == 5
    assert all((tmp_path / "s" / name).stat().st_mtime_ns == was for name, was in times.items())

    seen.clear()  # another text: measured again, converted not
    result = sweep(tiny("llama"), "nf4", tmp_path / "s", tokens=200, checks=False)
    assert seen == [] and result.tokens == 200 and result.rows[1].perplexity.tokens < 200
    result = sweep(tiny("llama"), "hqq:4,nf4", tmp_path / "s", convert={"skip": ["*.0.*"]}, **QUICK)
    assert seen == ["hqq-4", "nf4"]  # other options of the conversion: made anew
    assert (tmp_path / "s" / "hqq-4.json").stat().st_mtime_ns != times["hqq-4.json"]


def test_speed_of_an_earlier_run_is_named(tiny: Callable[..., Path], tmp_path: Path) -> None:
    plan = SpeedPlan(contexts=(16,), new_tokens=2, runs=1, bandwidth_bytes=1 << 20)
    result = sweep(tiny("llama"), "nf4", tmp_path / "s", speed=plan, **QUICK)
    assert all(row.speed for row in result.rows) and not any("earlier run" in w for w in result.warnings)
    result = sweep(tiny("llama"), "nf4,hqq:4", tmp_path / "s", speed=plan, **QUICK)
    assert "the speed of nf4 was measured in an earlier run than the original's" in result.warnings
    stored = json.loads((tmp_path / "s" / "hqq-4.json").read_text())
    stored["warnings"].append("a layer was not compared")
    (tmp_path / "s" / "hqq-4.json").write_text(json.dumps(stored))
    assert (
        "a layer was not compared"
        in sweep(tiny("llama"), "hqq:4", tmp_path / "s", speed=plan, **QUICK).warnings
    )


def test_it_goes_on_after_an_interruption(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantkit.publish import CheckpointWriter

    plain, units = CheckpointWriter.write_unit, []

    def write_unit(self: Any, unit: str, *args: Any, **kwargs: Any) -> Any:
        units.append(unit)
        if len(units) == 2:
            raise KeyboardInterrupt
        return plain(self, unit, *args, **kwargs)

    monkeypatch.setattr(CheckpointWriter, "write_unit", write_unit)
    with pytest.raises(KeyboardInterrupt):
        sweep(tiny("llama"), "nf4,hqq:4", tmp_path / "s", **QUICK)
    monkeypatch.setattr(CheckpointWriter, "write_unit", plain)
    asked: list[bool] = []
    convert = quantkit.convert

    def watched(*args: Any, resume: bool = False, **kwargs: Any) -> Any:
        asked.append(resume)
        return convert(*args, resume=resume, **kwargs)

    monkeypatch.setitem(vars(quantkit), "convert", watched)
    result = sweep(tiny("llama"), "nf4,hqq:4", tmp_path / "s", **QUICK)
    assert asked == [True, False] and len(result.rows) == 3
    quantkit.convert(tiny("llama"), tmp_path / "direct", format="nf4")
    same = [(d / "nf4" / "model.safetensors").read_bytes() for d in (tmp_path / "s",)]
    assert same == [(tmp_path / "direct" / "model.safetensors").read_bytes()]


def test_failures_do_not_stop_the_others(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = quantkit.convert

    def convert(source: str, out: Path, **kwargs: Any) -> Any:
        if Path(out).name == "hqq-4":
            raise UsageError("this cannot be done")
        return plain(source, out, **kwargs)

    monkeypatch.setitem(vars(quantkit), "convert", convert)
    with pytest.raises(SweepError, match=r"hqq-4: this cannot be done.*report\.html"):
        sweep(tiny("llama"), "hqq:4,nf4", tmp_path / "s", **QUICK)
    report = json.loads((tmp_path / "s" / "report" / "report.json").read_text())
    assert [Path(row["checkpoint"]).name for row in report["rows"]] == ["llama", "nf4"]
    assert any("this cannot be done" in warning for warning in report["warnings"])


def test_stored_rows_are_checked(tiny: Callable[..., Path], tmp_path: Path) -> None:
    sweep(tiny("llama"), "nf4", tmp_path / "s", **QUICK)
    path = tmp_path / "s" / "nf4.json"
    document = json.loads(path.read_text())
    row = read_row(path, document["key"])
    assert isinstance(row, EvalRow) and row.to_json() == document["row"] and row.layers[0].advice is not None
    assert read_row(path, "other") is None and read_row(tmp_path / "none", "x") is None
    for damage in ('{"key": 1', "[]", json.dumps({**document, "row": {"checkpoint": 3}}), "[" * 100_000):
        path.write_text(damage)
        assert read_row(path, document["key"]) is None
    with pytest.raises(TypeError):
        from_plain(EvalRow, {**document["row"], "layers": 7})


def test_jobs(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Two processes give what one gives."""
    one = sweep(tiny("llama"), "nf4,hqq:3", tmp_path / "one", **QUICK)
    two = sweep(tiny("llama"), "nf4,hqq:3", tmp_path / "two", jobs=2, **QUICK)
    assert [row.format for row in two.rows] == [None, "nf4", "hqq"]
    for a, b in zip(one.rows[1:], two.rows[1:], strict=True):
        assert a.divergence and b.divergence
        assert a.sha256 == b.sha256 and a.divergence.kl_mean == pytest.approx(b.divergence.kl_mean, rel=1e-4)
    with pytest.raises(UsageError, match="at least 1"):
        sweep(tiny("llama"), "nf4", tmp_path / "x", jobs=0)
    with pytest.raises(UsageError, match="disturb each other"):
        sweep(tiny("llama"), "nf4,fp8", tmp_path / "x", jobs=64, speed=True)


@pytest.mark.slow
def test_torchrun(tiny: Callable[..., Path], tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "quantkit",
    ]
    arguments = ["sweep", str(tiny("llama")), "--formats", "nf4,hqq:4,fp8", "-o", str(tmp_path / "s")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *arguments, "--tokens", "300", "--json"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout)["rows"]
    assert [Path(row["checkpoint"]).name for row in rows] == ["llama", "nf4", "hqq-4", "fp8"]


def test_the_command(tiny: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    arguments = [
        "sweep",
        str(tiny("llama")),
        "--formats",
        "nf4,hqq:4",
        "-o",
        str(tmp_path / "s"),
        "--tokens",
        "300",
    ]
    assert run(arguments) == 0
    out = capsys.readouterr().out
    assert "hqq-4" in out and str(tmp_path / "s" / "report" / "report.html") in out
    page = (tmp_path / "s" / "report" / "report.html").read_text()
    assert "quantkit sweep" in page
    assert run([*arguments, "--json", "--max-kl", "1e-9"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["rows"] and "done before" in err
    assert run(["sweep", str(tiny("llama")), "--formats", "gptk", "-o", str(tmp_path / "t")]) == 2
    assert not (tmp_path / "t").exists()
