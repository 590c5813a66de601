"""The fault campaign at a small scale, and whether it can fail."""
import re
import subprocess
import sys
from pathlib import Path

import pytest

CAMPAIGN = Path(__file__).with_name("campaign.py")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it forks, kills and looks into /proc")


def run(*words: str) -> subprocess.CompletedProcess:
    "The campaign as a user runs it"
    done = subprocess.run([sys.executable, CAMPAIGN, *words], capture_output=True, text=True, timeout=900)
    print(done.stdout, done.stderr)
    return done


@pytest.fixture(scope="module")
def report(): return run("--scale", "0.06")


def test_nothing_is_lost(report):
    assert report.returncode == 0
    last = report.stdout.splitlines()[-1]
    found = re.fullmatch(r"(\d+) faults injected, (\d+) survived, 0 lost, seed 0, \d+ s", last)
    assert found and found[1] == found[2] and int(found[1]) >= 80


def test_every_kind_was_tried(report):
    "What this machine does not allow is named"
    lines = report.stdout.splitlines()
    assert not [line for line in lines if re.search(r" 0 injected", line)]
    if skipped := [line for line in lines if " skipped: " in line]: pytest.skip("; ".join(skipped))


def test_others_do_lose(report):
    "The same flips of bits in the files of torch.save and of DCP: most load as if nothing had happened"
    flips = re.findall(r"control: (\S+): (\d+) of 100 flips loaded", report.stdout)
    assert {name for name, _ in flips} == {"torch.save", "torch.distributed.checkpoint"}
    assert all(int(silent) > 50 for _, silent in flips)


def test_it_can_fail():
    "Every promise that is broken on purpose is noticed"
    done = run("--self-test")
    said = re.findall(r"^sabotage: .*", done.stdout, re.M)
    assert done.returncode == 0 and len(said) > 10 and all("noticed by" in line for line in said)
