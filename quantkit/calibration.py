"""Layer by layer through a model that is never in memory whole: inputs, statistics, outputs.

`LayerRunner` holds one decoder layer at a time. Hidden states of all calibration samples go from file
to file (`hidden-00003.f32` is the input of layer 3), so that they do not count against memory and an
interrupted run finds them again. Within a layer, linears that read the same tensor form a group;
groups are visited in the order of computation, so each sees what the already quantized ones produce.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.checkpoint import CheckpointReader
from quantkit.distributed import Workers
from quantkit.errors import CalibrationError, ConfigError, NumericsError
from quantkit.formats.base import LayerStats
from quantkit.hidden_states import HiddenStates
from quantkit.linear import materialize
from quantkit.load import fill_buffers, iter_dense
from quantkit.meta_model import quiet_transformers
from quantkit.skeleton import Skeleton, linear_shape

_EXPERT = re.compile(r"^(.*\bexperts)\.(\d+)\.(.+)$")
_MICRO_TOKENS = 4096

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class _Stop(Exception):
    """Ends a forward pass once nothing more is to be learned from it."""


class _Recorder(nn.Module):
    """Stands for a decoder layer: keeps the arguments it is called with, passes hidden states on."""

    def __init__(
        self, layer: nn.Module, index: int, sink: Callable[[int, Tensor, Args, Kwargs], None]
    ) -> None:
        super().__init__()
        object.__setattr__(self, "_layer", layer)
        self._index = index
        self._sink = sink

    def __getattr__(self, name: str) -> Any:  # models read flags such as `attention_type` off their layers
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_layer"), name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._sink(self._index, hidden_states, args, kwargs)
        return hidden_states


@dataclass
class Group:
    """Linears of one layer that read the same tensor; per expert where the layer routes."""

    members: tuple[str, ...]  # paths relative to the layer; "*" stands for every expert's index

    @property
    def routed(self) -> bool:
        return "*" in self.members[0]


class LayerRunner:
    """Runs the decoder layers of a checkpoint one after another over calibration samples.

    Parameters
    ----------
    ids: int64 `[samples, seqlen]`, this worker's share.
    device: where layers run. dtype: of the arithmetic (float32, or a half type through autocast;
        weights and statistics are float32 always).
    scratch: directory for hidden states.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        skeleton: Skeleton,
        ids: Tensor,
        *,
        device: torch.device,
        dtype: torch.dtype,
        scratch: Path,
        workers: Workers,
    ) -> None:
        if skeleton.layers_path is None:
            raise ConfigError(
                f"{reader.path}: no stack of decoder layers found in the model",
                hint="Use a format that needs no calibration (nf4, hqq, fp8).",
            )
        self.reader, self.skeleton, self.ids = reader, skeleton, ids
        self.device, self.dtype, self.scratch, self.workers = device, dtype, scratch, workers
        self.layers: Any = skeleton.modules[skeleton.layers_path]
        self.micro = max(1, _MICRO_TOKENS // ids.shape[1])
        self._calls: dict[tuple[int, int], tuple[Args, Kwargs]] = {}
        self._by_layer: dict[int, list[str]] = {}
        self._outside: list[str] = []
        decoder = skeleton.layers_path.rpartition(".")[0]
        for name in reader.names():
            for target in skeleton.targets(name, reader.info(name).shape)[:1]:
                layer = skeleton.layer_index(target.param)
                if layer is not None:
                    self._by_layer.setdefault(layer, []).append(name)
                elif not decoder or target.param.startswith(decoder + "."):
                    self._outside.append(name)
        self.decoder: Any = skeleton.model.get_submodule(decoder)
        scratch.mkdir(parents=True, exist_ok=True)

    # -- hidden states ----------------------------------------------------------------------------

    def states(self, layer: int) -> HiddenStates:
        """Inputs of layer `layer` (its index may be the number of layers: the stack's output)."""
        hidden = self._hidden
        return HiddenStates(
            self.scratch / f"hidden-{layer:05d}.f32", self.ids.shape[0], self.ids.shape[1], hidden
        )

    def capture(self, *, keep_first: bool) -> None:
        """Run the embeddings and everything before the layers; learn each layer's arguments."""
        for name in self._outside:
            for param, value in iter_dense(self.reader, self.skeleton, name):
                materialize(self.skeleton.model, param, _wide(value).to(self.device))
        with quiet_transformers():
            fill_buffers(self.skeleton.model, self.device)
        originals = list(self.layers)
        first: list[Tensor] = []
        last = len(originals) - 1

        def sink(index: int, hidden: Tensor, args: Args, kwargs: Kwargs) -> None:
            if index == 0:
                first.append(hidden)
            self._calls.setdefault((index, hidden.shape[0]), (args, kwargs))
            if index == last:
                raise _Stop

        for i, layer in enumerate(originals):
            self.layers[i] = _Recorder(layer, i, sink)
        try:
            store: HiddenStates | None = None
            for start, stop in self.batches():
                first.clear()
                batch = self.ids[start:stop].to(self.device)
                with torch.no_grad(), self._autocast(), contextlib.suppress(_Stop):
                    self.decoder(input_ids=batch, use_cache=False)
                if not first:
                    raise ConfigError(
                        f"{self.reader.path}: this model does not call its layers one after another",
                        hint="Use a format that needs no calibration (nf4, hqq, fp8).",
                    )
                self._hidden = int(first[0].shape[-1])
                if store is None:
                    store = self.states(0)
                    if keep_first:
                        store.create()
                if not keep_first and (0, stop - start) in self._calls and start > 0:
                    break  # resuming: the arguments are known, the states are on disk
                if keep_first:
                    store.write(start, first[0])
        finally:
            for i, layer in enumerate(originals):
                self.layers[i] = layer
        if keep_first and store is not None:
            store.sync()
        for name in self._outside:  # embeddings are not needed again
            for target in self.skeleton.targets(name, self.reader.info(name).shape):
                _back_to_meta(self.skeleton.model, target.param)

    def inputs(self, layer: int, start: int, stop: int) -> Tensor:
        """Samples `start:stop` of a layer's inputs, on the device."""
        return self.states(layer).read(start, stop).to(self.device)

    def batches(self) -> Iterator[tuple[int, int]]:
        """(start, stop) of the micro-batches."""
        for start in range(0, self.ids.shape[0], self.micro):
            yield start, min(start + self.micro, self.ids.shape[0])

    # -- one layer --------------------------------------------------------------------------------

    @contextlib.contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Decoder layer `index` with its weights in float32 on the device; freed afterwards."""
        module = self.layers[index]
        filled = []
        for name in self._by_layer.get(index, []):
            for param, value in iter_dense(self.reader, self.skeleton, name):
                if not bool(torch.isfinite(value).all()):
                    raise NumericsError(
                        f"{self.reader.info(name).file.name}: tensor {name!r} holds NaN or Inf",
                        hint="Repair the source.",
                    )
                materialize(self.skeleton.model, param, _wide(value).to(self.device))
                filled.append(param)
        with quiet_transformers():
            fill_buffers(self.skeleton.model, self.device)
        try:
            yield module
        finally:
            for param in filled:
                _back_to_meta(self.skeleton.model, param)

    def run(self, index: int, start: int, stop: int, hidden: Tensor, *, exact: bool = False) -> Tensor:
        """Output `[stop - start, seqlen, hidden]` of layer `index` for input `hidden`; in float32 if
        `exact`, whatever the runner's dtype."""
        args, kwargs = self._calls[(index, stop - start)]
        with torch.no_grad(), contextlib.nullcontext() if exact else self._autocast():
            out = self.layers[index](hidden, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def advance(self, index: int) -> None:
        """Run layer `index` as it is now over all samples; its outputs become the next layer's inputs."""
        sink = self.states(index + 1)
        sink.create()
        for start, stop in self.batches():
            out = self.run(index, start, stop, self.inputs(index, start, stop))
            if not bool(torch.isfinite(out).all()):
                raise NumericsError(
                    f"layer {index} produces NaN or Inf on the calibration data", hint="Try --dtype float32."
                )
            sink.write(start, out)
        sink.sync()

    def drop(self, layer: int) -> None:
        """Remove the inputs of a layer that is done."""
        self.states(layer).path.unlink(missing_ok=True)

    def groups(self, index: int, paths: list[str]) -> list[Group]:
        """Groups of the linears `paths` (relative to the layer) by the tensor they read, in order."""
        layer = self.layers[index]
        order: list[tuple[str, int]] = []
        alive: list[Tensor] = []  # keeps inputs alive, so that equal ids mean equal tensors

        def hook_for(path: str) -> Any:
            def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                alive.append(args[0])
                pattern = _star(path)
                if pattern not in (p for p, _ in order):
                    order.append((pattern, id(args[0])))

            return hook

        handles = [layer.get_submodule(p).register_forward_pre_hook(hook_for(p)) for p in paths]
        start, stop = next(self.batches())
        try:
            self.run(index, start, stop, self.inputs(index, start, stop))
        finally:
            for handle in handles:
                handle.remove()
        by_input: dict[int, list[str]] = {}
        for pattern, key in order:
            by_input.setdefault(key, []).append(pattern)
        groups = [Group(tuple(members)) for members in by_input.values()]
        seen = {p for g in groups for p in g.members}
        for path in paths:  # linears that this micro-batch never reached
            if _star(path) not in seen:
                seen.add(_star(path))
                groups.append(Group((_star(path),)))
        return groups

    def statistics(
        self, index: int, groups: list[Group], paths: list[str], *, max_only: bool = False
    ) -> dict[str, LayerStats]:
        """Statistics of the inputs of the linears in `groups`, over all samples and workers."""
        layer = self.layers[index]
        leaders: dict[str, LayerStats] = {}
        follow: dict[str, str] = {}
        for group in groups:
            for path in paths:
                if _star(path) in group.members:
                    leader = _fill_star(group.members[0], path)
                    follow[path] = leader
                    if leader not in leaders:
                        k = linear_shape(layer.get_submodule(leader))[1]
                        leaders[leader] = LayerStats(
                            0,
                            torch.zeros(0 if max_only else k, 0 if max_only else k, device=self.device),
                            torch.zeros(k, device=self.device),
                            torch.zeros(k, device=self.device),
                        )
        stop_at = next(iter(leaders)) if len(groups) == 1 and not groups[0].routed else None

        def hook_for(path: str, stats: LayerStats) -> Any:
            def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                with torch.autocast(self.device.type, enabled=False):
                    x = args[0].reshape(-1, args[0].shape[-1]).float()
                    assert (
                        stats.hessian is not None and stats.abs_sum is not None and stats.abs_max is not None
                    )
                    stats.tokens += x.shape[0]
                    if stats.hessian.numel():
                        stats.hessian.addmm_(x.t(), x)
                    magnitude = x.abs()
                    stats.abs_sum += magnitude.sum(0)
                    torch.maximum(stats.abs_max, magnitude.amax(0), out=stats.abs_max) if x.shape[0] else None
                if path == stop_at:
                    raise _Stop

            return hook

        handles = [
            layer.get_submodule(p).register_forward_pre_hook(hook_for(p, s)) for p, s in leaders.items()
        ]
        try:
            for start, stop in self.batches():
                with contextlib.suppress(_Stop):
                    self.run(index, start, stop, self.inputs(index, start, stop))
        finally:
            for handle in handles:
                handle.remove()
        for path, stats in leaders.items():
            self._reduce(stats)
            if stats.hessian is not None and not bool(torch.isfinite(stats.hessian).all()):
                raise NumericsError(
                    f"layer {index}: inputs of {path!r} are not finite", hint="Try --dtype float32."
                )
        return {path: leaders[leader] for path, leader in follow.items()}

    def _reduce(self, stats: LayerStats) -> None:
        if self.workers.world == 1:
            return
        for tensor in (stats.hessian, stats.abs_sum):
            if tensor is not None and tensor.numel():
                self.workers.sum_(tensor)
        if stats.abs_max is not None:
            self.workers.max_(stats.abs_max)
        stats.tokens = int(self.workers.sum_(torch.tensor([stats.tokens], device=self.device))[0])

    def _autocast(self) -> Any:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)


def check_sequence(skeleton: Skeleton, seqlen: int) -> int:
    """`seqlen` cut to what the model's position embeddings allow; CalibrationError if that is < 2."""
    text = skeleton.hf_config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None) or seqlen
    if limit < 2:
        raise CalibrationError(
            f"the model takes only {limit} positions", hint="Correct max_position_embeddings."
        )
    return min(seqlen, int(limit))


def _wide(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def _star(path: str) -> str:
    return _EXPERT.sub(r"\1.*.\3", path)


def _fill_star(pattern: str, path: str) -> str:
    """The path that `pattern` means for the same expert as `path`."""
    match = _EXPERT.match(path)
    return pattern.replace("*", match[2]) if match else pattern


def _back_to_meta(model: nn.Module, path: str) -> None:
    module_path, _, leaf = path.rpartition(".")
    module = model.get_submodule(module_path)
    tensor = module._parameters.get(leaf)
    if tensor is not None:
        module._parameters[leaf] = nn.Parameter(torch.empty_like(tensor, device="meta"), requires_grad=False)
