"""Ahead-of-time builds: what is recorded is what would run; binaries, manifest, limits, the commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from quantkit.cli.app import run
from quantkit.encoding import Affine, Codebook, Float8
from quantkit.errors import QuantkitError, UsageError
from quantkit.kernels import aot

ONE = aot.Request((Affine(4, 128),), (torch.float16,), ((256, 512),), (20,), backward=False)
#: The targets that issue 3 names.
TARGETS = ["sm_75", "sm_80", "sm_89", "sm_90", "sm_100", "gfx90a", "gfx942", "gfx1100"]


def test_records_follow_the_number_of_rows() -> None:
    target = aot.parse_target("sm_90")

    def kernels(rows: int) -> set[str]:
        request = aot.Request((Affine(4, 128),), (torch.bfloat16,), ((4096, 4096),), (rows,), backward=False)
        return {r.name for r in aot.collect(request, target)}

    assert kernels(1) == {"few_rows_kernel"} and kernels(20) == {"affine_gemm_kernel"}
    assert {"affine_gemm_wide_kernel", "split_inputs_kernel"} <= kernels(64)
    short = aot.Request((Affine(4, 64),), (torch.bfloat16,), ((4096, 4096),), (1,), backward=False)
    for chip, name in (("sm_80", "few_rows_kernel"), ("gfx942", "affine_gemm_kernel")):
        assert [r.name for r in aot.collect(short, aot.parse_target(chip))] == [name]
    assert kernels(4096) == {"affine_dequantize_kernel"}


@pytest.mark.parametrize("name", TARGETS)
def test_every_kernel_is_recorded_for_every_target(name: str) -> None:
    dtypes = (torch.float16,)
    records = aot.collect(aot.Request(dtypes=dtypes), aot.parse_target(name))
    kernels = {r.name for r in records}
    assert {"affine_gemm_kernel", "affine_gemm_wide_kernel", "affine_dequantize_kernel"} <= kernels
    assert {"affine_backward_kernel", "ternary_gemm_kernel", "int8_rows_kernel"} <= kernels
    assert {"codebook_gemm_kernel", "float8_gemm_kernel"} <= kernels
    for record in records:
        wants_ptx = record.constants.get("ASM", False)
        assert not wants_ptx or (name.startswith("sm_") and int(name[3:]) >= 80), "PTX is NVIDIA's"
        assert set(record.divisible) <= set(record.signature)
        assert "M" not in record.divisible, "the number of rows is free at run time"


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("group", [24, 48, 64, 96])
def test_tiles_on_amd_are_powers_of_two(bits: int, group: int) -> None:
    """There a tile is at most one group, whose size need not be a power of two."""
    request = aot.Request((Affine(bits, group),), (torch.float16,), ((256, 8256),), (2,), backward=False)
    for record in aot.collect(request, aot.parse_target("gfx942")):
        assert record.name == "affine_gemm_kernel"
        assert record.constants["BKB"] & (record.constants["BKB"] - 1) == 0


def test_recording_launches_nothing_and_leaves_no_trace() -> None:
    run_method = aot.JITFunction.run
    with aot.record(aot.parse_target("sm_80")) as records:
        assert aot.launch.target() == ("cuda", 80)
    assert records == [] and aot.JITFunction.run is run_method


@pytest.mark.parametrize(("target", "magic"), [("sm_80", b"\x7fELF"), ("gfx942", b"\x7fELF")])
def test_build_writes_binaries_and_a_manifest(target: str, magic: bytes, tmp_path: Path) -> None:
    written = aot.build(ONE, [target], tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest == written
    (entry,) = manifest["kernels"]
    assert (tmp_path / entry["file"]).read_bytes()[:4] == magic
    assert entry["kernel"] == entry["symbol"] == "affine_gemm_kernel"
    assert entry["arguments"]["x_ptr"] == "*fp16" and entry["arguments"]["M"] == "i32"
    assert entry["constants"]["BITS"] == 4 and entry["constants"]["GROUP"] == 128
    assert entry["grid"] == "(ceil(N / BN), SPLIT, ceil(M / BM))"
    assert 0 < entry["shared"] <= entry["shared_limit"] == aot.SHARED_LIMIT[target]
    assert entry["threads"] == 4 * (32 if target.startswith("sm_") else 64)


@pytest.mark.parametrize("rows", [1, 16])
def test_static_shared_memory_counts(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """NF4's table (32 KB) and, for a row, sums of warps, which Triton does not know of: as the binary itself says, and
    held to the chip's limit."""
    from quantkit.export import elf

    request = aot.Request((Codebook(4, 64),), (torch.bfloat16,), ((4096, 4096),), (rows,), backward=False)
    (record,) = aot.collect(request, aot.parse_target("sm_90"))
    built = aot.compile_record(record, "sm_90")
    assert built.entry["grid"] == ("(tiles,)" if rows == 1 else "(ceil(N / BN), SPLIT, ceil(M / BM))")
    # The binary's number has a kilobyte more, which the driver keeps of every block and the limit leaves out.
    in_binary = elf.static_shared(built.binary, built.entry["symbol"]) - 1024
    assert built.entry["static_shared"] == in_binary == (32768 + 2048 if rows == 1 else 32768)
    monkeypatch.setitem(aot.SHARED_LIMIT, "sm_90", 32768)
    with pytest.raises(QuantkitError, match="bytes of shared memory, sm_90 has 32768"):
        aot.compile_record(record, "sm_90")


