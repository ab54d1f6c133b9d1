"""Coverage-guided fuzzing of one target with atheris (`make fuzz`).

    python tests/fuzz/fuzz.py reader -max_total_time=900

What is given after the target's name goes to libFuzzer. The corpus in tests/fuzz/corpus/TARGET is read
only; inputs that reach new code are kept in a temporary directory. A crash is written to the current
directory (`-artifact_prefix=` changes that) and can be replayed by naming its file.
"""

from __future__ import annotations

import atexit
import shutil
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["quantkit"]):
    import fuzz_targets

CORPUS = Path(__file__).parent / "corpus"


def main() -> None:
    name, arguments = sys.argv[1], sys.argv[2:]
    if name not in fuzz_targets.TARGETS:
        sys.exit(f"unknown target {name!r}: {', '.join(fuzz_targets.TARGETS)}")
    folder = fuzz_targets.workspace()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    target = fuzz_targets.TARGETS[name](folder)
    own = CORPUS / name
    if not any(Path(a).exists() for a in arguments if not a.startswith("-")):
        new = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
        arguments = [str(new), str(own), *arguments]
    limits = ["-timeout=5", "-rss_limit_mb=2048", f"-max_len={fuzz_targets.MAX_BYTES}"]
    dictionary = CORPUS / f"{name}.dict"
    if dictionary.exists():
        limits.append(f"-dict={dictionary}")
    atheris.Setup([sys.argv[0], *limits, *arguments], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
