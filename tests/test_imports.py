"""The import rule of docs/architecture.md, read off the source with `ast`."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "quantkit"
FILES = sorted(PACKAGE.rglob("*.py"))

#: What `quantkit.algorithms` and `quantkit.formats` may import of quantkit.
#: (`topology` is data about architectures: it imports nothing of quantkit itself.)
FOUNDATION = {"quantkit", "quantkit.encoding", "quantkit.bitpack", "quantkit.errors", "quantkit.topology"}
#: Where transformers may be imported (packages by their name).
TRANSFORMERS = (
    "quantkit.meta_model",
    "quantkit.skeleton",
    "quantkit.load",
    "quantkit.calibration",
    "quantkit.eval",
    "quantkit.export.decoder",
)
#: Part -> parts it may never reach up to. `formats` and `algorithms` have a rule of their own.
LAYERS = [
    ("errors", "encoding", "bitpack", "untrusted"),
    ("kernels",),
    ("linear",),
    (
        "load",
        "convert",
        "calibrated",
        "calibration",
        "plan",
        "meta_model",
        "skeleton",
        "checkpoint",
        "publish",
        "shards",
    ),
    ("export", "eval"),
    ("cli",),
]


def module_name(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST, *, typing: bool = True) -> Iterator[tuple[str, int]]:
    """(absolute name, line) of everything that a module imports, at any depth."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative imports hide the direction"
            assert node.module is not None
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno
            yield node.module, node.lineno


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.fixture(params=FILES, ids=[module_name(f) for f in FILES])
def module(request: pytest.FixtureRequest) -> tuple[str, ast.Module]:
    file: Path = request.param
    return module_name(file), ast.parse(file.read_text(encoding="utf-8"), str(file))


def test_triton_only_in_kernels(module: tuple[str, ast.Module]) -> None:
    name, tree = module
    found = [line for target, line in imports(tree) if within(target, "triton")]
    assert not found or within(name, "quantkit.kernels"), f"{name} imports triton in line {found[0]}"


def test_transformers_only_where_models_are_built(module: tuple[str, ast.Module]) -> None:
    name, tree = module
    found = [line for target, line in imports(tree) if within(target, "transformers")]
    allowed = any(within(name, package) for package in TRANSFORMERS)
    assert not found or allowed, f"{name} imports transformers in line {found[0]}"


def test_no_torch_cuda(module: tuple[str, ast.Module]) -> None:
    name, tree = module
    lines = [line for target, line in imports(tree) if within(target, "torch.cuda")]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "cuda" and isinstance(node.value, ast.Name):
            lines += [node.lineno] if node.value.id == "torch" else []
    assert not lines, f"{name} uses torch.cuda in line {lines[0]}: use torch.accelerator"


def test_algorithms_and_formats_know_neither_disk_nor_kernels(module: tuple[str, ast.Module]) -> None:
    name, tree = module
    ours = [(t, line) for t, line in imports(tree) if within(t, "quantkit")]
    if within(name, "quantkit.algorithms"):
        packages = ("quantkit.algorithms",)
    elif within(name, "quantkit.formats"):
        packages = ("quantkit.algorithms", "quantkit.formats")
    else:
        return
    for target, line in ours:
        allowed = any(within(target, p) for p in packages)
        # `from quantkit import bitpack` and `from quantkit.encoding import Affine` name these modules.
        allowed = allowed or target in FOUNDATION or target.rpartition(".")[0] in FOUNDATION - {"quantkit"}
        allowed = allowed or target == "quantkit.__version__"
        assert allowed, f"{name} imports {target} in line {line}"


@pytest.mark.parametrize("leaf", ["errors", "bitpack", "topology", "report_types"])
def test_leaves_import_nothing_of_ours(leaf: str) -> None:
    tree = ast.parse((PACKAGE / f"{leaf}.py").read_text(encoding="utf-8"))
    assert not [target for target, _ in imports(tree) if within(target, "quantkit")]


def test_direction(module: tuple[str, ast.Module]) -> None:
    """errors, encoding, bitpack <- kernels <- linear <- load, convert <- export, eval <- cli."""
    name, tree = module
    rank = {part: i for i, parts in enumerate(LAYERS) for part in parts}
    part = name.split(".")[1] if "." in name else ""
    if part not in rank:
        return
    skip = type_checking_lines(tree)
    for target, line in imports(tree):
        pieces = target.split(".")
        if pieces[0] == "quantkit" and len(pieces) > 1 and line not in skip:
            other = rank.get(pieces[1], -1)
            assert other <= rank[part], f"{name} imports {target} in line {line}, which is above it"


def type_checking_lines(tree: ast.Module) -> set[int]:
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            lines.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def test_files_stay_readable(module: tuple[str, ast.Module]) -> None:
    name, tree = module
    length = max((getattr(node, "end_lineno", 0) or 0 for node in ast.walk(tree)), default=0)
    assert length <= 450, f"{name} has {length} lines: split it"
    assert name == "quantkit.__main__" or ast.get_docstring(tree) or length == 0, f"{name} has no docstring"


def _loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import quantkit",
        "import quantkit.cli.app",
        "import quantkit.report_types, quantkit.progress, quantkit.model_card",
        "import quantkit.formats",
        "import quantkit.inspect",
    ],
)
def test_nothing_heavy_at_import(statement: str) -> None:
    """`import quantkit` and `quantkit --help` answer at once."""
    heavy = {"torch", "transformers", "numpy", "safetensors", "triton", "pydantic", "jinja2", "yaml"}
    heavy &= _loaded_by(statement)
    assert not heavy


def test_a_submodule_does_not_hide_the_function_of_its_name() -> None:
    import quantkit
    import quantkit.load
    from quantkit.inspect import inspect

    assert callable(quantkit.load) and quantkit.load.__name__ == "load"
    assert quantkit.inspect is inspect
    assert {"convert", "evaluate", "generate", "inspect", "load", "verify"} <= set(dir(quantkit))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        quantkit.nonsense  # noqa: B018
