"""What every kind of fault needs: a folder, forks with a limit, weights that say their step, small disks."""
import ctypes
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the helpers of the other tests

import torch
from conftest import alive

from minigpt_wb.training import checkpoints as ck
from minigpt_wb.training.saver import Saver
from minigpt_wb.training.snapshot import take_snapshot

KINDS: list["Kind"] = []
LIMIT_S = 5.0  # for whatever reads a hostile or damaged file


class Lost(AssertionError):
    "A fault that was not survived: what was seen instead"


@dataclass
class Lab:
    "Where the faults happen, and what was made once for all of them"
    work: Path
    made: dict = field(default_factory=dict)

    def once(self, name, make: Callable):
        "`make()`, the first time it is asked for"
        if name not in self.made: self.made[name] = make()
        return self.made[name]

    def fresh(self, name: str = "case") -> Path:
        "An empty folder"
        folder = self.work / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder


Faults = Iterator[None]  # of a case: a `yield` for each fault that was survived, `Lost` for one that was not


@dataclass
class Kind:
    "A kind of fault; case i is the same fault whatever else is run"
    name: str
    run: Callable[[Lab, int, random.Random], Faults]
    cases: int | Callable[[Lab], int]             # at scale 1
    needs: Callable[[], str | None] = lambda: None  # why it cannot be done here


def kind(name: str, cases, needs=lambda: None):
    "Put a function into the campaign"
    def add(run):
        KINDS.append(Kind(name, run, cases, needs))
        return run
    return add


# --- weights that say which step they are of

class Toy:
    "A model whose weights and moments are all the number of its step"
    def __init__(self, kib: int = 16):
        self.module = torch.nn.Linear(64, 4 * kib, bias=False)  # 256 bytes a row
        self.optimizer = torch.optim.AdamW(self.module.parameters())
        self.module.weight.grad = torch.ones_like(self.module.weight)
        self.optimizer.step()

    def at(self, step: int):
        "The snapshot of `step`: references, which the next step writes over"
        state = self.optimizer.state[self.module.weight]
        with torch.no_grad():
            self.module.weight.fill_(step)
            state["exp_avg"].fill_(step + 0.25); state["exp_avg_sq"].fill_(step + 0.5)
        return take_snapshot(step, self.module.state_dict(), self.optimizer, {"samples": step, "mark": step})


def mark_of(c: ck.Checkpoint) -> int:
    "The step that every number of a toy's checkpoint says; Lost when they differ"
    moments = c.load_optimizer()["weight"]
    said = {"weight": c.load_model()["weight"], "exp_avg": moments["exp_avg"] - 0.25,
            "exp_avg_sq": moments["exp_avg_sq"] - 0.5}
    for name, t in said.items():
        if (t != c.state["mark"]).any(): raise Lost(f"{c.path.name}: {name} is not of step {c.state['mark']}")
    return c.state["mark"]


def newest(store: Path, at_least: int = 0) -> ck.Checkpoint:
    "The newest step of a toy's store that verifies, bit for bit what was saved"
    try: c = ck.pick(ck.list_checkpoints(store), "latest", "the store")
    except ValueError as e: raise Lost(f"step {at_least} was acknowledged, nothing loads: {e}") from None
    if c.step < at_least: raise Lost(f"step {at_least} was acknowledged, the newest that loads is {c.step}")
    if mark_of(c) != c.step: raise Lost(f"{c.path.name} holds the weights of step {mark_of(c)}")
    return c


def litter(store: Path) -> list[str]:
    "What dead or failed writers left in a store"
    return sorted(p.name for p in store.iterdir() if re.match(r"\.(tmp|old|del)-|\..*\.part$", p.name))


def recovers(store: Path, step: int = 1000) -> None:
    "The next save works, takes the litter away and leaves every checkpoint whole"
    save_all(store, [step])
    if left := litter(store): raise Lost(f"litter is left after the next save: {', '.join(left)}")
    if newest(store).step != step: raise Lost(f"the save after the fault is not the newest: {newest(store)}")
    for c in ck.list_checkpoints(store):
        if problems := c.verify(): raise Lost(f"{c.path.name} is damaged after the fault: {problems}")


