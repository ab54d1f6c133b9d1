"""What is fuzzed: bytes from a stranger go in, and either a result comes out or a QuantkitError in one line.

Four targets, one for each kind of file that somebody else may have written (or damaged):

    reader                the bytes of model.safetensors
    index                 model.safetensors.index.json of two good shards
    quantization_config   the JSON object in config.json, beside tensors of every layout
    journal               journal.jsonl of an interrupted conversion

`fuzz.py` runs them under atheris; `test_fuzz_corpus.py` replays the corpus in the test suite. A target
returns normally unless it found something.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from quantkit.algorithms import codebook
from quantkit.checkpoint import INDEX, CheckpointReader
from quantkit.errors import QuantkitError
from quantkit.inspect import inspect
from quantkit.journal import check_of
from quantkit.load import find_quantized, read_layer
from quantkit.publish import CheckpointWriter
from quantkit.untrusted import parse_json

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
#: Larger inputs only cost time: what is checked per byte is checked on small ones too.
MAX_BYTES = 1 << 16


class Finding(Exception):
    """A promise was broken without an exception of its own."""


@contextlib.contextmanager
def refusal_is_fine() -> Iterator[None]:
    """Let a QuantkitError pass, after a look at its text; everything else is a finding."""
    try:
        yield
    except QuantkitError as error:
        message = str(error)
        if "\n" in message or not message.isprintable() or not 10 < len(message) < 4000:
            raise Finding(f"not one printable line: {message!r:.500}") from error


def workspace() -> Path:
    """A directory in memory where there is one: thousands of small files are written."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="quantkit-fuzz-", dir=memory if memory.is_dir() else None))


def make_reader(folder: Path) -> Callable[[bytes], None]:
    """`model.safetensors` is the input."""
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama"}')

    def target(data: bytes) -> None:
        (model / "model.safetensors").write_bytes(data)
        with refusal_is_fine(), CheckpointReader(model) as reader:
            reader.fingerprint()
            for name in reader.names():
                info = reader.info(name)
                if info.nbytes > len(data):
                    raise Finding(f"{name!r} claims {info.nbytes} of {len(data)} bytes")
                if tuple(reader.read(name).shape) != info.shape:
                    raise Finding(f"{name!r} has another shape than its header")
            inspect(model)

    return target


def make_index(folder: Path) -> Callable[[bytes], None]:
    """`model.safetensors.index.json` is the input; the shards are good."""
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama"}')
    save_file({"a": torch.zeros(2), "b": torch.zeros(3)}, model / ONE)
    save_file({"c": torch.zeros(4)}, model / TWO)
    save_file({"outside": torch.zeros(1)}, folder / "outside.safetensors")

    def target(data: bytes) -> None:
        (model / INDEX).write_bytes(data)
        with refusal_is_fine(), CheckpointReader(model) as reader:
            if set(reader.names()) != {"a", "b", "c"}:
                raise Finding(f"an index made these tensors: {reader.names()}")
            for file in reader.files:
                if file.parent != model:
                    raise Finding(f"an index led to {file}")

    return target


#: Suffixes of one quantized layer of each layout, as their owners write them (4 bits, 64 x 64).
LAYERS: dict[str, dict[str, torch.Tensor]] = {
    "gptq": {
        "qweight": torch.zeros(8, 64, dtype=torch.int32),
        "qzeros": torch.zeros(1, 8, dtype=torch.int32),
        "scales": torch.ones(1, 64, dtype=torch.float16),
        "g_idx": torch.zeros(64, dtype=torch.int32),
    },
    "awq": {
        "qweight": torch.zeros(64, 8, dtype=torch.int32),
        "qzeros": torch.zeros(1, 8, dtype=torch.int32),
        "scales": torch.ones(1, 64, dtype=torch.float16),
    },
    "hqq": {
        "W_q": torch.zeros(32, 64, dtype=torch.uint8),
        "scale": torch.ones(64, 1, dtype=torch.float16),
        "zero": torch.ones(64, 1, dtype=torch.float16),
        "nbits": torch.tensor(4),
        "group_size": torch.tensor(64),
        "shape": torch.tensor([64, 64]),
    },
    "bitsandbytes": {
        "weight": torch.zeros(2048, 1, dtype=torch.uint8),
        "weight.absmax": torch.ones(64),
        "weight.quant_map": codebook.table("nf4"),
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(
            list(b'{"quant_type":"nf4","blocksize":64,"dtype":"float16","shape":[64,64]}'), dtype=torch.uint8
        ),
    },
    "fp8": {
        "weight": torch.zeros(64, 64).to(torch.float8_e4m3fn),
        "weight_scale_inv": torch.ones(1, 1),
    },
    "bitnet": {"weight": torch.full((16, 64), 0x55, dtype=torch.uint8), "weight_scale": torch.ones(1)},
    "compressed-tensors": {
        "weight_packed": torch.zeros(64, 8, dtype=torch.int32),
        "weight_scale": torch.ones(64, 1),
        "weight_shape": torch.tensor([64, 64]),
    },
}


