"""Measures how long the demo takes from its start to the first result, and for each later result.

    pip install 'pgseg-hf[demo]'
    python examples/benchmark_demo.py --short_side 448 --window whole

Each result is a local network call of `/segment` for a new image and includes the upload, both encoders, the masks and
their files. Times are wall-clock seconds; close other programs first.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from gradio_client import Client, handle_file
from PIL import Image

from pgseg_hf.command_line import CommandParser

DEMO = Path(__file__).parent.parent / "demo"
START_SECONDS = 300


def main() -> None:
    """Starts a server, sends requests and prints the times."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10, help="number of results after the first")
    parser.add_argument("--short_side", type=int, default=448, help="in pixels; 0 for the model's default")
    parser.add_argument("--window", choices=["whole", "sliding"], default="whole")
    parser.add_argument("--labels", default="building, road, pavement, tree, sky, car, pedestrian")
    parser.add_argument("--image", type=Path, default=DEMO / "examples" / "green-jacket.jpg")
    parser.add_argument("--port", type=int, default=7867)
    args = parser.parse_args()
    asked: dict[str, Any] = {"labels": args.labels, "background": False, "threshold": 0.3, "model": ""}
    asked |= {"window": args.window, "short_side": args.short_side, "api_name": "/segment"}
    with tempfile.TemporaryDirectory() as folder:
        images = turned(args.image, args.repeats + 1, Path(folder))
        started = time.perf_counter()
        server = subprocess.Popen(
            [sys.executable, str(DEMO / "app.py")], env=os.environ | {"GRADIO_SERVER_PORT": str(args.port)}
        )
        try:
            client = connected(f"http://127.0.0.1:{args.port}", server, folder)
            client.predict(image=handle_file(images[0]), **asked)
            print(f"from the start to the first result: {time.perf_counter() - started:.1f} s")
            seconds = []
            for turned_image in images[1:]:
                before = time.perf_counter()
                client.predict(image=handle_file(turned_image), **asked)
                seconds.append(time.perf_counter() - before)
        finally:
            server.terminate()
            server.wait()
    if seconds:
        print(f"each later result: median {statistics.median(seconds):.2f} s, longest {max(seconds):.2f} s")


def turned(image: Path, count: int, folder: Path) -> list[Path]:
    """Writes copies of the image, each rotated a little more."""
    with Image.open(image) as opened:
        turned_image = opened.convert("RGB")
    paths = [folder / f"{number}.png" for number in range(count)]
    for number, path in enumerate(paths):
        turned_image.rotate(number).save(path)
    return paths


def connected(url: str, server: subprocess.Popen, folder: str) -> Client:
    """Waits until the server answers and returns a client."""
    until = time.monotonic() + START_SECONDS
    while server.poll() is None and time.monotonic() < until:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return Client(url, verbose=False, download_files=folder)
        except OSError:
            time.sleep(0.1)
    sys.exit(f"the demo did not answer at {url} within {START_SECONDS} s")


if __name__ == "__main__":
    main()
