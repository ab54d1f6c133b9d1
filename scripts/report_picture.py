#!/usr/bin/env python3
"""A picture of the upper part of a report, taken by headless Chromium.

    python scripts/report_picture.py report-out/report/report.html docs/images/report.png

Needs the program `chromium` (Debian package of that name) and Pillow (which matplotlib brings).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--force-device-scale-factor=1",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=2460)
    args = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        sys.exit("chromium is not installed; the report itself is in " + str(args.page))
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "page.png"
        size = f"--window-size={args.width},{args.height}"
        subprocess.run(
            [
                chromium,
                *FLAGS,
                f"--user-data-dir={folder}/profile",
                size,
                f"--screenshot={raw}",
                args.page.resolve().as_uri(),
            ],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        args.picture.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(raw) as picture:
            few = picture.convert("RGB").quantize(
                256, method=Image.Quantize.MAXCOVERAGE, kmeans=5, dither=Image.Dither.NONE
            )
            few.save(args.picture, optimize=True)
    print(f"{args.picture}: {args.picture.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
