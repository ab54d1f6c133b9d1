"""The built-in text: disjoint and stable splits, one split per module, clear errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from quantkit import builtin_text
from quantkit.builtin_text import BuiltinTextError, Document, Split, documents, split_of, text

SPLITS: tuple[Split, ...] = ("train", "calibration", "eval")


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Document]]:
    return {split: list(documents(split)) for split in SPLITS}


def subject(document: Document) -> str:
    """The topic or module of a document, without its kind and piece number."""
    return document.name.partition(":")[2].partition("#")[0]


def test_every_split_holds_every_kind(splits: dict[str, list[Document]]) -> None:
    for split in SPLITS:
        assert {document.kind for document in splits[split]} == {"topics", "docstrings", "sources"}
    sizes = {split: sum(len(document.text) for document in splits[split]) for split in SPLITS}
    assert sizes["eval"] > 100_000
    assert sizes["calibration"] > 100_000
    assert sizes["train"] > 8 * (sizes["eval"] + sizes["calibration"]) > 0


def test_documents_have_unique_names_and_bounded_size(splits: dict[str, list[Document]]) -> None:
    everything = [document for split in SPLITS for document in splits[split]]
    assert len({document.name for document in everything}) == len(everything)
    assert all(200 <= len(document.text) <= 8000 for document in everything)
    assert all(document.name.startswith(f"{document.kind}:") for document in everything)


def test_no_text_is_in_two_splits(splits: dict[str, list[Document]]) -> None:
    texts = {split: {document.text for document in splits[split]} for split in SPLITS}
    assert not texts["eval"] & texts["train"]
    assert not texts["eval"] & texts["calibration"]
    assert not texts["calibration"] & texts["train"]


def test_source_and_docstrings_of_a_module_share_a_split(
    splits: dict[str, list[Document]],
) -> None:
    home: dict[str, str] = {}
    kinds: dict[str, set[str]] = {}
    for split in SPLITS:
        for document in splits[split]:
            if document.kind != "topics":
                assert home.setdefault(subject(document), split) == split
                assert split_of(f"module:{subject(document)}") == split
                kinds.setdefault(subject(document), set()).add(document.kind)
    assert kinds["argparse"] == {"docstrings", "sources"}
    assert sum(len(found) == 2 for found in kinds.values()) > 100


def test_topics_that_repeat_a_paragraph_share_a_split(splits: dict[str, list[Document]]) -> None:
    home = {subject(d): split for split in SPLITS for d in splits[split] if d.kind == "topics"}
    # help("specialnames") quotes the whole text of these two.
    assert home["attribute-access"] == home["context-managers"] == home["specialnames"]


def test_no_test_suite_or_site_package_is_used(splits: dict[str, list[Document]]) -> None:
    for split in SPLITS:
        for document in splits[split]:
            parts = set(subject(document).split("."))
            assert not parts & {"test", "tests", "site-packages", "idlelib", "encodings"}


def test_order_does_not_depend_on_the_kinds_asked_for() -> None:
    names = [document.name for document in documents("eval")]
    for kind in ("topics", "docstrings", "sources"):
        alone = [document.name for document in documents("eval", kinds=(kind,))]
        assert alone == [name for name in names if name.startswith(kind)]
        assert alone


def test_text_is_the_same_in_another_process() -> None:
    code = (
        "from quantkit.builtin_text import text; import sys; sys.stdout.buffer.write(text('eval').encode())"
    )
    root = Path(builtin_text.__file__).parent.parent
    other = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, check=True)
    assert other.stdout.decode() == text("eval")


def test_text_prefix_is_exact_and_mixed() -> None:
    whole = text("calibration")
    assert text("calibration", 50_000) == whole[:50_000]
    assert len(text("calibration", 50_000)) == 50_000
    assert text("calibration", 0) == ""
    assert text("calibration", 10**9) == whole
    first = [subject(document) for document, _ in zip(documents("calibration"), range(12), strict=False)]
    assert len(set(first)) > 6


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown split 'test'"):
        documents("test")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown kind 'tests'"):
        documents("eval", kinds=("tests",))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must not be negative"):
        text("eval", -1)


def test_missing_sources_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin_text.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "lib")})
    with pytest.raises(BuiltinTextError, match="sources are missing"):
        text("eval")
    assert list(documents("eval", kinds=("topics",)))


def test_missing_topics_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(BuiltinTextError, match="documentation topics"):
        text("eval")


def test_unreadable_and_tabular_files_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(60):
        (tmp_path / f"mod{number}.py").write_text(f'"""Module {number}."""\n' + "value = 1\n" * 40)
    (tmp_path / "table.py").write_text("table = {\n" + "    'key': 'value',\n" * 100 + "}\n")
    (tmp_path / "broken.py").write_text("def broken(:\n" * 40)
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n" * 60)
    monkeypatch.setattr(builtin_text.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    kept = {d.name for split in SPLITS for d in documents(split, ("sources", "docstrings"))}
    assert {f"sources:mod{number}" for number in range(60)} <= kept
    assert "sources:broken" in kept
    assert not kept & {"sources:table", "sources:latin", "docstrings:broken"}