def make_quantization_config(folder: Path) -> Callable[[bytes], None]:
    """`quantization_config` is the input; its `quant_method` chooses which tensors it lies about."""
    models = {}
    for method, tensors in LAYERS.items():
        model = folder / method
        model.mkdir()
        names = [f"model.layers.{i}.mlp.{leaf}_proj" for i in range(2) for leaf in ("up", "down")]
        save_file(
            {f"{name}.{suffix}": tensor.clone() for name in names for suffix, tensor in tensors.items()},
            model / "model.safetensors",
        )
        models[method] = model

    def target(data: bytes) -> None:
        with refusal_is_fine():
            mapping = parse_json(data, "input")
            method = mapping.get("quant_method") if isinstance(mapping, dict) else None
            model = models.get(method if isinstance(method, str) else "", models["gptq"])
            config = {"model_type": "llama", "quantization_config": mapping}
            (model / "config.json").write_text(json.dumps(config))
            with refusal_is_fine():
                inspect(model)
            with CheckpointReader(model) as reader:
                found = find_quantized(reader)
                for name in found.layers if found else ():
                    assert found is not None
                    packed = read_layer(reader, found, name, (64, 64))
                    if packed.shape != (64, 64):
                        raise Finding(f"{name} became {packed.shape}")

    return target


def make_journal(folder: Path) -> Callable[[bytes], None]:
    """The journal of an interrupted run is the input: a resumed run ends in the right bytes or is refused.

    Lines that are JSON objects get their check anew, as a forger would do it: else nothing but the check
    would ever be tested.
    """
    dest, kept = folder / "model", folder / "kept"
    staging = dest.with_name(".model.quantkit-staging")
    units = {f"u{i}": {f"w{i}.{j}": torch.full((3, j + 1), float(i))} for i in range(3) for j in range(1)}
    log = logging.getLogger("quantkit.publish")

    def run(stop: int | None = None, resume: bool = False) -> None:
        with CheckpointWriter(dest, max_shard_size=30, resume=resume, overwrite=True) as writer:
            for number, (unit, tensors) in enumerate(units.items()):
                if number == stop:
                    raise KeyboardInterrupt
                if unit not in writer.completed:
                    writer.write_unit(unit, tensors, report={"unit": unit})
                elif writer.unit_report(unit) is None:
                    pass  # a report is the converter's business
            writer.add_json("config.json", {"model_type": "llama"})
            writer.publish()

    def digest() -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in sorted(dest.iterdir())}

    run()
    want = digest()
    shutil.rmtree(dest)
    with contextlib.suppress(KeyboardInterrupt):
        run(stop=2)
    shutil.copytree(staging, kept)
    shutil.rmtree(staging)

    def target(data: bytes) -> None:
        shutil.copytree(kept, staging)
        (staging / "journal.jsonl").write_bytes(signed(data))
        was, log.disabled = log.disabled, True  # a warning for each damaged journal would be thousands
        try:
            with refusal_is_fine():
                run(resume=True)
                if digest() != want:
                    raise Finding("a resumed run ended in other bytes")
            if dest.exists() and digest() != want:
                raise Finding("a refused run left something at the destination")
        finally:
            log.disabled = was
            for path in (dest, staging):
                shutil.rmtree(path, ignore_errors=True)

    target.seed = unsigned((kept / "journal.jsonl").read_bytes())  # type: ignore[attr-defined]
    return target


def signed(data: bytes) -> bytes:
    """`data` with the check that journal lines need; what is no JSON object stays as it is."""
    check, lines = "", []
    for line in data.splitlines(keepends=True):
        try:
            body = json.loads(line)
            if isinstance(body, dict):
                body.pop("check", None)
                check = check_of(body, check)
                line = json.dumps({**body, "check": check}).encode() + line[len(line.rstrip(b"\r\n")) :]
        except (ValueError, RecursionError):
            pass
        lines.append(line)
    return b"".join(lines)


def unsigned(data: bytes) -> bytes:
    """A journal without its checks: what the corpus holds."""
    bodies = [json.loads(line) for line in data.splitlines()]
    return b"".join(json.dumps({k: v for k, v in b.items() if k != "check"}).encode() + b"\n" for b in bodies)


TARGETS: dict[str, Callable[[Path], Callable[[bytes], None]]] = {
    "reader": make_reader,
    "index": make_index,
    "quantization_config": make_quantization_config,
    "journal": make_journal,
}
