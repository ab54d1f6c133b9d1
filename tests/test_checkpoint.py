"""CheckpointReader and resolve_model on well-formed checkpoints; tests/attacks has the others."""

from __future__ import annotations

import builtins
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from disk_support import random_tensor
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from quantkit import hub
from quantkit.checkpoint import CheckpointReader, count_nonfinite, natural_key, resolve_model
from quantkit.errors import CheckpointError
from quantkit.shards import DTYPES

INDEX = "model.safetensors.index.json"


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal dtype, shape and bytes (NaNs included)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def tensors_of_all_dtypes() -> dict[str, torch.Tensor]:
    shapes = [(), (1,), (63,), (1000, 3), (3, 7, 5), (0, 4)]
    return {
        f"model.layers.{i}.{code}": random_tensor(shape, dtype)
        for code, dtype in DTYPES.items()
        for i, shape in enumerate(shapes)
    }


def make(path: Path, shards: list[dict[str, torch.Tensor]], config: object = None) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    if len(shards) == 1:
        save_file(shards[0], path / "model.safetensors")
        return path
    weight_map = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, path / file)
        weight_map |= dict.fromkeys(shard, file)
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


@pytest.mark.parametrize("shards", [1, 4])
def test_reads_every_dtype_as_written(tmp_path: Path, shards: int) -> None:
    tensors = tensors_of_all_dtypes()
    parts = [dict(list(tensors.items())[i::shards]) for i in range(shards)]
    reader = CheckpointReader(make(tmp_path / "m", parts))
    assert set(reader.names()) == tensors.keys() and len(reader) == len(tensors)
    assert len(reader.files) == shards
    assert reader.total_bytes == sum(t.nbytes for t in tensors.values())
    for name, tensor in tensors.items():
        assert name in reader
        info = reader.info(name)
        assert (info.dtype, info.shape, info.nbytes) == (tensor.dtype, tuple(tensor.shape), tensor.nbytes)
        assert name in load_file(info.file)
        got = reader.read(name)
        assert same(got, tensor) and got.is_contiguous()
        for i in {0, len(tensor) // 2, len(tensor) - 1} if tensor.ndim and len(tensor) else ():
            assert same(reader.read_index(name, i), tensor[i].contiguous())


def test_copies_are_private(tmp_path: Path) -> None:
    weight = torch.randn(300, 7)
    reader = CheckpointReader(make(tmp_path / "m", [{"w": weight}]))
    first = reader.read("w")
    assert first.untyped_storage().nbytes() == weight.nbytes
    assert reader.read_index("w", 3).untyped_storage().nbytes() == 28
    first.zero_()  # neither the file nor a later read sees this
    assert torch.equal(reader.read("w"), weight)
    with (tmp_path / "m" / "model.safetensors").open("r+b") as file:
        file.truncate(9)  # the file is cut while we hold a tensor: no SIGBUS
    assert first.sum() == 0


def test_file_changing_between_reads_is_noticed(tmp_path: Path) -> None:
    shards = [{f"w{i}": torch.randn(5)} for i in range(7)]
    path = make(tmp_path / "m", shards)
    reader = CheckpointReader(path)
    for name in reader.names():
        reader.read(name)
    save_file({"w0": torch.randn(6)}, reader.info("w0").file)
    with pytest.raises(CheckpointError, match=r"00001-of-00007.safetensors changed"):
        reader.read("w0")


def test_natural_order(tmp_path: Path) -> None:
    names = [f"model.layers.{i}.{part}" for i in range(12) for part in ("a", "b.weight")] + [
        "lm_head",
        "model.a",
    ]
    shuffled = dict.fromkeys(sorted(names), None)
    reader = CheckpointReader(make(tmp_path / "m", [{n: torch.zeros(1) for n in shuffled}]))
    layers = [n for n in reader.names() if "layers" in n]
    assert layers == [f"model.layers.{i}.{part}" for i in range(12) for part in ("a", "b.weight")]


@given(st.lists(st.text(alphabet="a.0123456789٣", max_size=12), max_size=8))
def test_natural_key_is_a_total_order_on_any_name(names: list[str]) -> None:
    backwards = names[::-1]
    assert sorted(names, key=natural_key) == sorted(backwards, key=natural_key)
    assert natural_key("x" + "9" * 6000) > natural_key("x1")


def test_read_index_out_of_range(tmp_path: Path) -> None:
    reader = CheckpointReader(make(tmp_path / "m", [{"w": torch.zeros(3, 4), "scalar": torch.tensor(1.0)}]))
    for name, index in (("w", 3), ("w", -1), ("scalar", 0)):
        with pytest.raises(IndexError):
            reader.read_index(name, index)
    with pytest.raises(CheckpointError, match="no tensor nope"):
        reader.read("nope")


@pytest.mark.parametrize("dtype", [d for d in DTYPES.values() if d.is_floating_point])
def test_finite_check_counts_exactly(dtype: torch.dtype) -> None:
    values = torch.zeros(5_000_001).to(dtype)
    assert count_nonfinite(values) == 0
    values[[0, 4_300_000, 5_000_000]] = torch.tensor(float("nan")).to(dtype)
    assert count_nonfinite(values) == 3
    extremes = random_tensor((9999,), dtype)
    assert count_nonfinite(extremes) == int((~torch.isfinite(extremes.double())).sum())
    assert count_nonfinite(torch.empty(0, dtype=dtype)) == 0


def test_check_finite_of_one_expert(tmp_path: Path) -> None:
    experts = torch.randn(4, 5, 6)
    experts[2, 1, 1] = float("inf")
    reader = CheckpointReader(make(tmp_path / "m", [{"experts": experts}]))
    assert torch.equal(reader.read_index("experts", 1, check_finite=True), experts[1])
    with pytest.raises(CheckpointError, match=r"experts \(index 2\)"):
        reader.read_index("experts", 2, check_finite=True)
    assert reader.read("experts").isinf().sum() == 1


def test_other_files(tmp_path: Path) -> None:
    path = make(tmp_path / "m", [{"w": torch.zeros(1)}])
    carried = ["LICENSE", "chat_template.jinja", "generation_config.json", "merges.txt", "modeling_x.py"]
    carried += ["preprocessor_config.json", "tokenizer.json", "tokenizer.model", "vocab.json"]
    dropped = [".gitattributes", "README.md", "pytorch_model.bin", "quantize_config.json", "x.gguf", "x.onnx"]
    dropped += ["consolidated.safetensors", "pytorch_model.bin.index.json", "quantkit_manifest.json", "a.pth"]
    for name in carried + dropped:
        (path / name).write_text(name)
    (path / "original").mkdir()
    (path / "original" / "params.json").write_text("{}")
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tool.jinja").write_text("x")
    (path / "additional_chat_templates" / "deeper").mkdir()
    os.mkfifo(path / "pipe")
    found = [str(p.relative_to(path.resolve())) for p in CheckpointReader(path).other_files()]
    assert found == [*sorted(carried), "additional_chat_templates/tool.jinja"]


def test_links_inside_and_into_the_hub_cache(tmp_path: Path) -> None:
    repo = tmp_path / "models--org--name"
    (repo / "blobs").mkdir(parents=True)
    source = make(tmp_path / "m", [{"w": torch.arange(5.0)}])
    snapshot = repo / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    for i, name in enumerate(("config.json", "model.safetensors")):
        (source / name).rename(repo / "blobs" / f"{i}")
        (snapshot / name).symlink_to(f"../../blobs/{i}")
    (snapshot / "vocab.json").write_text("{}")
    (snapshot / "alias.json").symlink_to("vocab.json")
    reader = CheckpointReader(snapshot)
    assert torch.equal(reader.read("w"), torch.arange(5.0))
    assert [p.name for p in reader.other_files()] == ["alias.json", "vocab.json"]
    (tmp_path / "link").symlink_to(snapshot)  # the directory itself may be reached by a link
    assert CheckpointReader(tmp_path / "link").names() == ["w"]


def test_fingerprint_follows_the_input(tmp_path: Path) -> None:
    path = make(tmp_path / "m", [{"w": torch.zeros(5)}, {"v": torch.zeros(5)}], {"a": 1, "b": 2})
    first = CheckpointReader(path).fingerprint()
    assert first == CheckpointReader(path).fingerprint() and len(first) == 64
    (path / "config.json").write_text('{"b":2,  "a":1}')  # the same configuration, written otherwise
    (path / "tokenizer.json").write_text("{}")
    assert CheckpointReader(path).fingerprint() == first
    (path / "config.json").write_text('{"b":2,  "a":3}')
    assert (second := CheckpointReader(path).fingerprint()) != first
    os.utime(CheckpointReader(path).files[0], ns=(1, 1))
    assert (third := CheckpointReader(path).fingerprint()) not in (first, second)
    make(path, [{"w": torch.zeros(5)}, {"v": torch.zeros(5, dtype=torch.int32)}], {"a": 3, "b": 2})
    assert CheckpointReader(path).fingerprint() not in (first, second, third)


MEMORY = """
import sys
from quantkit.checkpoint import CheckpointReader
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
reader = CheckpointReader(sys.argv[1])
largest = max(info.nbytes for info in reader.infos())
reader.read(reader.names()[0])[:1].clone()
before = peak()
for name in reader.names():
    reader.read(name, check_finite=True)
for name in reader.names():
    reader.read_index(name, 0)
print((peak() - before) / largest)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_stays_flat(tmp_path: Path) -> None:
    """Streaming over twenty times the largest tensor takes about one tensor of memory."""
    path = make(tmp_path / "m", [{f"w{i}": torch.randn(2000, 2000) for i in range(20)}])
    result = subprocess.run([sys.executable, "-c", MEMORY, path], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 1.2, result.stdout


# -- resolve_model -----------------------------------------------------------------------------------


def test_resolve_existing_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(tmp_path) == tmp_path
    assert resolve_model(str(tmp_path)) == tmp_path
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("org/name") == Path("org/name")  # a directory wins over the hub


@pytest.mark.parametrize(
    "model", ["/no/such/llama", "./llama", "../llama", "a/b/c", "llama/", "~nobody/x", "x y"]
)
def test_mistyped_path_does_not_ask_the_hub(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_download", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(CheckpointError, match="does not exist"):
        resolve_model(model)


def test_mistyped_path_suggests(tmp_path: Path) -> None:
    (tmp_path / "stories260k").mkdir()
    with pytest.raises(CheckpointError, match=r"did you mean .*stories260k"):
        resolve_model(tmp_path / "storys260k")


@pytest.mark.parametrize("model", ["", "  ", "x" * 300, "a\0b", "y" * 5000])
def test_names_that_are_nothing(model: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        resolve_model(model)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


def test_resolve_a_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is a file"):
        resolve_model(tmp_path / "model.safetensors")


def test_hub_download_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    asked = {}

    def fake(repo, **options):
        asked.update(options, repo=repo)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    assert resolve_model("some-org/some.model-1b", revision="v1") == tmp_path
    assert (asked["repo"], asked["revision"]) == ("some-org/some.model-1b", "v1")
    files = [
        "config.json",
        "model-00001-of-00002.safetensors",
        INDEX,
        "tokenizer.model",
        "chat_template.jinja",
    ]
    files += ["LICENSE", "merges.txt", "additional_chat_templates/rag.jinja"]
    bad = ["pytorch_model.bin", "original/params.json", "consolidated.safetensors", "model.gguf", "README.md"]
    bad += ["onnx/model.onnx", "training_args.bin", "tf_model.h5"]
    allow, ignore = asked["allow_patterns"], asked["ignore_patterns"]
    assert list(filter_repo_objects(files + bad, allow_patterns=allow, ignore_patterns=ignore)) == files


HUB_ERRORS = {
    "RepositoryNotFoundError": "the hub has no model org/name",
    "RevisionNotFoundError": "no revision v9",
    "GatedRepoError": "gated",
    "LocalEntryNotFoundError": "cannot be fetched",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE",
    "HFValidationError": "is no hub id",
    "OSError": "first line",
    "RuntimeError": "failed: first line",  # stands for whatever the transport raises
}


@pytest.mark.parametrize("kind", HUB_ERRORS)
def test_hub_failures_are_one_line(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    words = HUB_ERRORS[kind]
    error_type = getattr(huggingface_hub.errors, kind, None) or getattr(builtins, kind)

    def fail(*_, **__):
        # Not through __init__: some want the response of an HTTP library that changes between versions.
        raise error_type.__new__(error_type, "first line\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match="org/name") as caught:
        resolve_model("org/name", revision="v9")
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_offline_without_cache(tmp_path: Path) -> None:
    code = "from quantkit.checkpoint import resolve_model; resolve_model('org/no-such-model')"
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("quantkit.errors.CheckpointError: There is no directory org/no-such-model")
