"""The store and its background writer: killed at any moment, disks that fill, calls that fail."""
import errno
import os
import random
import re
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from lab import Faults, Lab, Lost, Toy, disk, fork, forked, kind, litter, newest, no_mount, recovers, save_all
from shim import KILL, SHORT, arm, disarm, no_shim
from test_checkpoints import at_event, die, file_limit

from minigpt_wb.training import checkpoints as ck
from minigpt_wb.training.saver import Saver

NEEDS = re.compile(r"step \d+ could not be saved .*needs [\d,]+ bytes, [\d,]+ (bytes )?are free")
SAVED, REFUSED, UNCLEAR = 0, 9, 8   # exit statuses of a process that saves


# --- kill -9

def save_for_ever(store: Path, kib: int, keep_last: int, acks: int) -> None:
    "Save steps 2, 3, ... in the background; those that are on disk go to the pipe `acks`"
    toy = Toy(kib)
    with Saver(store, keep_last=keep_last) as saver:
        os.write(acks, b"1\n")
        for step in range(2, 10**6):
            saver.save(toy.at(step))
            toy.at(-1)
            for s in saver.finished(): os.write(acks, b"%d\n" % s.step)


@kind("kill -9 while saving", 220)
def kill_while_saving(lab: Lab, case: int, rng: random.Random) -> Faults:
    "A process that saves in a loop is killed within 60 ms"
    store = lab.fresh() / "checkpoints"
    kib, keep_last, delay = rng.choice([4, 64, 512]), rng.choice([1, 2, 3]), rng.uniform(0, 0.06)
    save_all(store, [1], kib=kib)
    read, write = os.pipe()
    pid = fork(lambda: save_for_ever(store, kib, keep_last, write))
    os.close(write)
    try:
        if not select.select([read], [], [], 20)[0]: raise Lost("the saving process did not start")
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
        acks = b""
        while data := os.read(read, 65536): acks += data
    finally: os.close(read)
    newest(store, max(map(int, acks.split())))
    recovers(store, 10**7)
    yield


# A save that is watched: step 1 is there; step 2 comes, or step 1 again, and all but the newest is deleted.

def save_one(store: Path, step: int) -> int:
    "Save a step with weights of their own, keep only the newest -> exit status"
    toy = Toy()
    with Saver(store, keep_last=1) as saver:
        saver.save(toy.at(step))
        saver.wait()
        try: acknowledged = [s.step for s in saver.finished()]
        except ck.CheckpointError as e: return REFUSED if NEEDS.search(str(e)) else UNCLEAR
        return SAVED if acknowledged == [step] else UNCLEAR


def count_events(lab: Lab, step: int) -> int:
    "How many file operations `save_one` makes"
    store, told = lab.fresh() / "checkpoints", lab.work / "count"
    save_all(store, [1])
    def work() -> None:
        left = at_event(10**6, die)
        save_one(store, step)
        told.write_text(str(10**6 - left[0]))
    forked(lab, work)
    return int(told.read_text())


def events(lab: Lab) -> list[tuple[int, int]]:
    "(step, number of the operation) of every file operation of both saves"
    def make(): return [(step, n + 1) for step in (2, 1) for n in range(count_events(lab, step))]
    return lab.once("events", make)


@kind("kill -9 at each operation", lambda lab: len(events(lab)))
def kill_at_operation(lab: Lab, case: int, rng: random.Random) -> Faults:
    "Killed as one open, mkdir, rename, listing, ... of a save begins"
    step, n = events(lab)[case]
    yield from killed_in(lab, step, lambda: at_event(n, die))


