"""Threads of the CPU path: every job once, errors, interrupts, several callers, and forks."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest
import torch

from quantkit.kernels import cpu_sessions, cpu_workers
from quantkit.kernels.bench_cases import random_weight
from quantkit.linear import QuantLinear

needs_ort = pytest.mark.skipif(not cpu_sessions.available(), reason="onnxruntime is not installed")


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_every_job_runs_once(threads: int) -> None:
    """Hundreds of hand-overs, so that workers come late, early and not at all."""
    for turn in range(300):
        seen: list[int] = []
        cpu_workers.run_all([(seen.append, turn * 10 + i) for i in range(6)], threads)
        assert sorted(seen) == [turn * 10 + i for i in range(6)]


def test_a_caller_does_not_wait_for_a_worker_that_took_nothing() -> None:
    """The worker is kept busy by a job of an earlier call's thread: the caller does all of its own."""
    block, entered = threading.Event(), threading.Event()

    def hold(_: object) -> None:
        if threading.current_thread().name == "quantkit-cpu":
            entered.set()
            block.wait(20)
        else:
            entered.wait(20)

    first = threading.Thread(target=cpu_workers.run_all, args=([(hold, None)] * 2, 2))
    first.start()
    assert entered.wait(20)
    seen: list[int] = []
    start = time.perf_counter()
    cpu_workers.run_all([(seen.append, i) for i in range(4)], 2)  # the workers are taken
    assert seen == [0, 1, 2, 3] and time.perf_counter() - start < 5
    block.set()
    first.join(20)
    assert not first.is_alive()


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_an_error_is_raised_once_all_have_ended(kind: type[BaseException]) -> None:
    seen: list[int] = []

    def job(i: int) -> None:
        time.sleep(0.01)
        seen.append(i)
        if i == 1:
            raise kind("broken")

    with pytest.raises(kind, match="broken"):
        cpu_workers.run_all([(job, i) for i in range(4)], 2)
    assert sorted(seen) == [0, 1, 2, 3]
    cpu_workers.run_all([(seen.append, i) for i in range(4, 8)], 2)  # and the next call is whole
    assert sorted(seen) == list(range(8))


@needs_ort
def test_first_called_in_inference_mode() -> None:
    """Shared buffers are written to in and outside that mode."""
    layer = QuantLinear(random_weight("affine-4g128", 64, 384, torch.device("cpu")))
    x = torch.randn(3, 384)
    with torch.inference_mode():
        inside = layer(x.bfloat16())
    assert torch.equal(layer(x.bfloat16()), inside)


FORKS = """
import os, sys, threading, time
import torch
torch.set_num_threads(2)
from quantkit.kernels import cpu_workers
from quantkit.kernels.bench_cases import random_weight
from quantkit.linear import QuantLinear

layers = [QuantLinear(random_weight(form, 1024, 1024, torch.device("cpu"))) for form in ("affine-4g128", "nf4")]
inputs = [torch.randn(rows, 1024) for rows in (1, 12)]
torch.set_grad_enabled(False)
want = [layer(x) for layer in layers for x in inputs]
assert cpu_workers.count() >= 1, "nothing ran on a worker"

def check():
    return all(torch.allclose(layer(x), y, rtol=1e-4, atol=1e-5)
               for (layer, x), y in zip([(layer, x) for layer in layers for x in inputs], want))

stop = threading.Event()
def hammer():
    while not stop.is_set():
        layers[0](inputs[0])
threading.Thread(target=hammer, daemon=True).start()
for _ in range(5):  # in the middle of another thread's product
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        os._exit(0 if check() else 3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
stop.set()

class Rows(torch.utils.data.Dataset):
    def __len__(self): return 6
    def __getitem__(self, i): return layers[i % 2](inputs[0])[0]

loader = torch.utils.data.DataLoader(Rows(), batch_size=1, num_workers=2, multiprocessing_context="fork")
for i, row in enumerate(loader):
    assert torch.allclose(row[0], want[2 * (i % 2)][0], rtol=1e-4, atol=1e-5), i
assert check(), "the parent's own layers work on"
print("done")
"""


@needs_ort
@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="no fork on this platform")
def test_forked_processes_multiply_too() -> None:
    """Children of a process that has used the workers, forked in the middle of a product, and DataLoader's."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKS], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0 and done.stdout.strip() == "done", done.stderr[-2000:]
