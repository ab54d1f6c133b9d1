"""The documentation is true: commands parse, marked Python runs, generated tables are in step."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    p for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*/README.md")]
)
_BLOCK = re.compile(
    r"^(?P<run><!-- run -->\n)?```(?P<language>\w+)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
)


def blocks(page: Path, *languages: str) -> Iterator[re.Match[str]]:
    for match in _BLOCK.finditer(page.read_text(encoding="utf-8")):
        if match["language"] in languages:
            yield match


def commands(page: Path) -> Iterator[str]:
    """Every `quantkit ...` line of a page's shell blocks, continuation lines joined."""
    for match in blocks(page, "bash", "console", "sh", "shell"):
        joined = re.sub(r"\\\n\s*", " ", match["code"])
        for line in joined.splitlines():
            line = line.strip().removeprefix("$ ")
            if re.match(r"(\w+=\S+ )*(python -m )?quantkit ", line):
                yield line


def all_commands() -> list[Any]:
    found = [(page, line) for page in PAGES for line in commands(page)]
    return [pytest.param(line, id=f"{page.relative_to(ROOT)}:{line[:50]}") for page, line in found]


def parse(arguments: list[str]) -> tuple[str, dict[str, Any]]:
    """(command, its parameters) as the command line parses them; nothing is run."""
    from quantkit.cli.app import app

    group: Any = typer.main.get_command(app)
    context = group.make_context("quantkit", list(arguments))
    name, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
    return name, command.make_context(name, rest, parent=context).params


def arguments_of(line: str) -> list[str]:
    words = shlex.split(line, comments=True)
    words = words[words.index("quantkit") + 1 :]
    for stop in ("|", ">", ">>", "2>", "&&", ";"):
        if stop in words:
            words = words[: words.index(stop)]
    return words


@pytest.mark.parametrize("line", all_commands())
def test_commands_exist(line: str) -> None:
    from quantkit.formats import get_format
    from quantkit.options import build_config, collect_options, parse_assignments, parse_override
    from quantkit.sweep import parse_settings

    arguments = arguments_of(line)
    if arguments in (["--help"], ["--version"]):
        return
    name, params = parse(arguments)
    if name == "formats" and params["name"]:
        get_format(params["name"])
    if name == "convert":
        fmt = get_format(params["format"])
        options = collect_options(
            fmt,
            bits=params["bits"],
            group_size=params["group_size"],
            sym=params["sym"],
            settings=parse_assignments(params["settings"] or [], "--set"),
        )
        for text in params["override"] or []:
            if not text.startswith("@"):
                build_config(fmt, {**options, **parse_override(text)[1]})
    if name == "sweep":
        assert parse_settings(params["formats"])


def test_the_readme_shows_commands() -> None:
    assert len(list(commands(ROOT / "README.md"))) >= 8


def test_a_wrong_option_would_be_noticed() -> None:
    with pytest.raises(Exception, match=r"(?i)no such option"):
        parse(["convert", "model", "--format", "awq", "--fromat", "x"])


def runnable() -> list[Any]:
    found = [(page, match) for page in PAGES for match in blocks(page, "python") if match["run"]]
    return [pytest.param(m["code"], id=f"{p.relative_to(ROOT)}:{i}") for i, (p, m) in enumerate(found)]


@pytest.mark.parametrize("code", runnable())
def test_marked_python_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (ROOT / "examples" / "pydoc-llama-7m" / "model.safetensors").is_file():
        pytest.skip("the example checkpoint is not here")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "<documentation>", "exec"), {"__name__": "__main__"})


def runnable_commands() -> list[Any]:
    found = [(page, match) for page in PAGES for match in blocks(page, "sh") if match["run"]]
    return [pytest.param(m["code"], id=f"{p.relative_to(ROOT)}:{i}") for i, (p, m) in enumerate(found)]


@pytest.mark.parametrize("code", runnable_commands())
def test_marked_commands_run(code: str, tmp_path: Path) -> None:
    """In order, in an empty directory beside the examples; the first that fails ends it."""
    pytest.importorskip("onnxruntime")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path}
    done = subprocess.run(
        ["bash", "-euc", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_formats_is_in_step() -> None:
    script = load_script("format_table")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert script.updated(text) == text, "run: python scripts/format_table.py --write"


def test_exit_codes_are_documented() -> None:
    from quantkit import errors
    from quantkit.cli import guard

    classes = [
        v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, errors.QuantkitError)
    ]
    codes = {c.exit_code for c in classes} | {0, guard.EXIT_FAILED, guard.EXIT_BUG, guard.EXIT_INTERRUPTED}
    documented = re.findall(
        r"^\| (\d+) \|", (ROOT / "docs" / "index.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert sorted(codes) == sorted(map(int, documented))


def link_targets() -> list[Any]:
    found = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                found.append(pytest.param(page, target, id=f"{page.relative_to(ROOT)}->{target}"))
    return found


@pytest.mark.parametrize(("page", "target"), link_targets())
def test_links_lead_somewhere(page: Path, target: str) -> None:
    assert (page.parent / target).exists()
