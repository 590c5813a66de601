"""Signals where a cell cannot go: real processes, spawned ranks, torchrun's echo."""
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from minigpt_wb import signals

ASK = "from minigpt_wb import signals; signals.install(); print('ready', flush=True); import time\n"
POLITE = ASK + "while not signals.requested(): time.sleep(0.01)\n"
POLITE += "time.sleep(0.5); print(signals.requested(), flush=True)"


def start(program, **env):
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | env)
    process.stdout.readline()
    return process


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_one_asks_two_end(name):
    number = getattr(signal, name)
    process = start(POLITE)
    process.send_signal(number)
    assert process.communicate(timeout=20)[0] == f"{name}\n" and process.returncode == 0
    process = start(POLITE)
    process.send_signal(number); time.sleep(0.2); process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[0] == "" and process.returncode == 128 + signal.SIGTERM


def test_second_ends_a_process_stuck_in_c():
    "No handler of Python's runs while the main thread is in C: a collective looks like this"
    process = start(ASK + "import ctypes\nfor _ in range(9): ctypes.CDLL(None).sleep(9)")
    process.terminate(); time.sleep(0.2); process.terminate()
    asked = time.monotonic()
    assert process.wait(5) == 128 + signal.SIGTERM
    assert time.monotonic() - asked < 1
    process.stdout.close()


def test_torchrun_repeats_what_the_worker_already_has():
    process = start(POLITE, TORCHELASTIC_RUN_ID="none")
    process.terminate(); time.sleep(0.1); process.terminate()
    assert process.communicate(timeout=20)[0] == "SIGTERM\n" and process.returncode == 0


def mask(connection):
    connection.send([s for s in signals.SIGNALS if s in signal.pthread_sigmask(signal.SIG_BLOCK, [])])


def test_spawned_processes_inherit_the_block_from_the_first_on():
    code = ("from tests.test_signals import *\n"
            "if __name__ == '__main__': print(inherited())")
    done = subprocess.run([sys.executable, "-c", code], cwd=os.path.dirname(os.path.dirname(__file__)),
                          capture_output=True, text=True, timeout=60)
    assert done.stdout == "3\n", done.stderr


def inherited():
    "How many of the three signals the first process that is ever spawned here has blocked"
    context = multiprocessing.get_context("spawn")
    mine, its = context.Pipe()
    signals.block()
    process = context.Process(target=mask, args=(its,)); process.start()
    signals.unblock()
    found = mine.recv(); process.join()
    return len(found)
