"""Compiles shim.c, and makes calls of this process fail. Imports nothing of ours: it comes before torch."""
import ctypes
import os
import shutil
import subprocess
from pathlib import Path

SHIM = "MINIGPT_FAULT_SHIM"  # names the library, or says why there is none
SHORT, KILL = -1, -2         # in place of an errno: half of what was to be written; the end of the process


def build(folder: Path) -> str:
    "The compiled library, or why there is none"
    compiler = next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), None)
    if not compiler: return "needs a C compiler, none is here"
    out = folder / "shim.so"
    words = [compiler, "-O1", "-shared", "-fPIC", Path(__file__).with_name("shim.c"), "-o", out, "-ldl"]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode == 0: return str(out)
    return f"needs a C compiler that works: {done.stderr.strip()[-200:]}"


def no_shim() -> str | None:
    "Why calls cannot be made to fail here, or None"
    given = os.environ.get(SHIM, "campaign.py has not loaded it")
    return None if given in os.environ.get("LD_PRELOAD", "-") else given


def arm(call: str, k: int, count: int, what: int) -> None:
    "Let `count` calls of `write`, `fsync`, ... fail with errno `what`, the k-th from now first"
    ctypes.CDLL(os.environ[SHIM]).fault_arm(call.encode(), k, count, what)


def disarm() -> int:
    "No call fails any more -> how many did"
    return ctypes.CDLL(os.environ[SHIM]).fault_disarm()
