"""`CheckpointReader`: a directory of safetensors that nobody vouches for, one tensor at a time.

Everything that headers can tell is checked on construction, before any work: the index against the
shards, the shards against their sizes, dtypes, links that lead elsewhere. Data is checked when read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from quantkit.errors import CheckpointError, ConfigError
from quantkit.hub import resolve_model
from quantkit.shards import DTYPES, Handles, Spec, header_bytes, open_safetensors
from quantkit.untrusted import (
    MAX_SIDE_JSON_BYTES,
    existing_directory,
    is_plain_name,
    plain_file,
    read_json,
    show,
    side_file,
)

__all__ = ["CheckpointReader", "TensorInfo", "natural_key", "resolve_model"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MANIFEST = "quantkit_manifest.json"
EXPORT_MANIFEST = "quantkit_export.json"
CHAT_TEMPLATES = "additional_chat_templates"

#: Written anew for the output, or describing weights that the output does not have.
_NOT_CARRIED = {"config.json", "quantize_config.json", "quant_config.json", "quant_log.csv"}
_NOT_CARRIED |= {"recipe.yaml", "readme.md", MANIFEST, EXPORT_MANIFEST, "genai_config.json"}
_WEIGHTS = {
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf"),
    *(".ggml", ".ot", ".pkl", ".pickle", ".npz", ".npy", ".tflite", ".mlmodel", ".pdparams", ".pt2", ".ptl"),
    *(".pte", ".engine", ".plan", ".data", ".so", ".dll", ".dylib", ".exe"),  # artifacts and machine code
}
_SHARD_NAME = re.compile(r"model-[0-9]+-of-[0-9]+\.safetensors")
_FINITE_CHUNK = 1 << 22


@dataclass(frozen=True)
class TensorInfo:
    """What the header says about one tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    file: Path


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key that counts: layers.2 before layers.10."""
    # Digits are compared by length and text, not int(): a name may have more than int() accepts.
    parts = [
        (1, len(part.lstrip("0")), part.lstrip("0")) if part.isdecimal() and part.isascii() else (0, 0, part)
        for part in re.split(r"([0-9]+)", name)
    ]
    return (*parts, (-1, 0, name))  # the last entry decides between "1" and "01"


def count_nonfinite(tensor: Tensor) -> int:
    """How many elements are NaN or infinite; works in small pieces, so it needs no memory to speak of."""
    if not tensor.is_floating_point():
        return 0
    bad = 0
    for chunk in tensor.reshape(-1).split(_FINITE_CHUNK):
        wide = chunk.float() if chunk.element_size() == 1 else chunk
        # max |x| is NaN or inf exactly when an element is, and takes one cheap pass.
        if wide.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(wide))).all()):
            bad += int((~torch.isfinite(wide)).sum())
    return bad


class CheckpointReader:
    """Reads one checkpoint: `model.safetensors`, or the shards of `model.safetensors.index.json`."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = existing_directory(path)
        self._entries = self._list_directory(self.path)
        self.config = self._read_config()
        self._handles = Handles(4)
        self._status: dict[Path, tuple[int, int]] = {}
        index = self._read_index()
        self._infos: dict[str, TensorInfo] = {}
        for file in sorted(set(index.values()), key=natural_key) if index is not None else [SINGLE]:
            self._scan(self.path / file, index)
        if index is not None:
            for name, file in index.items():
                if name not in self._infos:
                    raise CheckpointError(
                        f"Tensor {show(name)} is not in {show(self.path / file)}, where {INDEX} puts it",
                        hint="The index and the shards are from different checkpoints, or damaged.",
                    )
        if not self._infos:
            raise CheckpointError(f"{show(self.path)} has no tensors")
        self._names = sorted(self._infos, key=natural_key)
        self._others = self._find_others()

    # -- what is there -------------------------------------------------------------------------

    def names(self) -> list[str]:
        """All tensor names in natural order: layers.2 before layers.10."""
        return list(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    def __len__(self) -> int:
        return len(self._infos)

    def info(self, name: str) -> TensorInfo:
        """dtype, shape, size and file of a tensor; CheckpointError when the checkpoint has none such."""
        try:
            return self._infos[name]
        except KeyError:
            raise CheckpointError(f"{show(self.path)} has no tensor {show(name)}") from None

    def infos(self) -> Iterator[TensorInfo]:
        """All `TensorInfo`s, in the order of `names()`."""
        return (self._infos[name] for name in self._names)

    @property
    def files(self) -> list[Path]:
        """The safetensors files, in natural order."""
        return list(self._status)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self._infos.values())

    def other_files(self) -> list[Path]:
        """Files to carry over byte for byte: tokenizer, generation config, chat templates, licence, code.

        Plain files of the top directory and of `additional_chat_templates/`; no weights, nothing hidden,
        no model card and no description of a quantization (those are written anew).
        """
        return list(self._others)

    def input_files(self) -> dict[str, Path]:
        """All files that a conversion reads: name inside the directory -> path. Weights come first."""
        files = [*self.files, self.path / "config.json", *self._others]
        files += [self.path / name for name in (INDEX, "README.md") if name in self._entries]
        return {str(file.relative_to(self.path)): file for file in files if file.is_file()}

    def fingerprint(self) -> str:
        """sha256 (hex) over config.json, headers, sizes and modification times: is it the same input?"""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for file, (size, mtime) in self._status.items():
            digest.update(f"\0{file.name}\0{size}\0{mtime}\0".encode())
            digest.update(header_bytes(file))
        return digest.hexdigest()

    # -- data ----------------------------------------------------------------------------------

    def read(self, name: str, *, check_finite: bool = False) -> Tensor:
        """A tensor as a private CPU copy; with `check_finite`, NaN or Inf in it is a CheckpointError."""
        return self._fetch(self.info(name), None, check_finite)

    def read_index(self, name: str, index: int, *, check_finite: bool = False) -> Tensor:
        """`read(name)[index]` without reading the rest: one expert of a fused 3-D tensor."""
        info = self.info(name)
        if not info.shape or not 0 <= index < info.shape[0]:
            raise IndexError(f"{name} has shape {info.shape}, no index {index}")
        return self._fetch(info, index, check_finite)

    def close(self) -> None:
        """Close the files; a later read opens them again."""
        self._handles.close()

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _fetch(self, info: TensorInfo, index: int | None, check_finite: bool) -> Tensor:
        handle = self._handles.get(info.file, lambda: self._check_unchanged(info.file))
        try:
            source = handle.get_slice(info.name)
            tensor: Tensor = handle.get_tensor(info.name) if index is None else source[index]
        except (SafetensorError, OSError, RuntimeError, ValueError, MemoryError) as error:
            raise CheckpointError(
                f"Tensor {show(info.name)} cannot be read from {show(info.file)}: {show(error)}"
            ) from None
        if tensor.dtype != info.dtype or tuple(tensor.shape) != info.shape[0 if index is None else 1 :]:
            raise CheckpointError(f"Tensor {show(info.name)} of {show(info.file)} changed while being read")
        if check_finite and (bad := count_nonfinite(tensor)):
            part = "" if index is None else f" (index {index})"
            raise CheckpointError(
                f"Tensor {show(info.name)}{part} of {show(info.file)} has {bad} NaN or infinite values",
                hint="The checkpoint is damaged or its training diverged.",
            )
        return tensor

    def _check_unchanged(self, file: Path) -> None:
        status = plain_file(file, self.path)
        if (status.st_size, status.st_mtime_ns) != self._status[file]:
            raise CheckpointError(f"{show(file)} changed while it was being read", hint="Start again.")

    # -- validation ----------------------------------------------------------------------------

    @staticmethod
    def _list_directory(path: Path) -> list[str]:
        try:
            entries = sorted(os.listdir(path))
        except OSError as error:
            raise CheckpointError(f"{show(path)} cannot be listed: {show(error.strerror)}") from None
        for entry in entries:
            if not entry.startswith(".") and not is_plain_name(entry):
                raise CheckpointError(
                    f"{show(path)} holds a file whose name is not plain text: {show(entry)}",
                    hint="Rename it.",
                )
        return entries

    def _read_config(self) -> dict[str, Any]:
        if not self._entries:
            raise CheckpointError(f"{show(self.path)} is empty", hint="Give the model's directory.")
        file = self.path / "config.json"
        if file.name not in self._entries:
            raise ConfigError(f"{show(file)} is missing", hint="Is this a Hugging Face model directory?")
        try:
            config = read_json(file, self.path, MAX_SIDE_JSON_BYTES)
        except CheckpointError as error:
            raise ConfigError(error.what, hint=error.hint) from None
        if not isinstance(config, dict):
            raise ConfigError(f"{show(file)} must hold a JSON object, not a {type(config).__name__}")
        return config

    def _read_index(self) -> dict[str, str] | None:
        """The index's weight_map, or None for a single file."""
        file = self.path / INDEX
        if INDEX not in self._entries:
            if SINGLE not in self._entries:
                raise self._no_weights()
            self._refuse_strays({SINGLE})
            return None
        index = read_json(file, self.path)
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{show(file)} has no weight_map that names tensors")
        for name, shard in weight_map.items():
            if not is_plain_name(shard) or not shard.endswith(".safetensors"):
                raise CheckpointError(
                    f"{show(file)} puts tensor {show(name)} in {show(shard)!r}",
                    hint="Only plain names of *.safetensors files beside the index are accepted.",
                )
        self._refuse_strays(set(weight_map.values()))
        return weight_map

    def _refuse_strays(self, used: set[str]) -> None:
        """Weights beside the ones in use mean two checkpoints in one directory: loaders would disagree."""
        for entry in self._entries:
            if entry not in used and (entry == SINGLE or _SHARD_NAME.fullmatch(entry)):
                listed = f"not in {INDEX}" if INDEX in self._entries else f"beside {SINGLE} without an index"
                raise CheckpointError(
                    f"{show(self.path / entry)} is {listed}",
                    hint="Two checkpoints are mixed, or the index is damaged; remove what does not belong.",
                )

    def _no_weights(self) -> CheckpointError:
        def first(*suffixes: str) -> str | None:
            return next((e for e in self._entries if Path(e).suffix in suffixes), None)

        if pickled := first(".bin", ".pt", ".pth", ".ckpt", ".pkl"):
            return CheckpointError(
                f"{show(self.path)} has pickled weights only ({show(pickled)}): loading them can run code",
                hint="Use a safetensors revision, or convert one you trust: "
                "AutoModelForCausalLM.from_pretrained(path).save_pretrained(new).",
            )
        if foreign := first(".gguf", ".onnx", ".h5", ".msgpack", ".ggml"):
            return CheckpointError(
                f"{show(self.path)} holds {show(foreign)}, no safetensors", hint="Use the original model."
            )
        if other := first(".safetensors"):
            return CheckpointError(
                f"{show(self.path)} has neither {SINGLE} nor {INDEX}, only {show(other)}",
                hint=f"Other names are read through {INDEX} only.",
            )
        return CheckpointError(f"{show(self.path)} has neither {SINGLE} nor {INDEX}", hint="Is it complete?")

    def _scan(self, file: Path, index: dict[str, str] | None) -> None:
        """Check one file's header and note its tensors."""
        status = plain_file(file, self.path)
        self._status[file] = (status.st_size, status.st_mtime_ns)
        handle = open_safetensors(file)
        for name in handle.keys():  # noqa: SIM118 -- not a mapping
            found = handle.get_slice(name)
            code, shape = found.get_dtype(), tuple(found.get_shape())
            where = f"Tensor {show(name)} of {show(file)}"
            if code not in DTYPES:
                raise CheckpointError(f"{where} has dtype {show(code)}", hint=f"Known: {', '.join(DTYPES)}.")
            if any(extent >= 1 << 48 for extent in shape) or len(shape) > 16:
                raise CheckpointError(f"{where} has an impossible shape {show(shape)}")
            if name in self._infos:
                raise CheckpointError(f"{where} is also in {show(self._infos[name].file)}")
            if index is not None and index.get(name) != file.name:
                said = f"is put in {show(index[name])} by" if name in index else "is not in"
                raise CheckpointError(f"{where} {said} {INDEX}", hint="Index and shards disagree.")
            spec = Spec(code, shape)
            self._infos[name] = TensorInfo(name, DTYPES[code], shape, spec.nbytes, file)

    def _find_others(self) -> list[Path]:
        found = [self.path / e for e in self._entries]
        templates = self.path / CHAT_TEMPLATES
        if templates.is_dir() and not templates.is_symlink():
            found += [templates / e for e in self._list_directory(templates)]
        result = []
        for file in found:
            name = file.name.lower()
            if name.startswith(".") or name in _NOT_CARRIED or file.suffix.lower() in _WEIGHTS:
                continue
            if name.endswith(".index.json"):
                continue
            if file.is_symlink() or file.is_file():  # folders, pipes and sockets stay behind
                if file.is_symlink() and file.is_dir():
                    continue
                side_file(file, self.path)
                result.append(file)
        return result
