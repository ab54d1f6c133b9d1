"""Offline text that every full Python installation carries, split for training and evaluation.

Calibration and perplexity need text, and a machine without a network has none to
download.  CPython ships three kinds of it, which this module reads without importing
anything but the standard library:

* ``topics``: the language-reference chapters behind ``help("topic")``
  (``pydoc_data.topics``);
* ``docstrings``: the docstrings of one standard-library module with the signatures
  they belong to, taken from its source with :mod:`ast` (no module is imported);
* ``sources``: one standard-library source file.

Longer texts are cut at blank lines into documents of at most 8000 characters.  Every
document has a stable name, and the SHA-256 of a *group* name assigns it to a
split: about 5 % of the groups to ``eval``, 5 % to ``calibration``, the rest to
``train``.  A source file and its docstrings form one group, and so do topics that
quote the same paragraph.  The splits therefore share no document.  They can still share
short passages, such as a licence header that several modules repeat.

The text is that of the running interpreter: Python 3.11 and 3.12, and to a lesser
degree two patch releases, give slightly different text.  Report the Python version
beside a figure measured on it, and compare only figures from the same version.  The
text is part of CPython and stands under the PSF licence.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = ["BuiltinTextError", "Document", "Kind", "Split", "documents", "split_of", "text"]

Split = Literal["train", "calibration", "eval"]
Kind = Literal["topics", "docstrings", "sources"]

_KINDS: tuple[Kind, ...] = ("topics", "docstrings", "sources")
_EVAL_SHARE = 0.05
_CALIBRATION_SHARE = 0.05
_SEPARATOR = "\n\n\n"
_MIN_CHARS = 200
_MAX_CHARS = 8000
_MIN_MODULES = 50

_SKIPPED_DIRS = frozenset(
    {
        "__phello__",
        "__pycache__",
        "dist-packages",
        "encodings",
        "idlelib",
        "lib-dynload",
        "lib2to3",
        "msilib",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
    }
)
_SKIPPED_FILE = re.compile(r"(?:_?test.*|.*_tests?|_sysconfigdata.*|_sysconfig_vars.*)\.py")
_PARAGRAPH_BREAK = re.compile(r"\n\s*\n")


class BuiltinTextError(RuntimeError):
    """This Python installation does not carry the text that was asked for."""


@dataclass(frozen=True, slots=True)
class Document:
    """One named piece of text.

    The name is the kind and the topic or module, such as ``sources:json.decoder``; the
    second and later pieces of a long one add their number: ``sources:json.decoder#2``.
    """

    name: str
    kind: Kind
    text: str


@dataclass(frozen=True, slots=True)
class _Entry:
    """A topic, module source or set of docstrings that is listed but not read."""

    name: str
    kind: Kind
    group: str
    path: Path | None = None


def documents(
    split: Split, kinds: Sequence[Kind] = ("topics", "docstrings", "sources")
) -> Iterator[Document]:
    """Yield the documents of one split in an order that never changes.

    The first piece of every topic and module comes first, in the order of the hash of
    its name, then all the second pieces, and so on, so that the first documents are a
    sample of the whole.  Files are read as they are needed: taking a few documents is
    cheap.  Pieces of less than 200 characters and files of data tables are left out.

    Raises:
        ValueError: for an unknown split or kind.
        BuiltinTextError: when the installation lacks the standard-library sources or
            the documentation topics.
    """
    if split not in ("train", "calibration", "eval"):
        raise ValueError(f"unknown split {split!r}: use 'train', 'calibration' or 'eval'")
    unknown = [kind for kind in kinds if kind not in _KINDS]
    if unknown:
        raise ValueError(f"unknown kind {unknown[0]!r}: use {', '.join(map(repr, _KINDS))}")
    return _read(split, frozenset(kinds))


def text(split: Split, max_chars: int | None = None) -> str:
    """Return one split as a single string, cut after ``max_chars`` characters.

    The order is that of :func:`documents`, which mixes all kinds and modules, so that
    a prefix is a sample of the whole rather than its first topic.
    """
    if max_chars is not None and max_chars < 0:
        raise ValueError(f"max_chars must not be negative, got {max_chars}")
    parts: list[str] = []
    size = 0
    for document in documents(split):
        if max_chars is not None and size >= max_chars:
            break
        parts.append(document.text)
        size += len(document.text) + len(_SEPARATOR)
    return _SEPARATOR.join(parts)[:max_chars]


def split_of(group: str) -> Split:
    """Return the split that the documents of ``group`` belong to."""
    position = int(_digest(group)[:13], 16) / 16**13
    if position < _EVAL_SHARE:
        return "eval"
    if position < _EVAL_SHARE + _CALIBRATION_SHARE:
        return "calibration"
    return "train"


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _read(split: Split, kinds: frozenset[Kind]) -> Iterator[Document]:
    topics = _topics() if "topics" in kinds else {}
    entries = list(_topic_entries(topics))
    if kinds & {"docstrings", "sources"}:
        entries += _module_entries(kinds)
    chosen = [entry for entry in entries if split_of(entry.group) == split]
    chosen.sort(key=lambda entry: _digest(entry.name))
    pending = [(entry, _pieces(entry, topics)) for entry in chosen]
    number = 1
    while pending:
        unfinished = []
        for entry, pieces in pending:
            piece = next(pieces, None)
            if piece is None:
                continue
            unfinished.append((entry, pieces))
            if len(piece) >= _MIN_CHARS:
                name = entry.name if number == 1 else f"{entry.name}#{number}"
                yield Document(name, entry.kind, piece)
        pending = unfinished
        number += 1


def _pieces(entry: _Entry, topics: dict[str, str]) -> Iterator[str]:
    """Cut the text of an entry at its last blank line, or else line end, before the limit."""
    subject = entry.name.partition(":")[2]
    path = entry.path
    rest = topics[subject] if path is None else _module_text(path, entry.kind, subject)
    rest = rest.strip("\n")
    while len(rest) > _MAX_CHARS:
        cut = rest.rfind("\n\n", _MAX_CHARS // 2, _MAX_CHARS)
        if cut < 0:
            cut = rest.rfind("\n", 1, _MAX_CHARS)
        if cut < 0:
            cut = _MAX_CHARS
        yield rest[:cut].rstrip()
        rest = rest[cut:].strip("\n")
    yield rest.rstrip()


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise BuiltinTextError(
            "this Python installation has no documentation topics (pydoc_data.topics), "
            "which the built-in text needs: install the full standard library or pass a text file"
        ) from error
    return {str(name): str(body) for name, body in topics.items()}


def _topic_entries(topics: dict[str, str]) -> Iterator[_Entry]:
    """List the topics; those that repeat a paragraph of one another share a group."""
    leader = {name: name for name in topics}

    def find(name: str) -> str:
        while leader[name] != name:
            name = leader[name]
        return name

    first_with: dict[str, str] = {}
    for name in sorted(topics):
        for paragraph in _PARAGRAPH_BREAK.split(topics[name]):
            key = " ".join(paragraph.split())
            if len(key) < 60:
                continue
            low, high = sorted((find(first_with.setdefault(key, name)), find(name)))
            leader[high] = low
    for name in topics:
        yield _Entry(f"topics:{name}", "topics", f"topics:{find(name)}")


def _module_entries(kinds: frozenset[Kind]) -> list[_Entry]:
    root = Path(sysconfig.get_paths()["stdlib"])
    entries = []
    modules = 0
    for path in _module_paths(root):
        modules += 1
        parts = path.relative_to(root).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        for kind in _KINDS[1:]:
            if kind in kinds:
                entries.append(_Entry(f"{kind}:{module}", kind, f"module:{module}", path))
    if modules < _MIN_MODULES:
        raise BuiltinTextError(
            f"the Python standard-library sources are missing: {root} holds {modules} usable .py "
            "files. The built-in text is made from them; use a Python that ships its sources "
            "(not one with a zipped or bytecode-only library) or pass a text file"
        )
    return entries


def _module_paths(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(
            name for name in subfolders if name not in _SKIPPED_DIRS and not name.startswith("config-")
        )
        for name in sorted(names):
            if name.endswith(".py") and not _SKIPPED_FILE.fullmatch(name):
                yield Path(folder, name)


def _module_text(path: Path, kind: Kind, module: str) -> str:
    """Return a source file or its docstrings; empty when it is unreadable or a table."""
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
    if _is_table(source):
        return ""
    if kind == "sources":
        return source.expandtabs(8)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    return "\n\n".join(_docstrings(tree, module))


def _is_table(source: str) -> bool:
    """Tell whether most of a file is the rows of a literal table."""
    lines = [line for line in map(str.strip, source.splitlines()) if line]
    rows = 0
    for line in lines:
        if line[0] in "'\"([{-0123456789":
            rows += line.endswith(",") or "," in line.partition("#")[0][-3:]
    return 2 * rows > len(lines)


def _docstrings(node: ast.AST, name: str) -> Iterator[str]:
    """Yield a heading and the docstring of ``node`` and of the definitions in it."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        body = ast.get_docstring(node)
        if body:
            heading = name
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                heading = f"{name}({ast.unparse(node.args)})"
            elif isinstance(node, ast.ClassDef):
                heading = f"class {name}({', '.join(map(ast.unparse, node.bases))})"
            yield f"{heading}\n\n{body}"
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child, f"{name}.{child.name}")
        elif isinstance(child, ast.stmt):
            yield from _docstrings(child, name)
