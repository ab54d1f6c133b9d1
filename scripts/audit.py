"""Known vulnerabilities of the pinned dependencies (`make audit`), by pip-audit; never silent about what it missed.

pip-audit exits with 0 as well when the service that it asks does not know a package, or is replaced by a mirror
that has no advisories. Exit codes here: 0 all were looked up and none is vulnerable, 1 some are vulnerable,
2 some could not be looked up (then nothing is known about those).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def ask(service: str, requirements: Path) -> list[dict[str, object]] | str:
    """pip-audit's list of dependencies, or one line about why there is none."""
    command = [
        sys.executable,
        "-m",
        "pip_audit",
        "--requirement",
        str(requirements),
        "--no-deps",
        "--disable-pip",
    ]
    done = subprocess.run(
        [*command, "--vulnerability-service", service, "--format", "json", "--progress-spinner", "off"],
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        found: list[dict[str, object]] = json.loads(done.stdout)["dependencies"]
        return found
    except (ValueError, KeyError):
        return (done.stderr.strip().splitlines() or ["no answer"])[-1][:200]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requirement", type=Path, default=ROOT / "constraints.txt")
    args = parser.parse_args()
    looked_up: set[object] = set()
    names: set[object] = set()
    vulnerable: dict[str, set[str]] = {}
    for service in ("pypi", "osv"):
        found = ask(service, args.requirement)
        if isinstance(found, str):
            print(f"{service}: {found}", file=sys.stderr)
            continue
        for package in found:
            names.add(package["name"])
            if "skip_reason" in package:
                continue
            looked_up.add(package["name"])
            for one in package["vulns"]:  # type: ignore[attr-defined]
                fixed = ", ".join(one["fix_versions"]) or "no version yet"
                label = f"{package['name']} {package['version']}"
                vulnerable.setdefault(label, set()).add(f"{one['id']} (fixed in {fixed})")
    for label, ids in sorted(vulnerable.items()):
        print(f"{label}: {'; '.join(sorted(ids))}")
    missing = names - looked_up
    if vulnerable:
        sys.exit(1)
    if missing or not names:
        print(
            f"{len(missing) if names else 'all'} of {len(names) or 'the'} dependencies could not be looked up: neither "
            "pypi.org nor osv.dev answered about them. Run this where one of them can be reached; until then nothing "
            "is known about their vulnerabilities.",
            file=sys.stderr,
        )
        sys.exit(2)
    print(f"{len(names)} dependencies, no known vulnerability")


if __name__ == "__main__":
    main()
