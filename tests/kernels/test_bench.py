"""`quantkit bench kernels`: what it measures and what it writes."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch

from quantkit.cli.app import run
from quantkit.encoding import Affine, dequantize
from quantkit.errors import UsageError
from quantkit.kernels import bench_backward, bench_marlin, bench_report, tuning
from quantkit.kernels.bench import Report, Row, bench
from quantkit.kernels.bench_cases import CANDIDATES, FORMATS, missing, random_weight

CPU = torch.device("cpu")


@pytest.mark.parametrize("form", FORMATS)
def test_random_weights_are_valid_and_scaled(form: str) -> None:
    """Rows have norm about 1, so outputs are of the size of x and errors mean what they say."""
    packed = random_weight(form, 256, 512, CPU)
    norms = dequantize(packed, torch.float64).norm(dim=1)
    assert packed.shape == (256, 512)
    assert 0.2 < float(norms.mean()) < 5
    if form == "ternary":
        assert packed.encoding == Affine(2, 512)
        assert set(((dequantize(packed) / packed.scale).round().unique()).tolist()) == {-1.0, 0.0, 1.0}


def test_every_candidate_computes_the_product() -> None:
    """Peers that are installed multiply with the same weight as quantkit (errors against float64)."""
    report = bench(
        ["affine-4g128", "nf4", "fp8-block"],
        [(128, 256)],
        [1, 3],
        device=CPU,
        dtypes=[torch.float32],
        candidates=list(CANDIDATES),
        seconds=0.0,
    )
    seen = {row.candidate for row in report.rows}
    assert {"quantkit", "quantkit-int8", "reference", "dense", "torch-int4"} <= seen
    for row in report.rows:
        assert row.note == "" and row.microseconds > 0, row
        rounded = "int8" in row.candidate and row.candidate != "torch-int4"
        # bitsandbytes on the CPU may multiply in bfloat16.
        bound = 3e-2 if rounded else 1e-2 if row.candidate == "bitsandbytes" else 1e-5
        assert row.error < bound, row


def test_every_gradient_is_that_of_the_product() -> None:
    """dx of each candidate against float64; the CPU counts no allocations, so no memory is claimed."""
    report = bench(
        ["affine-4g128", "affine-3g128", "nf4", "fp8-block"],
        [(96, 256)],
        [1, 3],
        device=CPU,
        dtypes=[torch.float32, torch.bfloat16],
        candidates=list(bench_backward.CANDIDATES),
        backward=True,
        seconds=0.0,
    )
    assert {row.candidate for row in report.rows} >= {"quantkit", "dequantize", "dense", "reference"}
    assert {row.dtype for row in report.rows} == {"float32", "bfloat16"}, "both in one run"
    for row in report.rows:
        assert row.note == "" and math.isnan(row.extra_bytes), row
        assert row.error < (1e-5 if row.dtype == "float32" else 1e-2), row
    header, lines = bench_report.table(report)
    assert all(len(line) == len(header) for line in lines)
    assert dict(zip(header, lines[0]))["extra MB"] == "-"


def test_gradient_routes_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """`quantkit-fused` and `-sliced` call the op with another rule, which is put back."""
    seen: list[bool] = []
    shipped = tuning.fused_backward

    def product(grad: torch.Tensor) -> torch.Tensor:
        seen.append(tuning.fused_backward("codebook", 100, 64, 64, 4))
        return grad

    monkeypatch.setattr(bench_backward, "_quantkit", lambda packed, dtype: product)
    packed = random_weight("nf4", 64, 64, torch.device("meta"))
    for name in ("quantkit-fused", "quantkit-sliced"):
        made = bench_backward.CANDIDATES[name](packed, torch.float16)
        assert made is not None
        made(torch.ones(1, 64))
    assert seen == [True, False] and tuning.fused_backward is shipped
    assert bench_backward.CANDIDATES["quantkit-fused"](packed, torch.float32) is None, "no such kernel"


def test_extra_memory_is_the_peak_beside_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """With an allocator that counts as torch's does: 100 bytes held before, a peak of 100 + 48 + the result."""

    class Allocator:
        peak = now = 100

        def synchronize(self) -> None: ...

        def reset_peak_memory_stats(self) -> None:
            self.peak = self.now

        def memory_allocated(self) -> int:
            return self.now

        def max_memory_allocated(self) -> int:
            return self.peak

    allocator = Allocator()

    def product(grad: torch.Tensor) -> torch.Tensor:
        out = torch.empty(3, 5, device="meta")
        allocator.now += out.nbytes
        allocator.peak = max(allocator.peak, allocator.now + 48)
        return out

    monkeypatch.setattr(torch, "get_device_module", lambda device: allocator)
    assert bench_backward.extra_bytes(product, torch.empty(3, 7, device="meta")) == 48
    assert math.isnan(bench_backward.extra_bytes(product, torch.empty(3, 7)))


