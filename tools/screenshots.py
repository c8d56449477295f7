"""The pictures of the documents: what commands print, as SVG, and a report as a browser shows it, as PNG.

    uv run tools/screenshots.py RUN --out docs/pictures

RUN is a finished quantized run with its report (`qat report RUN`). Chromium draws it (`chromium` on the path), light and
dark, and as wide as a phone.
"""

import argparse
import io
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.text import Text

COLUMNS = 100
QAT = [sys.executable, "-m", "qat.cli"]
MOVES = re.compile(r"\x1b\[(?:\?\d+[hl]|\d*[A-HJKST])")  # of the cursor, and what erases; colours stay
# Name -> width and height of the window, and flags of the browser
WINDOWS: dict[str, tuple[int, int, list[str]]] = {
    "report-light": (1000, 1250, []),
    "report-dark": (1000, 1250, ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"]),
    "report-phone": (390, 1250, []),
}


def printed(command: list[str], folder: Path) -> str:
    """All that `command` writes to a terminal, run in `folder`, colours included. Raises RuntimeError where it fails."""
    reading, writing = pty.openpty()
    environment = os.environ | {"COLUMNS": str(COLUMNS), "LINES": "60", "TERM": "xterm-256color"}
    process = subprocess.Popen(command, stdout=writing, stderr=writing, stdin=writing, env=environment, cwd=folder)
    os.close(writing)
    written = b""
    while True:
        try:
            chunk = os.read(reading, 65536)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        written += chunk
    os.close(reading)
    if process.wait() != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}: {written.decode()[-500:]}")
    return written.decode()


def last_states(written: str) -> str:
    """Lines as they stand in the end: of what was drawn over, the last state."""
    lines = []
    for line in written.replace("\r\n", "\n").split("\n"):
        states = [state for state in line.split("\r") if MOVES.sub("", state).strip()]
        lines.append(MOVES.sub("", states[-1]) if states else "")
    return "\n".join(lines).strip("\n")


def draw(title: str, text: str, path: Path) -> None:
    """A terminal's window that shows `text`, as SVG."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    console.print(Text.from_ansi(text))
    path.write_text(console.export_svg(title=title, font_aspect_ratio=0.61))


def draw_progress(path: Path) -> None:
    """A short training on rendered images, with its bar as it stood in the end."""
    with TemporaryDirectory() as place:
        command = [*QAT, "train", "fp", "--steps", "30", "--evaluate-every", "10", "--out", "run", "--per-class", "20"]
        command += ["--backbone", "mobilenetv3_small_050", "--image-size", "64", "--batch-size", "8", "--workers", "0"]
        written = printed(command, Path(place))
    draw("qat train fp --steps 30", last_states(written), path)


def draw_report(run: Path, out: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("error: no chromium on the path; the report cannot be drawn")
    page = (run / "report.html").resolve(strict=True).as_uri()
    for name, (width, height, flags) in WINDOWS.items():
        picture = out / f"{name}.png"
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *flags]
        command += [f"--window-size={width},{height}", f"--screenshot={picture.resolve()}", page]
        subprocess.run(command, check=True, capture_output=True)
        _in_few_colours(picture)


def _in_few_colours(picture: Path) -> None:
    """Palettes make such pictures a third of their size."""
    from PIL import Image

    with Image.open(picture) as image:
        image.convert("RGB").quantize(64).save(picture, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="finished quantized run with its report")
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    draw("qat --help", last_states(printed([*QAT, "--help"], options.out)), options.out / "help.svg")
    draw_progress(options.out / "progress.svg")
    draw_report(options.run, options.out)


if __name__ == "__main__":
    main()