def save_all(store: Path, steps: list[int], keep_last: int = 100, kib: int = 16) -> list[int]:
    "Save `steps` by a Saver of its own -> those acknowledged, the moment they are"
    toy, acknowledged = Toy(kib), []
    with Saver(store, keep_last=keep_last) as saver:
        for step in steps:
            saver.save(toy.at(step))
            toy.at(-1)  # training goes on while it is being written
            saver.wait()
            acknowledged += [s.step for s in saver.finished()]
    return acknowledged


# --- processes

@dataclass(frozen=True)
class Ended:
    "How a forked process ended"
    status: int      # negative: the signal that killed it
    grown_mib: float # its largest memory beyond what it was born with
    said: str        # its last exception

    @property
    def exception(self) -> str: return self.said.strip().splitlines()[-1] if self.said.strip() else ""


def fork(work: Callable[[], int | None], said: Path | None = None) -> int:
    "Run `work()` in a forked process -> its pid; a traceback goes to the file `said`"
    sys.stdout.flush(); sys.stderr.flush()
    pid = os.fork()
    if pid: return pid
    status = 1
    try:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        status = work() or 0
    except BaseException:
        if said: said.write_text(traceback.format_exc())
    finally: os._exit(status)


def resident_mib() -> float:
    "Memory of this process"
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def forked(lab: Lab, work: Callable[[], int | None], limit_s: float = 30.0) -> Ended:
    "Run `work()` in a forked process and wait; Lost when it hangs"
    said, born, began = lab.work / "said.txt", resident_mib(), time.monotonic()
    said.unlink(missing_ok=True)
    pid = fork(work, said)
    while not (done := os.wait4(pid, os.WNOHANG))[0]:
        if time.monotonic() - began > limit_s:
            os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
            raise Lost(f"it hangs: nothing came in {limit_s} s")
        time.sleep(0.001)
    text = said.read_text() if said.exists() else ""
    return Ended(os.waitstatus_to_exitcode(done[1]), done[2].ru_maxrss / 1024 - born, text)


def parents() -> dict[int, int]:
    "Parent of every process"
    found = {}
    for entry in os.scandir("/proc"):
        if not entry.name.isdecimal(): continue
        try: text = Path(entry.path, "stat").read_text()
        except OSError: continue
        found[int(entry.name)] = int(text.rsplit(")", 1)[1].split()[1])
    return found


def descendants(pid: int) -> list[int]:
    "Every process below `pid` that is alive"
    tree, found, layer = parents(), [], [pid]
    while layer := [p for p, above in tree.items() if above in layer]: found += layer
    return [p for p in found if alive(p)]


def adopt_orphans() -> None:
    "From now on, processes whose parent dies become children of this one, where `descendants` sees them"
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def wait_for(condition: Callable[[], object], limit_s: float, what: str, every_s: float = 0.002):
    "The first true value of `condition()`; Lost after `limit_s`"
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        if value := condition(): return value
        time.sleep(every_s)
    raise Lost(f"{what}: nothing came in {limit_s} s")


def end_all() -> None:
    "End and reap whatever this process started and is still there, after a fault that was lost"
    for pid in descendants(os.getpid()):
        try: os.kill(pid, signal.SIGKILL)
        except ProcessLookupError: continue
    while True:
        try: os.waitpid(-1, 0)
        except ChildProcessError: return


@contextmanager
def hurry(limit_s: float) -> Iterator[None]:
    "Lost when the block takes longer"
    def late(*_): raise Lost(f"it hangs: nothing came in {limit_s} s")
    old = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try: yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


# --- disks that fill

def no_mount() -> str | None:
    "Why no tmpfs can be mounted here, or None"
    if not sys.platform.startswith("linux"): return "needs Linux, to mount a tmpfs"
    if os.geteuid(): return "needs root, to mount a tmpfs"
    folder = tempfile.mkdtemp()
    try:
        with disk(Path(folder), "size=64k"): return None
    except OSError as e: return f"needs the right to mount a tmpfs ({e})"
    finally: os.rmdir(folder)


@contextmanager
def disk(folder: Path, options: str) -> Iterator[Callable[[str], None]]:
    "A tmpfs on `folder`; gives a function that changes its size"
    def mount(options: str) -> None:
        words = ["mount", "-t", "tmpfs", "-o", options, "none", folder]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode: raise OSError(done.stderr.strip())
    mount(options)
    try: yield lambda more: mount(f"remount,{more}")
    finally: subprocess.run(["umount", "-l", folder], check=True)
