"""Launches past Triton's look-up: what makes a new entry, what a second call is given. Speed: docs/adr/0026."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from quantkit.kernels import affine_launch, launch


class Compiled:
    """Stands for a compiled kernel: notes what it is launched with."""

    function = 1

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.calls.append((grid, *arguments))


class Kernel:
    """Stands for a just-in-time kernel `(x, out, n, eps, A, B)`; A and B are constants."""

    arg_names = ("x", "out", "n", "eps", "A", "B")

    def __init__(self, compiles: bool = True, stages: int = 9) -> None:
        self.made: list[Compiled] = []
        self.looked_up: list[dict[str, Any]] = []
        self.compiles, self.stages = compiles, stages

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: Any, **options: Any) -> Compiled | None:
            self.looked_up.append(options)
            if options.get("STAGES", 0) > self.stages:
                raise OutOfResources(300, 200, "shared memory")
            if not self.compiles:
                return None
            self.made.append(Compiled())
            return self.made[-1]

        return run


@pytest.fixture(autouse=True)
def _own_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(affine_launch, "_fitting_stages", {})


def test_a_second_call_goes_to_the_compiled_kernel() -> None:
    kernel, x, out = Kernel(), torch.randn(64), torch.empty(64)
    for _ in range(3):
        launch.launch(kernel, (7,), x, out, 64, 1e-5, B="b", A=True, num_warps=4)
    assert len(kernel.looked_up) == 1
    (compiled,) = kernel.made
    assert [c[0] for c in compiled.calls] == [(7, 1, 1)] * 2
    assert compiled.calls[0][1] is x and compiled.calls[0][3:] == (64, 1e-5, True, "b"), (
        "in the kernel's order"
    )


def test_the_grid_and_a_float_are_free() -> None:
    kernel, x = Kernel(), torch.randn(64)
    for grid, eps in (((7,), 1e-5), ((8, 2), 1e-6), ((9, 2, 3), 2e-6)):
        launch.launch(kernel, grid, x, x, 64, eps, A=1, B=2)
    assert len(kernel.looked_up) == 1
    assert [(c[0], c[4]) for c in kernel.made[0].calls] == [((8, 2, 1), 1e-6), ((9, 2, 3), 2e-6)]


def test_what_triton_compiles_for_is_looked_up_again() -> None:
    kernel, buffer = Kernel(), torch.randn(128)
    x = buffer[:64]
    same: dict[str, Any] = {"A": 1, "B": 2, "num_warps": 4}
    launch.launch(kernel, (1,), x, x, 64, 1e-5, **same)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((buffer[1:65], x, 64, 1e-5), same),  # not at a multiple of 16 bytes
        ((x.half(), x, 64, 1e-5), same),
        ((x, x, 65, 1e-5), same),
        ((x, x, 1, 1e-5), same),
        ((x, x, 64, 1e-5), {**same, "B": 3}),
        ((x, x, 64, 1e-5), {**same, "num_warps": 8}),
        ((x.to("meta"), x, 64, 1e-5), same),  # another device
    ]
    for i, (arguments, options) in enumerate(calls):
        launch.launch(kernel, (1,), *arguments, **options)
        assert len(kernel.looked_up) == i + 2
    launch.launch(Kernel(), (1,), x, x, 64, 1e-5, **same)
    assert len(kernel.looked_up) == len(calls) + 1, "another kernel is another entry"


def test_nothing_is_kept_of_a_recorded_launch() -> None:
    kernel, x = Kernel(compiles=False), torch.randn(64)
    for _ in range(2):
        launch.launch(kernel, (1,), x, x, 64, 1e-5, A=1, B=2)
    assert len(kernel.looked_up) == 2


def test_the_table_does_not_grow_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_MOST_COMPILED", 10)
    kernel, x = Kernel(), torch.randn(64)
    for n in range(25):
        launch.launch(kernel, (1,), x, x, n, 1e-5, A=1, B=2)
        assert len(launch._compiled) <= 10


def test_stages_that_do_not_fit_are_tried_once() -> None:
    kernel, x = Kernel(stages=2), torch.randn(64)
    for _ in range(3):
        options = {"A": 1, "B": 2, "STAGES": 4}
        affine_launch.launch_fitting(kernel, (1,), (x, x, 64, 1e-5), options)
    tried = [o["STAGES"] for o in kernel.looked_up]
    assert tried == [4, 3, 2] and all(o["STAGES"] == o["num_stages"] for o in kernel.looked_up)
    assert len(kernel.made[0].calls) == 2
    with pytest.raises(OutOfResources):
        affine_launch.launch_fitting(Kernel(stages=0), (1,), (x, x, 64, 1e-5), {"A": 1, "B": 2, "STAGES": 2})
