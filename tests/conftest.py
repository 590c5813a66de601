"""Programs of the project, run as a user runs them: in a folder of their own, as processes of their own."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a shell: programs inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # two cores, many processes; no network
ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent

TINY = dict(preset="debug", data="toy", n_layer=1, d_model=32, context_length=32, batch_size=2,
            log_level="info", tensorboard=False, max_new_tokens=8, eval_every=0, save_every=0)


def flags(**settings) -> list[str]:
    "Settings as command-line flags"
    return [w for name, value in settings.items() for w in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture
def shell(tmp_path):
    "Run a program in an empty folder -> CompletedProcess with text output"
    def run(*words, timeout=240, **more):
        program, *rest = map(str, words)
        found = BIN / program
        words = [found if found.exists() else program, *rest]
        return subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=timeout, **more)
    return run


def until(condition, timeout: float = 60.0, every: float = 0.05):
    "The first true value of `condition()`; fails after `timeout` seconds"
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if value := condition(): return value
        time.sleep(every)
    raise AssertionError(f"nothing came in {timeout} s")


def alive(pid: int) -> bool:
    "Whether a process runs; a zombie does not"
    try: return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError: return False
