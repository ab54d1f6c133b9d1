"""Reader and writer, configurations, resumption and hashes under random content."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from disk_support import random_tensor, raw, tree
from hypothesis import assume, example, given
from hypothesis import strategies as st

from quantkit.checkpoint import MANIFEST, CheckpointReader
from quantkit.errors import CheckpointError, ConfigError
from quantkit.formats import LAYOUTS, get_layout
from quantkit.progress import NullProgress
from quantkit.publish import CheckpointWriter
from quantkit.shards import DTYPES
from quantkit.untrusted import parse_json
from quantkit.verify import VerifyReport, _check_files

NAMES = st.text("abc.0123_-é", min_size=1, max_size=12).filter(lambda n: n != "__metadata__")
SHAPES = st.lists(st.integers(0, 7), max_size=4).map(tuple)
TENSORS = st.dictionaries(NAMES, st.tuples(st.sampled_from(sorted(DTYPES)), SHAPES), min_size=1, max_size=12)


@st.composite
def units(draw: st.DrawFn) -> dict[str, dict[str, torch.Tensor]]:
    """Unit -> tensors with random bytes; every name belongs to one unit."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    result: dict[str, dict[str, torch.Tensor]] = {}
    for number, (name, (code, shape)) in enumerate(draw(TENSORS).items()):
        unit = f"u{number // draw(st.integers(1, 4))}"
        result.setdefault(unit, {})[name] = random_tensor(shape, DTYPES[code])
    return result


def write(
    dest: Path, content: dict[str, dict[str, torch.Tensor]], limit: int, stop: int | None = None, **kw
) -> None:
    with CheckpointWriter(dest, max_shard_size=limit, **kw) as writer:
        for number, (unit, tensors) in enumerate(content.items()):
            if number == stop:
                raise KeyboardInterrupt
            if unit not in writer.completed:
                writer.write_unit(unit, tensors, report={"unit": unit})
        writer.add_json("config.json", {"model_type": "llama"})
        writer.publish()


@pytest.fixture(scope="module")
def folder():
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        yield Path(name)


@given(units(), st.integers(1, 2000))
def test_what_is_written_is_read(folder: Path, content, limit: int) -> None:
    dest = folder / "w"
    shutil.rmtree(dest, ignore_errors=True)
    write(dest, content, limit)
    want = {name: tensor for tensors in content.values() for name, tensor in tensors.items()}
    with CheckpointReader(dest) as reader:
        assert set(reader.names()) == set(want)
        for name, tensor in want.items():
            got = reader.read(name)
            assert got.dtype == tensor.dtype and got.shape == tensor.shape and raw(got) == raw(tensor)
            assert reader.info(name).nbytes == tensor.numel() * tensor.element_size()
            if tensor.dim() and len(tensor):
                last = reader.read_index(name, len(tensor) - 1)
                assert raw(last) == raw(tensor[-1])


@given(units(), st.integers(1, 2000), st.integers(0, 5))
def test_resumed_bytes_are_those_of_one_run(folder: Path, content, limit: int, stop: int) -> None:
    whole, parts = folder / "whole", folder / "parts"
    for path in (whole, parts, folder / ".parts.quantkit-staging"):
        shutil.rmtree(path, ignore_errors=True)
    write(whole, content, limit)
    if stop < len(content):
        with pytest.raises(KeyboardInterrupt):
            write(parts, content, limit, stop)
        assert not parts.exists()
    write(parts, content, limit, resume=True)
    assert tree(parts) == tree(whole)
    assert not (folder / ".parts.quantkit-staging").exists()


@given(units(), st.data())
def test_one_flipped_bit_anywhere_is_found(folder: Path, content, data) -> None:
    """In every file, the manifest included."""
    dest = folder / "v"
    shutil.rmtree(dest, ignore_errors=True)
    write(dest, content, 300)

    def hashes_hold() -> bool:
        report = VerifyReport(str(dest), None)
        _check_files(dest, MANIFEST, report, NullProgress())
        return report.ok

    assert hashes_hold()
    files = sorted(p for p in dest.rglob("*") if p.is_file() and p.stat().st_size)
    assert json.loads((dest / "quantkit_manifest.json").read_text())["files"].keys() == {
        p.name for p in dest.iterdir() if p.name != "quantkit_manifest.json"
    }
    for file in files:
        content_bytes = bytearray(file.read_bytes())
        bit = data.draw(st.integers(0, 8 * len(content_bytes) - 1), label=file.name)
        content_bytes[bit // 8] ^= 1 << bit % 8
        original = file.read_bytes()
        file.write_bytes(content_bytes)
        try:
            found = not hashes_hold()
        except CheckpointError:  # a manifest that is no JSON any more
            found = file.name == MANIFEST
        assert found, (file.name, bit)
        file.write_bytes(original)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
KEYS = ["bits", "group_size", "desc_act", "sym", "dynamic", "checkpoint_format", "version", "zero_point"]
KEYS += ["quant_config", "config_groups", "format", "weight_block_size", "activation_scheme", "fmt"]
KEYS += ["linear_class", "load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_compute_dtype", "pack_dtype"]
GOOD = st.sampled_from(
    [4, 8, 32, 128, -1, True, False, "gptq", "gemm", "nf4", "bfloat16", [128, 128], None, {}]
)


@given(st.sampled_from(sorted(LAYOUTS)), st.dictionaries(st.sampled_from(KEYS), GOOD | JSON, max_size=8))
def test_any_quantization_config_is_read_or_refused(method: str, mapping: dict) -> None:
    try:
        config = get_layout(method).from_hf_config({"quant_method": method, **mapping})
    except ConfigError as error:
        assert str(error).isprintable() and len(str(error)) < 2100
        return
    config.config_for("model.layers.0.mlp.up_proj")


@given(JSON)
@example({"a": "\ud800"})
@example([1e308, -0.0, 10**400])
def test_json_is_what_python_reads_or_refused(value) -> None:
    try:
        data = json.dumps(value).encode()
        assert parse_json(data, "x.json") == json.loads(data)
    except CheckpointError as error:
        # half a surrogate pair, more digits than Python converts, or an overflow to infinity on the way
        assert "x.json" in str(error) and "\n" not in str(error)
        assume(False)
