"""The fuzzing corpus and every input that ever broke something, replayed; and some damage of our own.

The search itself is `make fuzz` (atheris, coverage-guided); this only keeps what it taught.
"""

from __future__ import annotations

import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import fuzz_targets
import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module", params=sorted(fuzz_targets.TARGETS))
def target(request: pytest.FixtureRequest) -> Iterator[tuple[str, Callable[[bytes], None]]]:
    folder = fuzz_targets.workspace()
    yield request.param, fuzz_targets.TARGETS[request.param](folder)
    shutil.rmtree(folder)


def inputs(name: str, kind: str) -> list[Path]:
    folder = HERE / kind / name
    return sorted(folder.iterdir()) if folder.is_dir() else []


def test_corpus_and_regressions(target: tuple[str, Callable[[bytes], None]]) -> None:
    name, run = target
    seeds = inputs(name, "corpus")
    assert len(seeds) >= 2 and sum(p.stat().st_size for p in seeds) < 20_000
    for path in (*seeds, *inputs(name, "regressions")):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(path.read_bytes())


def test_random_damage(target: tuple[str, Callable[[bytes], None]]) -> None:
    """Some hundred mutations of the seeds; fresh ones each time, the seed is in the assertion."""
    name, run = target
    seed = random.randrange(1 << 32)
    chance = random.Random(seed)
    seeds = [p.read_bytes() for p in inputs(name, "corpus")]
    for _ in range(60 if name == "journal" else 250):
        data = bytearray(chance.choice(seeds))
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(data) + 1)
            kind = chance.randrange(4)
            if kind == 0 and data:
                data[at % len(data)] ^= 1 << chance.randrange(8)
            elif kind == 1:
                data[at:at] = chance.choice(
                    [b"9" * 30, b"-1", b'"', b"[[[[", b"null", b"\xff", b"\n", b"1e999"]
                )
            elif kind == 2:
                del data[at : at + chance.randint(1, 20)]
            else:
                other = chance.choice(seeds)
                data[at:] = other[chance.randrange(len(other)) :]
        try:
            run(bytes(data))
        except Exception as error:
            raise AssertionError(f"seed {seed}, input {bytes(data)!r}") from error


def test_a_broken_promise_is_noticed() -> None:
    with pytest.raises(fuzz_targets.Finding, match="printable"), fuzz_targets.refusal_is_fine():
        error = fuzz_targets.QuantkitError("x")
        error.args = ("two\nlines, long enough",)
        raise error
