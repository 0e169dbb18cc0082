"""`make lab` opens the course."""

import os
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def lab(tmp_path):
    port = free_port()
    arguments = f"--no-browser --port={port} --IdentityProvider.token=learner"
    environment = os.environ | {
        "JUPYTER_CONFIG_DIR": str(tmp_path),
        "JUPYTER_DATA_DIR": str(tmp_path),
    }
    process = subprocess.Popen(
        ["make", "lab", f"LAB_ARGS={arguments}"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    yield f"http://127.0.0.1:{port}"
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(30)


def fetch(address: str) -> bytes:
    with urllib.request.urlopen(address, timeout=10) as response:
        return response.read()


def test_make_lab_answers_on_its_page_within_a_minute(lab):
    deadline = time.monotonic() + 60
    while True:
        try:
            page = fetch(f"{lab}/lab?token=learner")
            break
        except OSError:
            assert time.monotonic() < deadline, "JupyterLab did not answer within a minute"
            time.sleep(0.5)
    assert b"JupyterLab" in page
    assert b"01_rank_intuition.ipynb" in fetch(f"{lab}/api/contents/notebooks?token=learner")
