"""A server of the demo, started as its README says."""

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
        url: of its page.
        process: that serves it.
        folder: where it keeps images and results.
        started: `time.monotonic()` when the command was given.
    """

    url: str
    process: subprocess.Popen
    folder: Path
    started: float


def start_server(folder: Path, *options: str) -> Server:
    """`python demo/app.py OPTIONS`, once it answers."""
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
    """Ends a server as a Space's machine does."""
    server.process.terminate()
    assert server.process.wait(timeout=60) == 0
