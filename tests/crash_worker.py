"""Run by test_publish.py in its own process: converts, is killed, resumes, looks at what is there.

torch takes seconds to import, so one process imports it and forks a child for every run.

usage: crash_worker.py DIRECTORY timed KILLS SEED     until so many runs were killed at a random moment
       crash_worker.py DIRECTORY steps STRIDE SEED    killed before the 1st, 1+STRIDE-th ... change
It prints one JSON object.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from quantkit import staging
from quantkit.checkpoint import CheckpointReader
from quantkit.errors import QuantkitError
from quantkit.journal import Journal
from quantkit.publish import CheckpointWriter

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.uint8, torch.int32, torch.int64, torch.bool)
DTYPES += (torch.float8_e4m3fn,)
MAX_SHARD = 20_000


def make_units() -> list[tuple[str, dict[str, torch.Tensor]]]:
    """Some small units, some that fill a shard exactly, one that spans several."""
    generator = torch.Generator().manual_seed(7)
    units = []
    for i, count in enumerate((3, 1, 20, 8)):
        tensors = {}
        for j in range(count):
            shape = tuple(int(n) for n in torch.randint(1, 63, (1 + j % 2,), generator=generator))
            noise = torch.randn(shape, generator=generator)
            tensors[f"model.layers.{i}.w{j}"] = noise.mul(9).to(DTYPES[(i + j) % len(DTYPES)])
        units.append((f"layer {i}", tensors))
    units.append(("big", {"big.weight": torch.randn(75, 66, generator=generator)}))  # a shard by itself
    return units


def convert(dest: Path, *, overwrite: bool, resume: bool) -> None:
    with CheckpointWriter(
        dest, max_shard_size=MAX_SHARD, overwrite=overwrite, resume=resume, fingerprint="f"
    ) as writer:
        for unit, tensors in make_units():
            if unit not in writer.completed:
                writer.write_unit(unit, tensors, report={"unit": unit, "error": 0.1})
            assert writer.unit_report(unit) == {"unit": unit, "error": 0.1}
            (writer.scratch / "activations").write_bytes(os.urandom(99))
        writer.add_json("config.json", {"model_type": "llama", "marker": "new"})
        writer.add_bytes("tokenizer.json", b"{}" * 4000)
        writer.add_bytes("additional_chat_templates/tool.jinja", b"{{ x }}")
        writer.provenance = {"source": "test"}
        writer.publish()


def make_old(dest: Path) -> None:
    with CheckpointWriter(dest, fingerprint="old") as writer:
        writer.write_unit("all", {"old.weight": torch.arange(4000, dtype=torch.float32)})
        writer.add_json("config.json", {"model_type": "llama", "marker": "old"})
        writer.publish()


def digest(path: Path) -> str:
    """Hash of names, modes and contents of a tree; "" if there is none."""
    if not path.exists():
        return ""
    total = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        content = file.read_bytes() if file.is_file() else b""
        total.update(f"{file.relative_to(path)}\0{file.stat().st_mode}\0{len(content)}\0".encode() + content)
    return total.hexdigest()


def in_child(work) -> int:
    """Fork, run `work`, return the child's pid."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except QuantkitError as error:
            sys.stderr.write(f"{error}\n")
            code = 10
        finally:
            os._exit(code)
    return pid


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die_at_step(step: int) -> None:
    """SIGKILL this process just before its `step`-th change to the disk; odd appends are torn."""
    count = 0

    def tick() -> bool:
        nonlocal count
        count += 1
        return count == step

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, args: tuple) -> None:
        if event == "open" and not (isinstance(args[2], int) and args[2] & (os.O_CREAT | os.O_TRUNC)):
            return
        names = ("open", "os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
        if event in names and tick():
            die()

    def before(function):
        def wrapped(*args):
            if tick():
                die()
            return function(*args)

        return wrapped

    pwrite = os.pwrite

    def torn(fd: int, data: bytes, offset: int) -> int:
        if tick():
            pwrite(fd, data[: len(data) // 2], offset)
            die()
        return pwrite(fd, data, offset)

    sys.addaudithook(hook)
    os.fsync, os.pwrite = before(os.fsync), torn
    staging.exchange = before(staging.exchange)
    Journal.append = before(Journal.append)


def trial(folder: Path, new: str, *, overwrite: bool, resume: bool, kill, again=None) -> dict[str, object]:
    """One conversion that is killed (maybe twice), then one that is not."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    dest = folder / "model"
    if overwrite:
        make_old(dest)
    old = digest(dest)
    result: dict[str, object] = {"mixed": 0, "killed": 0, "published": 0}
    for killer in [k for k in (kill, again) if k is not None]:
        status = killer(lambda: convert(dest, overwrite=overwrite, resume=result["killed"] == 1 and resume))
        if status == -signal.SIGKILL:
            result["killed"] += 1
        state = digest(dest)
        if state not in (old, new):
            result["mixed"] += 1
        if state == new:
            result["published"] += 1
        if state:
            with CheckpointReader(dest) as reader:
                for name in reader.names():
                    reader.read(name)
    staged = folder / ".model.quantkit-staging" / "journal.jsonl"
    done = sum('"type": "unit"' in line for line in staged.open()) if staged.exists() else 0
    result["units_done"] = done
    final = wait(in_child(lambda: convert(dest, overwrite=overwrite, resume=resume)))
    # Killed after it had cleaned up, a second run without --overwrite is told that the model exists.
    ok = final == 0 or (final == 10 and not overwrite and state == new)
    result["lost"] = 0 if ok and digest(dest) == new else 1
    result["litter"] = [e for e in os.listdir(folder) if e != "model"] if final == 0 else []
    return result


def main() -> None:
    folder, mode, count, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    chance = random.Random(seed)
    start = time.perf_counter()
    assert wait(in_child(lambda: convert(folder / "reference" / "model", overwrite=False, resume=False))) == 0
    again = time.perf_counter()  # the first run also warms up
    assert wait(in_child(lambda: convert(folder / "again" / "model", overwrite=False, resume=False))) == 0
    duration = time.perf_counter() - again
    new = digest(folder / "reference" / "model")

    def timed(work) -> int:
        pid = in_child(work)
        time.sleep(chance.uniform(0, 1.1 * duration))
        os.kill(pid, signal.SIGKILL)
        return wait(pid)

    def stepped(step: int):
        def run(work) -> int:
            def doomed() -> None:
                die_at_step(step)
                work()

            return wait(in_child(doomed))

        return run

    results = []
    if mode == "timed":
        for i in range(3 * count):
            if sum(bool(r["killed"]) for r in results) >= count:
                break
            # overwrite or not, resume or not, killed once or twice
            again = timed if i % 4 == 0 else None
            results.append(
                trial(folder / "t", new, overwrite=i % 2 == 0, resume=i % 4 < 3, kill=timed, again=again)
            )
    else:
        step, killed = 1, True
        while killed and len(results) < 2000:
            both = (False, True) if count == 1 else ((step // count) % 2 == 0,)
            for overwrite in both:
                resume = overwrite or step % 5 != 0
                again = stepped(chance.randint(1, 150)) if chance.random() < 0.3 else None
                killer = stepped(step)
                results.append(
                    trial(folder / "t", new, overwrite=overwrite, resume=resume, kill=killer, again=again)
                )
            killed = bool(results[-1]["killed"])
            step += count
    summary = {
        "runs": len(results),
        "seconds": round(time.perf_counter() - start, 1),
        "one_run": round(duration, 3),
        **{k: sum(r[k] for r in results) for k in ("killed", "mixed", "lost", "published")},
        "resumed_with_units": sum(1 for r in results if r["units_done"]),
        "litter": sorted({e for r in results for e in r["litter"]}),
        "bad": [(i, r) for i, r in enumerate(results) if r["mixed"] or r["lost"] or r["litter"]],
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
