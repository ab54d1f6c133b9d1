"""`--print`: the same result as a table, Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import result_support as made

import quantkit
from quantkit.cli.app import run
from quantkit.eval.csv_rows import to_csv


def test_csv_holds_the_figures_in_full() -> None:
    found = made.result()
    found.rows[1].divergence.kl_mean = 0.1 + 0.2  # type: ignore[union-attr]
    lines = list(csv.DictReader(to_csv(found).splitlines()))
    assert [line["is_reference"] for line in lines] == ["1", "0", "0"]
    assert lines[0]["kl_mean"] == "" and float(lines[1]["kl_mean"]) == 0.1 + 0.2
    assert float(lines[2]["decode batch 8 context 256"]) == 800 and lines[1]["passkey"] == "1.0"
    assert lines[1]["arc_easy acc"] == "0.5" and lines[1]["size"] == "5000000"
    assert {*lines[0]} >= {"ppl_stderr", "kl_p999", "top1", "rms_dp", "peak_memory", "time_to_first_token"}


def test_csv_of_hostile_names_is_one_line_each() -> None:
    bad = made.row('=HYPERLINK(1),"x"\n\'y', made.HOSTILE, 0.02)
    bad.tasks[0].task = "@sum\r\n,"
    text = to_csv(made.result(bad))
    assert len(text.splitlines()) == 3
    line = list(csv.DictReader(text.splitlines()))[1]
    assert line["checkpoint"].startswith("'=HYPERLINK(1)") and "\\n" in line["checkpoint"]
    assert all(heading[0] not in "=+-@" for heading in line)


def test_the_command(tiny: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    quantkit.convert(tiny("llama"), tmp_path / "q", format="nf4")
    command = ["eval", str(tmp_path / "q"), "--reference", str(tiny("llama")), "--tokens", "300"]
    printed = {}
    for style in ("table", "markdown", "csv", "json"):
        assert run([*command, "--print", style]) == 0
        printed[style] = capsys.readouterr().out
    row = json.loads(printed["json"])["rows"][1]
    line = list(csv.DictReader(printed["csv"].splitlines()))[1]
    assert float(line["kl_mean"]) == pytest.approx(row["divergence"]["kl_mean"], rel=1e-6)
    assert "| q | nf4 |" in printed["markdown"] and "figures/" not in printed["markdown"]
    assert "q: " in printed["table"] and " of the size." in printed["table"]  # the verdict in one line
    assert run([*command, "--print", "cvs"]) == 2
    assert "Did you mean 'csv'" in capsys.readouterr().err
