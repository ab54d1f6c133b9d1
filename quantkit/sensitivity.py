"""How much a model's predictions suffer when one group of layers is quantized: what `allocate` decides by."""

from __future__ import annotations

import hashlib
import json
import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.encoding import dequantize
from quantkit.errors import CheckpointError, UsageError
from quantkit.formats.base import Format
from quantkit.progress import Progress
from quantkit.staging import disk_errors, write_durably
from quantkit.untrusted import read_json

_WINDOW = 512  # tokens that are predicted from each other
_SENSITIVITY = "sensitivity.json"
#: Layers that inference engines fuse into one must have one width.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True, order=True)
class Choice:
    """What a group of layers may be quantized with."""

    bits: int
    group_size: int | None = None  # None: the format has none

    @property
    def options(self) -> dict[str, int]:
        """As options of the format."""
        return {"bits": self.bits} | ({} if self.group_size is None else {"group_size": self.group_size})

    def __str__(self) -> str:
        return f"{self.bits}" if self.group_size is None else f"{self.bits}:g{self.group_size}"


@dataclass
class Group:
    """Layers that are quantized alike, with what each choice costs in bytes and in KL."""

    names: list[str]  # as the checkpoint spells them
    modules: list[str]
    pattern: str
    weights: int = 0
    sizes: dict[Choice, int] = field(default_factory=dict)  # bytes
    kl: dict[Choice, float] = field(default_factory=dict)


class Sensitivity:
    """The uniform conversions of a model, and the model that their weights are tried in."""

    def __init__(
        self,
        source: str,
        fmt: Format,
        options: dict[str, Any],
        choices: list[Choice],
        folder: Path,
        progress: Progress,
    ) -> None:
        self.source, self.fmt, self.options = source, fmt, options
        self.choices, self.folder, self.progress = choices, folder, progress
        self.device, self.trust_remote_code = "auto", False
        self.groups: list[Group] = []

    def convert_all(self, **calibration: Any) -> None:
        """One uniform conversion per choice; those that are there are kept."""
        from quantkit.sweep import Setting, convert_once

        for choice in self.choices:
            out = self._uniform(choice)
            setting = Setting(out.name, self.fmt.name, {**self.options, **choice.options})
            settings = {**calibration, "device": self.device, "trust_remote_code": self.trust_remote_code}
            convert_once(self.source, out, setting, settings, self.progress)

    def measure(self, data: str | None, tokens: int) -> None:
        """Load the unquantized model and measure every group at every choice."""
        from quantkit.convert import pick_device
        from quantkit.eval import protocols
        from quantkit.eval.reference_cache import record_reference
        from quantkit.eval.scoring import model_positions
        from quantkit.load import load, load_tokenizer

        where = pick_device(self.device)
        tokenizer = load_tokenizer(self.source, trust_remote_code=self.trust_remote_code)
        self.ids = sensitivity_ids(tokenizer, data, tokens)
        self.progress.stage(f"loading {self.source}")
        self.model = load(
            self.source, device=where, dtype=torch.float32, trust_remote_code=self.trust_remote_code
        )
        limit = min(model_positions(self.model) or _WINDOW, _WINDOW, len(self.ids))
        self.protocol = protocols.gptq(limit)
        self.reference = record_reference(
            self.model, self.ids, self.protocol, Path(tempfile.mkdtemp(dir=self.folder)) / "reference", {}
        )
        self._find_groups()
        known = self._known()
        for number, group in enumerate(self.groups):
            if group.pattern not in known:
                dense = self._read(group.modules)
                for choice in self.choices:
                    self._put(group, choice)
                    group.kl[choice] = self._kl()
                self._restore(dense)
                known[group.pattern] = {str(choice): kl for choice, kl in group.kl.items()}
                self._keep(known)
            group.kl = {choice: float(known[group.pattern][str(choice)]) for choice in self.choices}
            said = ", ".join(f"{group.kl[choice]:.2g} at {choice}" for choice in self.choices)
            self.progress.stage(f"[{number + 1}/{len(self.groups)}] {group.pattern}: KL {said}")

    def _uniform(self, choice: Choice) -> Path:
        """Where the conversion with one choice everywhere lies."""
        return self.folder / f"uniform-{choice}".replace(":", "-")

    def _key(self) -> str:
        """What the sensitivities depend on: the conversions, the text, the windows."""
        digest = hashlib.sha256(self.ids.numpy().tobytes() + repr(self.protocol).encode())
        for choice in self.choices:
            digest.update((self.folder / f".{self._uniform(choice).name}.sweep").read_bytes())
        return digest.hexdigest()

    def _known(self) -> dict[str, dict[str, float]]:
        """Sensitivities measured before (pattern -> choice -> KL); {} when anything has changed."""
        file = self.folder / _SENSITIVITY
        try:
            stored = read_json(file, self.folder.resolve()) if file.is_file() else {}
        except CheckpointError:
            return {}
        found = stored.get("kl") if isinstance(stored, dict) and stored.get("key") == self._key() else None
        choices = {str(choice) for choice in self.choices}
        return {
            pattern: values
            for pattern, values in (found if isinstance(found, dict) else {}).items()
            if isinstance(values, dict) and choices <= values.keys() and all(map(_is_kl, values.values()))
        }

    def _keep(self, known: dict[str, dict[str, float]]) -> None:
        with disk_errors(self.folder / _SENSITIVITY):
            content = json.dumps({"key": self._key(), "kl": known}, indent=1)
            write_durably(self.folder / _SENSITIVITY, content.encode())

    def whole(self, chosen: Sequence[Choice]) -> float:
        """Measured KL of the model with every group at its choice."""
        before = [self._read(group.modules) for group in self.groups]
        try:
            for group, choice in zip(self.groups, chosen, strict=True):
                self._put(group, choice)
            return self._kl()
        finally:
            for dense in before:
                self._restore(dense)

    def _find_groups(self) -> None:
        from quantkit.checkpoint import CheckpointReader
        from quantkit.load import find_quantized
        from quantkit.skeleton import Skeleton, linear_shape

        self._layers: dict[int, Any] = {}
        names: dict[str, str] = {}
        with CheckpointReader(self._uniform(self.choices[0])) as reader:
            skeleton = Skeleton(reader.path, reader.config, trust_remote_code=self.trust_remote_code)
            found = find_quantized(reader)
            assert found is not None
            for name in found.layers:
                module = skeleton.module_for(name)
                assert module is not None
                names[name] = module
            self._shapes = {name: linear_shape(skeleton.modules[module]) for name, module in names.items()}
        for key, members in group_layers(list(names)).items():
            group = Group(members, [names[name] for name in members], key)
            group.weights = sum(self._shapes[name][0] * self._shapes[name][1] for name in members)
            self.groups.append(group)
        for choice in self.choices:
            with CheckpointReader(self._uniform(choice)) as reader:
                found = find_quantized(reader)
                assert found is not None
                for group in self.groups:
                    if not set(group.names) <= found.layers.keys():
                        raise UsageError(
                            f"{group.names[0]} is not quantized at {choice.bits} bits",
                            hint=f"Leave {choice.bits} out of --bits.",
                        )
                    group.sizes[choice] = sum(
                        reader.info(tensor).nbytes
                        for name in group.names
                        for tensor in found.layers[name].values()
                    )

    def _put(self, group: Group, choice: Choice) -> None:
        from quantkit.checkpoint import CheckpointReader
        from quantkit.load import find_quantized, read_layer

        with CheckpointReader(self._uniform(choice)) as reader, torch.no_grad():
            found = find_quantized(reader)
            assert found is not None
            for name, module in zip(group.names, group.modules, strict=True):
                weight = dequantize(read_layer(reader, found, name, self._shapes[name]), torch.float32)
                self._write(module, weight)

    def _write(self, module: str, weight: Tensor) -> None:
        owner = self.model.get_submodule(module)
        weight = weight.t() if type(owner).__name__ == "Conv1D" else weight
        owner.weight.data.copy_(weight)

    def _read(self, modules: Sequence[str]) -> dict[str, Tensor]:
        return {m: self.model.get_submodule(m).weight.data.clone() for m in modules}

    def _restore(self, dense: Mapping[str, Tensor]) -> None:
        for module, weight in dense.items():
            self.model.get_submodule(module).weight.data.copy_(weight)

    def _kl(self) -> float:
        from quantkit.eval.divergence import divergence

        return divergence(self.reference, self.model, self.ids, self.protocol).kl_mean


