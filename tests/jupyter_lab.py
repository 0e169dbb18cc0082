"""`make lab`, started and stopped by the tests."""

import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent
TOKEN = "learner"


@contextmanager
def make_lab(settings: Path, *arguments: str) -> Iterator[str]:
    """The address of a server that answers; it keeps everything of its own in `settings`."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    own = {f"JUPYTER_{name}_DIR": str(settings / name) for name in ("CONFIG", "DATA", "RUNTIME")}
    arguments = ("--no-browser", f"--port={port}", f"--IdentityProvider.token={TOKEN}", *arguments)
    process = subprocess.Popen(
        ["make", "lab", f"LAB_ARGS={' '.join(arguments)}"],
        cwd=ROOT,
        env=os.environ | own,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        address = f"http://127.0.0.1:{port}"
        _wait_for(address)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)  # the server ends its kernels, and make waits for it
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_for(address: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            fetch(f"{address}/api")
            return
        except OSError:
            assert time.monotonic() < deadline, "JupyterLab did not answer within a minute"
            time.sleep(0.2)


def fetch(address: str) -> bytes:
    with urllib.request.urlopen(address, timeout=10) as response:
        return response.read()
