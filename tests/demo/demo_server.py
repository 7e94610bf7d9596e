"""Starts a server of the demo as described in its README."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent.parent
DEMO = REPOSITORY / "demo"
START_SECONDS = 240  # on a machine that is busy with other tests


@dataclass
class Server:
    """A running demo.

    Args:
        url: address of the page.
        process: server process.
        folder: folder of images and results.
        started: `time.monotonic()` at the start.
    """

    url: str
    process: subprocess.Popen
    folder: Path
    started: float


def start_server(folder: Path, *options: str) -> Server:
    """Runs `python demo/app.py OPTIONS` and waits until it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "tmp").mkdir()
    environment = os.environ | {
        "GRADIO_SERVER_PORT": str(port),
        "TMPDIR": str(folder / "tmp"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("GRADIO_TEMP_DIR", None)
    started = time.monotonic()
    log = (folder / "log").open("w")
    process = subprocess.Popen(
        [sys.executable, str(DEMO / "app.py"), *options], cwd=folder, env=environment, stdout=log, stderr=log
    )
    server = Server(f"http://127.0.0.1:{port}/", process, folder, started)
    while time.monotonic() < started + START_SECONDS:
        if process.poll() is not None:
            pytest.fail(f"the demo ended with {process.returncode}:\n{(folder / 'log').read_text()}")
        try:
            with urllib.request.urlopen(server.url, timeout=5):
                return server
        except OSError:
            time.sleep(0.1)
    process.kill()
    pytest.fail(f"the demo did not answer within {START_SECONDS} s:\n{(folder / 'log').read_text()}")


def stop(server: Server) -> None:
    """Stops a server in the same way as a Space does."""
    server.process.terminate()
    assert server.process.wait(timeout=60) == 0
