"""The command line: what it prints, where, and with which exit code."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import quantkit
from quantkit import errors
from quantkit.cli.app import run
from quantkit.formats import FORMATS, get_format
from quantkit.options import collect_options, describe_options, parse_override, parse_value
from quantkit.progress import NullProgress, RichProgress, duration, size
from quantkit.report_types import ConvertResult, LayerReport, PlanReport, to_plain

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """`cli("inspect", path)` -> (exit code, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "160")

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def no_convert(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Replaces the conversion: holds what the command line asked it for."""
    seen: dict[str, Any] = {}

    def convert(model: str, output: Path | None, **kwargs: Any) -> ConvertResult:
        seen.update(kwargs, model=model, output=output)
        if "raises" in seen:
            raise seen["raises"]
        print("a library chatters on stdout")
        return ConvertResult(str(output), kwargs["format"], kwargs["options"], source=model)

    monkeypatch.setitem(vars(quantkit), "convert", convert)
    return seen


COMMANDS = ("convert", "inspect", "verify", "generate", "eval", "sweep", "allocate", "formats")


def test_version_and_help(cli: Run) -> None:
    assert cli("--version") == (0, f"quantkit {quantkit.__version__}\n", "")
    code, out, _ = cli("--help")
    assert code == 0
    assert all(command in out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(cli: Run, command: str) -> None:
    code, out, _ = cli(command, "--help")
    assert code == 0
    assert f"quantkit {command} " in out and "Example" in out


def test_convert_has_every_flag_of_the_issue(cli: Run) -> None:
    _, out, _ = cli("convert", "--help")
    flags = """--format --output --bits --group-size --sym --asym --calibration --samples --seqlen --seed --skip
    --override --set --device --dtype --max-shard-size --dry-run --resume --overwrite --strict --json
    --trust-remote-code --revision --debug"""
    assert [flag for flag in flags.split() if flag not in out] == []


@pytest.mark.parametrize("name", FORMATS)
def test_every_option_of_every_format_is_listed(cli: Run, name: str) -> None:
    code, out, _ = cli("formats", name)
    assert code == 0
    assert all(field in out for field in get_format(name).Config.model_fields)
    for option in describe_options(get_format(name)):
        assert option.values and "typing" not in option.values


def test_formats_as_json(cli: Run) -> None:
    code, out, err = cli("formats", "--json")
    assert (code, err) == (0, "")
    assert set(json.loads(out)) == set(FORMATS)


# -- convert: flags to the API --------------------------------------------------------------------


def test_convert_passes_what_was_asked_and_nothing_else(cli: Run, no_convert: dict[str, Any]) -> None:
    code, _, err = cli("convert", "m", "--format", "AWQ", "-o", "out")
    assert code == 0, err
    progress = no_convert.pop("progress")
    assert isinstance(progress, RichProgress)
    assert no_convert == {
        "model": "m",
        "output": Path("out"),
        "format": "awq",
        "options": {},
        "skip": [],
        "overrides": [],
        **dict.fromkeys(("dry_run", "resume", "overwrite", "strict", "trust_remote_code"), False),
    }


def test_convert_translates_flags(cli: Run, no_convert: dict[str, Any]) -> None:
    flags = "--bits 3 --group-size 64 --asym --samples 4 --seqlen 32 --seed 7 --device cpu --dtype float32"
    more = ["--calibration", "t.txt", "--max-shard-size", "1GB", "--revision", "main", "--strict", "--resume"]
    patterns = [
        "--skip",
        "a",
        "--skip",
        "b*",
        "--override",
        "re:x:y:bits=8,group_size=-1",
        "--set",
        "sweeps=0",
    ]
    code, _, err = cli("convert", "m", "--format", "gptq", "-o", "out", *flags.split(), *more, *patterns)
    assert code == 0, err
    assert no_convert["options"] == {"bits": 3, "group_size": 64, "sym": False, "sweeps": 0}
    assert no_convert["overrides"] == [("re:x:y", {"bits": 8, "group_size": -1})]
    assert no_convert["skip"] == ["a", "b*"]
    wanted = {
        "samples": 4,
        "seqlen": 32,
        "seed": 7,
        "device": "cpu",
        "dtype": "float32",
        "calibration": "t.txt",
    }
    wanted |= {"max_shard_size": "1GB", "revision": "main", "strict": True, "resume": True}
    assert wanted.items() <= no_convert.items()


def test_json_is_alone_on_stdout(cli: Run, no_convert: dict[str, Any]) -> None:
    code, out, err = cli("convert", "m", "--format", "nf4", "-o", "out", "--json")
    assert code == 0
    assert json.loads(out)["format"] == "nf4"
    assert "a library chatters" in err


def test_common_flags_meet_the_formats_own_names() -> None:
    assert collect_options(get_format("nf4"), group_size=128) == {"block_size": 128}
    assert collect_options(get_format("nf4"), bits=4) == {}
    assert collect_options(get_format("awq"), sym=True) == {"zero_point": False}
    assert collect_options(get_format("hqq"), bits=2, group_size=16) == {"bits": 2, "group_size": 16}
    with pytest.raises(errors.UsageError, match="contradict"):
        collect_options(get_format("gptq"), bits=4, settings={"bits": 3})


@pytest.mark.parametrize(
    ("text", "value"),
    [("8", 8), ("-1", -1), ("0.5", 0.5), ("true", True), ("Off", False), ("none", None), ("mse", "mse")]
    + [("[128, 128]", [128, 128]), ("NaN", "NaN")],
)
def test_values(text: str, value: object) -> None:
    assert parse_value(text) == value


def test_overrides() -> None:
    assert parse_override("down_proj:bits=8") == ("down_proj", {"bits": 8})
    assert parse_override("re:(?:a|b):block=[128,128],x=y") == ("re:(?:a|b)", {"block": [128, 128], "x": "y"})
    for wrong in ("down_proj", "down_proj:", ":bits=8", "down_proj:bits", "a:bits=8,bits=4"):
        with pytest.raises(errors.UsageError):
            parse_override(wrong)


# -- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--format", "gptk", "-o", "x"], 2, "unknown format 'gptk'. Did you mean 'gptq'?"),
        (["--format", "gptq"], 2, "no output directory"),
        (["--format", "gptq", "-o", "x", "--bits", "5"], 2, "option bits is 5"),
        (["--format", "gptq", "-o", "x", "--set", "sweep=1"], 2, "no option 'sweep'. Did you mean 'sweeps'?"),
        (["--format", "gptq", "-o", "x", "--set", "sweeps"], 2, "is not key=value"),
        (["--format", "fp8", "-o", "x", "--bits", "4"], 2, "has no option 'bits'"),
        (["--format", "gptq", "-o", "x", "--override", "a:bits=9"], 2, "--override 'a'"),
        (["--format", "nf4", "-o", "x"], 3, "does not exist"),
    ],
)
def test_a_wrong_request_is_one_line(
    cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    found, out, err = cli("convert", "./no-such-model", *arguments)
    assert found == code
    assert out == "" and not (tmp_path / "x").exists()
    assert err.startswith("error: ") and err.count("\n") == 1
    assert message in err


def test_an_unknown_option_is_refused_with_a_suggestion(cli: Run) -> None:
    code, _, err = cli("convert", "m", "--fromat", "nf4", "-o", "x")
    assert code == 2 and "--format" in err


KINDS = [v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, errors.QuantkitError)]


@pytest.mark.parametrize("kind", KINDS)
def test_exit_codes(cli: Run, no_convert: dict[str, Any], kind: type[errors.QuantkitError]) -> None:
    no_convert["raises"] = kind("what\nis wrong", hint="Do [this].")
    assert cli("convert", "m", "--format", "nf4", "-o", "x") == (
        kind.exit_code,
        "",
        "error: what is wrong. Do [this].\n",
    )


def test_a_bug_says_so(cli: Run, no_convert: dict[str, Any]) -> None:
    no_convert["raises"] = KeyError("oops")
    code, _, err = cli("convert", "m", "--format", "nf4", "-o", "x")
    assert code == 70
    assert err.startswith("error: internal error: KeyError: 'oops'.") and "--debug" in err
    assert "Traceback" not in err
    with pytest.raises(KeyError):
        cli("convert", "m", "--format", "nf4", "-o", "x", "--debug")


def test_out_of_memory_says_what_to_do(cli: Run, no_convert: dict[str, Any]) -> None:
    no_convert["raises"] = MemoryError()
    code, _, err = cli("convert", "m", "--format", "nf4", "-o", "x")
    assert code == 1 and "out of memory" in err and "--samples" in err


def test_an_interruption_says_how_to_go_on(cli: Run, no_convert: dict[str, Any]) -> None:
    no_convert["raises"] = KeyboardInterrupt()
    code, out, err = cli("convert", "my model", "--format", "nf4", "-o", "x")
    assert (code, out) == (130, "")
    assert err.startswith("interrupted: ")
    assert err.rstrip().endswith("quantkit convert 'my model' --format nf4 -o x --resume")


# -- the real thing -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def converted(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(source, an hqq checkpoint that the command line made of it)."""
    out = tmp_path_factory.mktemp("cli") / "out"
    source = tiny("llama")
    code = run(["convert", str(source), "--format", "hqq", "--group-size", "32", "-o", str(out), "--json"])
    assert code == 0
    return source, out


def test_convert_prints_a_table(cli: Run, tiny: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, text, err = cli("convert", tiny("llama"), "--format", "nf4", "-o", out, "--skip", "layers.0.mlp.*")
    assert code == 0, err
    for words in (
        "worst layers",
        "size before",
        "size after",
        "bits per weight",
        "peak memory",
        "written to",
    ):
        assert words in text
    assert "11 quantized, 4 kept" in text and "left" not in text
    assert re.search(r"\[11/11\] model\.layers\.1\.\S+ weight error 0\.", err)
    card = (out / "README.md").read_text()
    assert "--skip 'layers.0.mlp.*'" in card
    code, _, err = cli("convert", tiny("llama"), "--format", "nf4", "-o", out)
    assert code == 5 and "--overwrite" in err


def test_dry_run_writes_nothing(cli: Run, tiny: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny("llama")
    code, text, err = cli("convert", source, "--format", "gptq", "-o", tmp_path / "out", "--dry-run")
    assert code == 0, err
    assert list(tmp_path.iterdir()) == []
    for words in (
        "size after",
        "peak memory",
        "disk",
        "time",
        "calibration",
        "output embedding",
        "nothing was",
    ):
        assert words in text
    assert re.search(r"layers\.\*\.mlp\.down_proj +2 x +64x96 +quantize", text)
    code, text, _ = cli("convert", source, "--format", "nf4", "--dry-run", "--json")
    plan = json.loads(text)
    assert code == 0
    assert {"layers", "size_after", "peak_rss", "disk", "seconds"} <= plan.keys()
    assert {layer["action"] for layer in plan["layers"]} == {"quantized", "kept"}


def test_inspect(cli: Run, converted: tuple[Path, Path]) -> None:
    source, out = converted
    code, text, _ = cli("inspect", out, "--layers")
    assert code == 0
    assert "hqq" in text and "LlamaForCausalLM" in text and "model.layers.1.mlp.up_proj" in text
    code, text, _ = cli("inspect", source, "--json")
    assert code == 0 and json.loads(text)["format"] is None
    assert cli("inspect", source / "config.json")[0] == 3


def test_verify_accepts_and_refuses(
    cli: Run, converted: tuple[Path, Path], tiny: Callable[..., Path]
) -> None:
    source, out = converted
    code, text, err = cli("verify", out, "--against", source, "--loader", "none")
    assert code == 0, text + err
    assert "MISMATCH" not in text and "verified" in text
    code, text, _ = cli("verify", out, "--against", tiny("mistral"), "--loader", "none", "--json")
    report = json.loads(text)
    assert code == 1 and report["ok"] is False
    assert {c["name"]: c["ok"] for c in report["checks"]}["layers"] is False


def test_verify_finds_a_changed_file(cli: Run, converted: tuple[Path, Path], tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(converted[1], copy)
    with (copy / "tokenizer.json").open("a") as file:
        file.write("\n")
    code, text, _ = cli("verify", copy, "--loader", "none")
    assert code == 1 and "tokenizer.json has changed" in text
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-5] ^= 255
    (copy / "model.safetensors").write_bytes(data)
    code, text, _ = cli("verify", copy, "--loader", "none")
    assert code == 1 and "model.safetensors has changed" in text


def test_verify_wants_a_loader_that_exists(cli: Run, converted: tuple[Path, Path]) -> None:
    code, _, err = cli("verify", converted[1], "--loader", "gptqmodl")
    assert code == 2 and err.startswith("error: unknown loader") and "Did you mean 'gptqmodel'" in err


@pytest.mark.peer
def test_verify_compares_with_the_owner(cli: Run, converted: tuple[Path, Path]) -> None:
    pytest.importorskip("hqq")
    code, text, err = cli("verify", converted[1], "--loader", "hqq")
    assert code == 0, text + err
    assert re.search(r"logits against hqq +ok", text)


def test_generate(cli: Run, converted: tuple[Path, Path]) -> None:
    code, text, err = cli("generate", converted[1], "--prompt", "abc", "--max-new-tokens", "5")
    assert code == 0, err
    assert text.startswith("abc") and text.endswith("\n")
    assert re.search(r"\d+ tokens in \d+\.\d+ s: \d+\.\d tokens/s", err)
    again = cli("generate", converted[1], "--prompt", "abc", "--max-new-tokens", "5")[1]
    assert again == text
    drawn = ["--temperature", "2", "--seed", "3", "--max-new-tokens", "8"]
    first, second = (cli("generate", converted[1], "-p", "abc", *drawn)[1] for _ in range(2))
    assert first == second


def test_generate_refuses_what_it_cannot_do(cli: Run, tiny: Callable[..., Path], tmp_path: Path) -> None:
    code, _, err = cli("generate", tiny("llama"), "--prompt", "x" * 500)
    assert code == 2 and "context" in err
    code, _, err = cli("generate", tiny("bert"), "--prompt", "x")
    assert code == 2 and "does not generate" in err


def test_eval(cli: Run, converted: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = converted
    text_file = tmp_path / "text.txt"
    text_file.write_text("Some text to measure on. " * 40)
    arguments = ["eval", out, "--reference", source, "--data", text_file, "--tokens", "300"]
    code, text, err = cli(*arguments)
    assert code == 0, err
    assert "perplexity" in text and "KL" in text
    code, text, _ = cli(*arguments, "--json")
    assert code == 0 and len(json.loads(text)["rows"]) == 2


# -- progress and reports -------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_progress(stream: type[io.StringIO]) -> None:
    out = stream()
    progress = RichProgress(out, interval=0.0)
    progress.start(2, "awq: model")
    progress.stage("reading [text]")
    progress.layer(
        LayerReport("a.[b]", (2, 2), "quantized", weight_error=0.125, output_error=0.5, notes=["n"])
    )
    progress.layer(LayerReport("kept", (2, 2), "kept", notes=["router"]))
    progress.layer(LayerReport("c", (2, 2), "quantized", weight_error=0.25))
    progress.finish()
    progress.finish()
    text = out.getvalue()
    assert "awq: model" in text and "c weight error 0.2500" in text
    if stream is io.StringIO:
        assert "[1/2] a.[b] weight error 0.1250, output error 0.5000, " in text and "left" in text
        assert "[2/2]" in text and "kept" not in text


def test_null_progress_takes_everything() -> None:
    progress = NullProgress()
    progress.start(1, "")
    progress.stage("")
    progress.layer(LayerReport("a", (1, 1), "kept"))
    progress.finish()


def test_sizes_and_durations() -> None:
    assert [size(n) for n in (0, 999, 1500, 2.5e6, 7e12)] == ["0 B", "999 B", "1.50 kB", "2.50 MB", "7.00 TB"]
    assert [duration(s) for s in (0.04, 59.9, 61, 3700)] == ["0.0 s", "59.9 s", "1 min 1 s", "1 h 1 min"]


def test_reports_survive_json() -> None:
    layer = LayerReport("a", (3, 4), "quantized", {"bits": 4}, 4.5, float("nan"), None, 1.0, ["note"])
    plain = json.loads(json.dumps(layer.to_json()))
    assert plain["weight_error"] is None and plain["shape"] == [3, 4]
    layer.weight_error = 0.5
    assert LayerReport.from_json({**layer.to_json(), "unknown": 1}) == layer
    assert to_plain({1: Path("x"), "s": {2}}) == {"1": "x", "s": [2]}
    plan = PlanReport("m", None, "nf4", {})
    assert plan.to_json()["layers"] == [] and plan.quantized == plan.kept == []