def test_memory_in_the_table() -> None:
    rows = [
        Row("nf4", 1024, 2048, 4, "bfloat16", name, 10.0, 10.0, 1, 1e-3, extra_bytes=extra)
        for name, extra in (("quantkit", 2e6), ("dequantize", 8e6))
    ]
    header, (line,) = bench_report.table(Report("a chip", {}, 1, 40.0, rows, backward=True))
    cells = dict(zip(header, line))
    assert cells["extra MB"] == "2.0" and cells["of dequantize"] == "25%" and cells["dequantize"] == "1.00"


def test_absent_peers_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """marlin comes with vLLM: without it the run says so instead of showing an empty column."""
    monkeypatch.setattr("quantkit.kernels.bench_cases.find_spec", lambda name: None)
    monkeypatch.setattr("quantkit.kernels.bench_marlin.find_spec", lambda name: None)
    assert missing(["quantkit", "marlin", "dense"]) == {"marlin": "vllm"}
    arguments = "bench kernels --device cpu -f affine-4g128 --shape 64x256 --rows 1 --seconds 0"
    assert run([*arguments.split(), "--candidate", "quantkit", "--candidate", "marlin"]) == 0
    assert "not measured: marlin (vllm is not installed)" in capsys.readouterr().out


def test_marlin_takes_what_its_kernel_covers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything else is None before vLLM is imported."""
    monkeypatch.setattr("quantkit.kernels.bench_marlin.find_spec", lambda name: object())
    for form, dtype in (("affine-4g128", torch.float16), ("nf4", torch.float16)):
        assert bench_marlin.prepare(random_weight(form, 64, 256, CPU), dtype) is None


def test_a_failing_candidate_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(packed: object, dtype: object) -> None:
        raise RuntimeError("no kernel\nfor this chip")

    monkeypatch.setitem(CANDIDATES, "gemlite", broken)
    report = bench(
        ["nf4"],
        [(64, 64)],
        [1],
        device=CPU,
        dtypes=[torch.float32],
        candidates=["quantkit", "gemlite"],
        seconds=0.0,
    )
    failed = next(row for row in report.rows if row.candidate == "gemlite")
    assert failed.note == "RuntimeError: no kernel for this chip" and math.isinf(failed.microseconds)
    header, lines = bench_report.table(report)
    assert lines[0][header.index("gemlite")] == "failed"
    assert bench_report.to_json(report)["rows"][-1]["microseconds"] is None


def example() -> Report:
    rows = [
        Row("nf4", 1024, 2048, 4, "float32", name, us, us, 2_000_000, 1e-7)
        for name, us in (("quantkit", 100.0), ("dense", 250.0))
    ]
    return Report("a chip", {"torch": "2"}, 1, 40.0, rows)


def test_derived_numbers() -> None:
    report = example()
    ours = report.records()[0]
    assert ours["gigabytes_per_second"] == pytest.approx(20.0)  # 2 MB in 100 us
    assert ours["share_of_copy_bandwidth"] == pytest.approx(0.5)
    assert ours["teraflops"] == pytest.approx(2 * 4 * 1024 * 2048 / 100e-6 / 1e12)
    assert report.records()[1]["speedup"] == pytest.approx(2.5)
    header, lines = bench_report.table(report)
    assert dict(zip(header, lines[0]))["dense"] == "2.50"
    assert "| nf4 | 1024x2048 | 4 |" in bench_report.markdown(report)


def test_files(tmp_path: Path) -> None:
    bench_report.write_csv(example(), tmp_path / "a.csv")
    with (tmp_path / "a.csv").open(encoding="utf-8") as file:
        assert [line["candidate"] for line in csv.DictReader(file)] == ["quantkit", "dense"]
    bench_report.write_json(example(), tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text())["copy_gigabytes_per_second"] == 40.0


def test_roofline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path))
    bench_report.plot_roofline(example(), tmp_path / "roof.png")
    assert (tmp_path / "roof.png").read_bytes()[:4] == b"\x89PNG"


def test_roofline_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"quantkit\[report\]"):
        bench_report.plot_roofline(example(), tmp_path / "roof.png")


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "b.csv"
    arguments = "bench kernels --device cpu -f affine-4g128 --shape 64x256 --rows 1,2 --seconds 0"
    assert (
        run([*arguments.split(), "--candidate", "quantkit", "--candidate", "dense", "--csv", str(out)]) == 0
    )
    printed = capsys.readouterr().out
    assert "affine-4g128" in printed and "64x256" in printed
    assert len(out.read_text().splitlines()) == 5


def test_a_spent_budget_ends_the_run_and_says_so() -> None:
    said: list[str] = []
    report = bench(
        ["nf4"], [(64, 64), (128, 64)], [1], device=CPU, dtypes=[torch.float32], candidates=["dense"],
        seconds=0.0, budget=1e-9, progress=said.append,
    )  # fmt: skip
    assert report.rows == []
    assert said == ["the budget is spent: 2 of 2 weights were not measured"]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["-f", "nf5"], "Did you mean 'nf4'"),
        (["--shape", "64"], "N x K"),
        (["--rows", "0"], "number of rows"),
        (["--candidate", "gemlit"], "Did you mean 'gemlite'"),
        (["--backward", "--candidate", "gemlite"], "unknown candidate 'gemlite'"),
    ],
)
def test_wrong_arguments(extra: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "kernels", "--device", "cpu", *extra]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
