"""Makes the picture of docs/report.md: `python -m benchmarks.report_screenshot report.html docs/report.png`.

Needs Chromium or Chrome; the picture is the top of the page in light colors.
"""

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
COLORS = 64
"""Few colors make a small file; the page has hardly more."""


def take_screenshot(page: Path, picture: Path, browser: str, width: int, height: int) -> None:
    """Write the top `width` × `height` pixels of a page as a PNG file."""
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.png"
        size = f"--window-size={width},{height}"
        profile = f"--user-data-dir={folder}/profile"
        command = [browser, *OPTIONS, profile, size, f"--screenshot={raw}", page.resolve().as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        with Image.open(raw) as image:
            image.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE).save(picture, optimize=True)


def main() -> None:
    """Read the arguments and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--browser", default=next(filter(None, map(shutil.which, BROWSERS)), None))
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=1400)
    arguments = parser.parse_args()
    if arguments.browser is None:
        parser.error(f"no browser found; install one of {', '.join(BROWSERS)}, or name it with --browser")
    take_screenshot(arguments.page, arguments.picture, arguments.browser, arguments.width, arguments.height)


if __name__ == "__main__":
    main()