@kind("kill -9 at each write", 40, no_shim)
def kill_at_call(lab: Lab, case: int, rng: random.Random) -> Faults:
    "The same at the calls that Python does not announce: write and fsync"
    call, step, k = ("write", "fsync")[case % 2], (1, 2)[case // 2 % 2], 1 + case // 4
    yield from killed_in(lab, step, lambda: arm(call, k, 1, KILL))


def killed_in(lab: Lab, step: int, prepare: Callable) -> Faults:
    "A save in a process that `prepare()` has made mortal"
    store = lab.fresh() / "checkpoints"
    save_all(store, [1])
    def work() -> int:
        prepare()
        return save_one(store, step)
    ended = forked(lab, work)
    if ended.status not in (SAVED, -signal.SIGKILL): raise Lost(f"status {ended.status}: {ended.exception}")
    newest(store, step if ended.status == SAVED else 1)
    recovers(store)
    if ended.status: yield  # else it was over before


# --- calls that fail

ERRNOS = (errno.EIO, errno.ENOSPC, errno.EINTR, errno.EDQUOT)


@kind("an operation fails", lambda lab: len(events(lab)))
def operation_fails(lab: Lab, case: int, rng: random.Random) -> Faults:
    "One open, mkdir, rename, ... of a save raises"
    (step, n), error = events(lab)[case], rng.choice(ERRNOS)
    def fail(): raise OSError(error, os.strerror(error))
    yield from failing(lab, step, lambda: at_event(n, fail), lambda: 1)


MOST = {"write": 9, "fsync": 7, "rename": 4, "mkdir": 2}  # calls of a save
CALLS = [(call, k) for call in MOST for k in range(1, MOST[call] + 1)]


@kind("calls fail", 4 * len(CALLS), no_shim)
def calls_fail(lab: Lab, case: int, rng: random.Random) -> Faults:
    "The k-th write, fsync, rename or mkdir fails, or writes half; it alone or all from there on"
    (call, k), step = CALLS[case % len(CALLS)], rng.choice([1, 2])
    error = rng.choice([errno.EIO, errno.ENOSPC, errno.EINTR, *[SHORT] * 2 * (call == "write")])
    count = 3 if error == errno.EINTR else rng.choice([1, 10**6])
    yield from failing(lab, step, lambda: arm(call, k, count, error), disarm)


def failing(lab: Lab, step: int, prepare: Callable, hits: Callable[[], int]) -> Faults:
    "A save in a process in which something fails: it says so, or it has saved; nothing else is touched"
    store, told = lab.fresh() / "checkpoints", lab.work / "hits"
    save_all(store, [1])
    def work() -> int:
        prepare()
        try: return save_one(store, step)
        finally: told.write_text(str(hits()))
    ended = forked(lab, work)
    if ended.status not in (SAVED, REFUSED): raise Lost(f"unclear, status {ended.status}: {ended.exception}")
    newest(store, step if ended.status == SAVED else 1)
    recovers(store)
    if int(told.read_text()): yield


@kind("files of limited size", 60)
def file_size(lab: Lab, case: int, rng: random.Random) -> Faults:
    "No file may be larger than so many bytes: a write is cut short, the next one fails"
    store = lab.fresh() / "checkpoints"
    first = rng.random() < 0.2  # then there is nothing older to fall back on
    if not first: save_all(store, [1])
    largest = 16 * 1024 + 100
    limit = rng.randrange(largest)
    def work() -> int:
        with file_limit(limit): return save_one(store, 2)
    ended = forked(lab, work)
    if ended.status != REFUSED: raise Lost(f"limit {limit}: status {ended.status}: {ended.exception}")
    if left := litter(store): raise Lost(f"litter: {left}")
    if not first: newest(store, 1)
    recovers(store)
    yield


# --- disks that fill

@kind("a full disk", 80, no_mount)
def full_disk(lab: Lab, case: int, rng: random.Random) -> Faults:
    "A disk of some hundred kB; half the time the free space is not known beforehand"
    size, blind = rng.randrange(4, 600), rng.random() < 0.5
    yield from on_disk(lab, f"size={size}k", "size=64m", blind)


@kind("no file can be made", 24, no_mount)
def no_inodes(lab: Lab, case: int, rng: random.Random) -> Faults:
    "A disk with room, but not for another file"
    yield from on_disk(lab, f"size=64m,nr_inodes={rng.randrange(2, 40)}", "nr_inodes=1000", True)


def on_disk(lab: Lab, small: str, large: str, blind: bool) -> Faults:
    "Save until it is full, which may be at the first step; then there is room again"
    folder = lab.fresh("disk")
    with disk(folder, small) as resize:
        store = folder / "run" / "checkpoints"
        guess = mock.patch.object(ck, "free_bytes", lambda store: 2**40) if blind else mock.patch.dict({})
        with guess: acknowledged, error = until_full(store)
        if not NEEDS.search(str(error)): raise Lost(f"an unclear error: {error!r}")
        if store.is_dir() and (left := litter(store)): raise Lost(f"litter: {left}")
        if acknowledged: newest(store, acknowledged[-1])
        resize(large)
        recovers(store)
    yield


def until_full(store: Path) -> tuple[list[int], Exception]:
    "Save steps 1, 2, ... -> those acknowledged, and what ended it"
    toy, acknowledged = Toy(), []
    with Saver(store, keep_last=100) as saver:
        for step in range(1, 60):
            try:
                saver.save(toy.at(step))
                saver.wait()
                acknowledged += [s.step for s in saver.finished()]
            except OSError as e:
                return acknowledged, e
    raise Lost(f"the disk is full, and {len(acknowledged)} saves were acknowledged without a word")