def _is_kl(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def sensitivity_ids(tokenizer: Any, data: str | None, tokens: int) -> Tensor:
    """Token ids int64 `[T]` of the text that sensitivity is measured on; None: windows
    spread evenly over the built-in calibration text, so that every kind of text in it counts."""
    if data is not None:
        from quantkit.eval.text import load_text

        return load_text(data, tokenizer, tokens).ids
    from quantkit.builtin_text import text

    ids = tokenizer(text("calibration"), add_special_tokens=False, verbose=False)["input_ids"]
    whole = torch.tensor(ids, dtype=torch.int64)
    windows = max(1, tokens // _WINDOW)
    starts = torch.linspace(0, max(0, len(whole) - _WINDOW), windows).long().tolist()
    return torch.cat([whole[start : start + _WINDOW] for start in starts])[:tokens]


def group_layers(names: Sequence[str]) -> dict[str, list[str]]:
    """Layers that must have one width, by the --override pattern that matches just them."""
    groups: dict[str, list[str]] = {}
    present = set(names)
    for name in names:
        parent, _, leaf = name.rpartition(".")
        expert = re.match(r"^(.*\.experts)\.\d+\.", name)
        key = name if not re.search(r"[*?\[\]:]", name) else f"re:^{re.escape(name)}$"
        if expert:
            key = f"re:^{re.escape(expert[1])}\\."
        else:
            for fused in _FUSED:
                members = [other for other in fused if f"{parent}.{other}" in present]
                if leaf in members and len(members) > 1:
                    heads = "|".join(other.removesuffix("_proj") for other in members)
                    key = f"re:^{re.escape(parent)}\\.({heads})_proj$"
        groups.setdefault(key, []).append(name)
    return groups
