"""Faults by the thousand, and whether all that was promised survived them.

`python tests/faults/campaign.py --scale 0.1`: each kind of fault is a function that injects case i of a seed
and then looks: an acknowledged checkpoint is found bit for bit, the ledger has every sample once, nothing
hangs, nothing is left behind, nothing hostile is run. The last line counts; a fault that was lost gets a
command that repeats it. `--self-test` breaks promises on purpose, to see that the campaign can fail;
torch.save and DCP, hurt in the same ways, show how others fare."""
import os
import random
import sys
import tempfile
from pathlib import Path


def prepare() -> None:
    "Start again with one thread, and with calls that can be made to fail; before torch is there"
    from shim import SHIM, build
    if SHIM in os.environ: return
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "FAULTS_FOLDER": str(folder)}
    os.environ[SHIM] = build(folder)
    if os.path.exists(os.environ[SHIM]): os.environ["LD_PRELOAD"] = os.environ[SHIM]
    os.execv(sys.executable, [sys.executable, *sys.argv])


if __name__ == "__main__": prepare()

import argparse
import contextlib
import io
import re
import shutil
import time
import traceback
from dataclasses import dataclass, field
from functools import partial

import damage  # noqa: F401 - registers its kinds, as the others do
import hostile  # noqa: F401
import store_faults  # noqa: F401
import training_faults
from controls import control
from lab import KINDS, Kind, Lab, Lost, adopt_orphans, end_all, hurry
from sabotage import SABOTAGES, caught

CASE_S = 300.0  # no case takes as long


@dataclass
class Tally:
    "What became of the faults of a kind"
    survived: int = 0
    lost: list[tuple[int, str]] = field(default_factory=list)   # case, what was seen
    seconds: float = 0.0

    @property
    def injected(self) -> int: return self.survived + len(self.lost)


def try_case(lab: Lab, kind: Kind, case: int, seed: int, tally: Tally) -> None:
    "Inject the faults of one case, and count"
    rng, heard = random.Random(f"{seed} {kind.name} {case}"), io.StringIO()
    try:
        with hurry(CASE_S), contextlib.redirect_stderr(heard):
            for _ in kind.run(lab, case, rng): tally.survived += 1
    except Exception as e:  # whatever it is, this fault was not survived
        end_all()
        what = str(e) if isinstance(e, Lost) else traceback.format_exc()
        tally.lost.append((case, what))


def number_of(lab: Lab, kind: Kind) -> int:
    "How many cases a kind has"
    return kind.cases if isinstance(kind.cases, int) else kind.cases(lab)


def chosen(lab: Lab, kind: Kind, scale: float, seed: int) -> list[int]:
    "Which cases of a kind are tried: all at scale 1"
    n = number_of(lab, kind)
    if scale >= 1: return [i for _ in range(round(scale)) for i in range(n)]
    return sorted(random.Random(f"{seed} {kind.name}").sample(range(n), max(1, round(scale * n))))


def run_kind(lab: Lab, kind: Kind, cases: list[int], seed: int) -> Tally:
    "Try `cases` and print the kind's line"
    tally, began = Tally(), time.monotonic()
    for case in cases: try_case(lab, kind, case, seed, tally)
    tally.seconds = time.monotonic() - began
    say(f"{kind.name:30} {tally.injected:5} injected {tally.survived:5} survived {tally.seconds:7.1f} s")
    for case, what in tally.lost:
        say(f"  LOST: {what.strip()}")
        say(f"  repeat: python tests/faults/campaign.py --seed {seed} --only {kind.name!r} --case {case}")
    return tally


def say(line: str) -> None: print(line, flush=True)


def campaign(lab: Lab, kinds: list[Kind], given: argparse.Namespace) -> int:
    "Every kind, then the control -> exit status"
    began, tallies = time.monotonic(), []
    for kind in kinds:
        if why := kind.needs(): say(f"{kind.name:30} skipped: {why}"); continue
        with contextlib.redirect_stderr(io.StringIO()): training_faults.reference(lab)
        cases = [given.case] if given.case is not None else chosen(lab, kind, given.scale, given.seed)
        tallies.append(run_kind(lab, kind, cases, given.seed))
    if not given.only: for_comparison(lab, given)
    injected, survived = (sum(getattr(t, n) for t in tallies) for n in ("injected", "survived"))
    say(f"{injected} faults injected, {survived} survived, {injected - survived} lost, seed {given.seed}, "
        f"{time.monotonic() - began:.0f} s")
    return int(survived < injected or not injected)


def for_comparison(lab: Lab, given: argparse.Namespace) -> None:
    "What becomes of other formats"
    for line in control(lab, given.seed, 100): say(f"control: {line}")


def self_test(lab: Lab, kinds: list[Kind], seed: int) -> int:
    "Break one promise after the other -> exit status: 1 when the campaign did not notice one"
    by_name, unnoticed = {k.name: k for k in kinds}, 0
    training_faults.reference(lab)
    for sabotage in SABOTAGES:
        kind = by_name[sabotage.kind]
        lost = caught(lab, sabotage, partial(first_lost, lab, kind, seed, sabotage.sign))
        end_all()
        unnoticed += lost is None
        what = f"noticed by {kind.name!r}: {lost[:150]}" if lost else "NOT NOTICED"
        say(f"sabotage: {sabotage.name:45} {what}")
    return int(unnoticed > 0)


def first_lost(lab: Lab, kind: Kind, seed: int, sign: str, n: int) -> str | None:
    "What is lost in up to `n` cases of a kind and has `sign` in it"
    number = number_of(lab, kind)
    for case in random.Random(seed).sample(range(number), min(n, number)):
        try_case(lab, kind, case, seed, tally := Tally())
        for _, what in tally.lost:
            if re.search(sign, what): return what.strip().splitlines()[-1]
    return None


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scale", type=float, default=1.0, help="share of the cases that are tried")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="names of kinds, or parts of them, with commas between")
    parser.add_argument("--case", type=int, help="this case alone")
    parser.add_argument("--work", type=Path, help="where to work; /dev/shm, or where temporary files are")
    parser.add_argument("--self-test", action="store_true", help="break promises, and see who notices")
    return parser.parse_args()


def main() -> int:
    given = arguments()
    names = [n.strip() for n in (given.only or "").split(",")]
    kinds = [k for k in KINDS if any(n in k.name for n in names)]
    if not kinds: sys.exit(f"--only {given.only}: there are {', '.join(k.name for k in KINDS)}")
    where = given.work or (Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None)
    lab = Lab(Path(tempfile.mkdtemp(prefix="faults-", dir=where)))
    adopt_orphans()
    try: return self_test(lab, KINDS, given.seed) if given.self_test else campaign(lab, kinds, given)
    finally:
        end_all()
        os.chdir("/")
        shutil.rmtree(lab.work)
        shutil.rmtree(os.environ["FAULTS_FOLDER"], ignore_errors=True)


if __name__ == "__main__": sys.exit(main())
