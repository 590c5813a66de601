"""Can the campaign fail? Each promise is broken on purpose, and the kind of fault that shows it must."""
import os
import pickle
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import training_faults
from lab import Lab, adopt_orphans, fork

from minigpt_wb.ddp import ranks
from minigpt_wb.training import checkpoints as ck
from minigpt_wb.training import ledger, saver, snapshot, trainer
from minigpt_wb.training.saver import Saver


@dataclass(frozen=True)
class Sabotage:
    "A promise that is broken"
    name: str
    kind: str                 # of fault that shows it
    cases: int                # how many of them are tried, at most
    sign: str                 # what is seen then
    patches: Callable[[], list]


def deleted_after_the_word(self: Saver, *args) -> None:
    "An acknowledged save that is gone"
    real_write(self, *args)
    if self.done[-1].step > 1: ck.remove(self.done[-1].path)


def acknowledged_too_soon(self: Saver, snap, began: float, copied: float) -> None:
    "The word comes before the deed"
    self.done.append(saver.Saved(ck.store_of(self.run), snap.step, snap.step, 0, 0.0, 0.0))
    real_write(self, snap, began, copied)
    self.done.pop()


def with_gaps(self: ledger.Ledger, step: int, batches):
    "Every fifth step is not noted"
    return real_noting(self, step, batches) if step % 5 else iter(batches)


def whatever_it_is(text: str):
    "JSON, or else a pickle"
    try: return real_json(text)
    except ValueError: return pickle.loads(text.encode(errors="surrogateescape"))


def careless_text(path: Path) -> str: return path.read_text(errors="surrogateescape")


real_write, real_noting, real_json = Saver.write, ledger.Ledger.noting, snapshot.from_json

SABOTAGES = [
    Sabotage("nothing is verified", "one bit flips", 30, "is used, ",
             lambda: [mock.patch.object(ck, "verify_files", lambda *a: [])]),
    Sabotage("only sizes are verified", "a page is zeroed", 30, "is used, ",
             lambda: [mock.patch.object(ck, "sha256", lambda path: written(path))]),
    Sabotage("an acknowledged save is deleted", "kill -9 in training", 3, "was acknowledged",
             lambda: [mock.patch.object(Saver, "write", deleted_after_the_word)]),
    Sabotage("a save is acknowledged before it is written", "kill -9 while saving", 60, "was acknowledged",
             lambda: [mock.patch.object(Saver, "write", acknowledged_too_soon)]),
    Sabotage("the copy is the model itself", "kill -9 while saving", 30, "is not of step",
             lambda: [mock.patch.object(saver.Buffers, "copy", lambda self, snap: snap)]),
    Sabotage("the ledger has gaps", "kill -9 in training", 3, "were not read",
             lambda: [mock.patch.object(ledger.Ledger, "noting", with_gaps)]),
    Sabotage("dropout depends on the process", "kill -9 in training", 3, "is off by",
             lambda: [mock.patch.object(trainer, "dropout_key", lambda seed, first: first + os.getpid())]),
    Sabotage("ranks outlive their launcher", "kill -9 in training", 6, "outlive",
             lambda: [mock.patch.object(ranks, "die_with", lambda parent: None),
                      mock.patch.object(training_faults, "ORPHAN_S", 0.5)]),  # or they may end by themselves
    Sabotage("a failed save says nothing", "files of limited size", 10, "status 8",
             lambda: [mock.patch.object(Saver, "check", lambda self: None)]),
    Sabotage("litter is left", "kill -9 at each operation", 90, "litter",
             lambda: [mock.patch.object(ck, "sweep", lambda store: None)]),
    Sabotage("pickles are loaded", "hostile files", 300, "was run",
             lambda: [mock.patch.object(ck, "from_json", whatever_it_is),
                      mock.patch.object(ck, "small_text", careless_text)]),
]


def written(path: Path) -> str:
    "The hash that a file was written with, whatever is in it now"
    folder = next(p for p in path.parents if (p / ck.MANIFEST).is_file())
    return ck.read_manifest(folder)[1][str(path.relative_to(folder))][1]


def caught(lab: Lab, sabotage: Sabotage, run_cases: Callable[[int], str | None]) -> str | None:
    # `run_cases`: runs that many cases of the kind, until one is lost -> what was lost
    "What was lost under a sabotage, in a forked process; None when nobody noticed"
    told = lab.work / "caught.txt"
    told.unlink(missing_ok=True)
    def work() -> int:
        adopt_orphans()
        with ExitStack() as stack:
            for patch in sabotage.patches(): stack.enter_context(patch)
            if lost := run_cases(sabotage.cases): told.write_text(lost)
        return 0
    os.waitpid(fork(work, told), 0)
    return told.read_text() if told.exists() else None