def test_parallel_builds_write_the_same(tmp_path: Path) -> None:
    """Two targets in two processes: the manifest of one process, in its order, and the same bytes."""
    alone = aot.build(ONE, ["sm_80", "sm_90"], tmp_path / "1")
    together = aot.build(ONE, ["sm_80", "sm_90"], tmp_path / "2", jobs=2)
    assert together == alone and len(alone["kernels"]) == 2
    for entry in alone["kernels"]:
        assert (tmp_path / "1" / entry["file"]).read_bytes() == (tmp_path / "2" / entry["file"]).read_bytes()


def test_fewer_stages_where_shared_memory_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    (record,) = aot.collect(ONE, aot.parse_target("sm_80"))
    full = aot.compile_record(record, "sm_80").entry
    monkeypatch.setitem(aot.SHARED_LIMIT, "sm_80", full["shared"] - 1)
    smaller = aot.compile_record(record, "sm_80").entry
    assert smaller["shared"] < full["shared"]
    assert smaller["constants"]["STAGES"] < full["constants"]["STAGES"]
    monkeypatch.setitem(aot.SHARED_LIMIT, "sm_80", 16)
    with pytest.raises(
        QuantkitError, match=r"affine_gemm_kernel takes \d+ bytes of shared memory, sm_80 has 16"
    ):
        aot.compile_record(record, "sm_80")


def test_a_kernel_too_large_for_a_chip_is_named_and_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(aot.SHARED_LIMIT, "sm_80", 16)
    manifest = aot.build(ONE, ["sm_80"], tmp_path)
    assert manifest["kernels"] == []
    (line,) = manifest["left_out"]
    assert line.startswith("sm_80: affine_gemm_kernel takes")


def test_sm_75_is_built_without_bfloat16(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[aot.Request] = []
    monkeypatch.setattr(aot, "collect", lambda request, target: asked.append(request) or [])
    manifest = aot.build(aot.Request(), ["sm_75"], tmp_path)
    assert [request.dtypes for request in asked] == [(torch.float16,)]
    assert manifest["left_out"] == ["sm_75: bfloat16 (no bfloat16 matrix units)"]


def test_unknown_targets_are_refused() -> None:
    with pytest.raises(UsageError, match=r"unknown target 'sm_12'.*Known: sm_75"):
        aot.parse_target("sm_12")


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "built"
    build = ["kernels", "build", "-t", "sm_80", "-o", str(out), "-e", "affine-4g128", "--dtype", "float16"]
    build += ["--shape", "256x512", "--rows", "20", "--no-backward"]
    assert run(build) == 0
    assert "1 binaries for sm_80" in capsys.readouterr().out
    assert run(build) == 5, "not emptied without being asked"
    assert "--overwrite" in capsys.readouterr().err
    assert run([*build, "--overwrite", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["kernels"]) == 1
    assert run(["kernels", "list", str(out)]) == 0
    assert "affine_gemm_kernel" in capsys.readouterr().out
    assert run(["kernels", "list", str(tmp_path)]) == 3
    assert "is no kernel manifest" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-t", "sm_1"], "unknown target 'sm_1'"),
        (["-t", "sm_80", "-e", "int5"], "unknown encoding 'int5'"),
        (["-t", "sm_80", "--dtype", "float61"], "unknown dtype 'float61'"),
        (["-t", "sm_80", "--shape", "12"], "'12' is not a shape"),
        (["-t", "sm_80", "--rows", "a"], "is not a list of numbers"),
    ],
)
def test_wrong_requests_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["kernels", "build", "-o", str(tmp_path / "x"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("encoding", [Affine(4, 128), Affine(3, 64), Codebook(4, 64), Float8((128, 128))])
def test_the_family_compiles(target: str, encoding: Affine | Codebook | Float8, tmp_path: Path) -> None:
    request = aot.Request((encoding,), (torch.float16,), ((4096, 4096),), (1, 16, 64, 4096))
    manifest = aot.build(request, [target], tmp_path)
    assert manifest["kernels"]
    assert all(e["shared"] <= e["shared_limit"] for e in manifest["kernels"])
