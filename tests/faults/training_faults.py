"""Real trainings on many ranks: killed at any moment, on full disks, with calls that fail; then resumed."""
import errno
import multiprocessing
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from conftest import BIN, TINY, flags
from lab import Faults, Lab, Lost, descendants, disk, fork, kind, no_mount, wait_for
from lab import litter as litter_in
from shim import arm, no_shim
from store_faults import NEEDS

from minigpt_wb import run as runs
from minigpt_wb import train
from minigpt_wb.config import RunConfig
from minigpt_wb.ddp import ranks
from minigpt_wb.ddp.ranks import rank_main
from minigpt_wb.run import Run
from minigpt_wb.training.checkpoints import Checkpoint, find_checkpoint, list_checkpoints
from minigpt_wb.training.ledger import samples_read
from minigpt_wb.training.listing import diff_weights

STEPS, BATCH = 24, 5  # of 5 samples two ranks read 2 and 3, three ranks 2, 2 and 1
SETTINGS = TINY | dict(val_fraction=0.0, global_batch_size=BATCH, max_steps=STEPS, dropout=0.1, ledger=True,
                       dtype="float32", device="cpu", max_new_tokens=1, sample_every=0, save_every=1,
                       keep_last=3, log_every=1)
LEG_S = 90.0          # a start, some steps and an end, on a busy machine
ORPHAN_S = 5.0        # how long a process may outlive its run
NEAR = 1e-4           # relative L2 distance, where the number of ranks has changed


# --- ranks forked from this process, which has imported torch, under the real launcher

FAULTY: dict[int, tuple] = {}  # rank -> what to arm in it


def live(parent: int, rank: int, *rest) -> None:
    "The whole life of a forked rank"
    if rank in FAULTY: arm(*FAULTY[rank])
    rank_main(parent, rank, *rest)


def warm(lab: Lab) -> RunConfig:
    "Import what ranks import, make their text, work in a folder of our own -> the config of every training"
    def make() -> RunConfig:
        import torch._dynamo  # optimisers load it
        import torch.multiprocessing
        os.chdir(lab.work)
        torch.multiprocessing.get_context = lambda method: multiprocessing.get_context("fork")
        ranks.rank_main = live
        runs.packages = lambda: ""  # listing them takes half a second of every start
        settings = dict(SETTINGS)
        cfg = RunConfig.preset(settings.pop("preset")).override(**settings)
        train.ready(cfg, progress=False)
        return cfg
    return lab.once("config", make)


@dataclass
class Leg:
    "One start of a run, in a process of its own"
    pid: int
    said: Path   # why it failed

    def ended(self) -> bool:
        "Whether it is gone; reaps it"
        if not self.pid: return True
        if not os.waitpid(self.pid, os.WNOHANG)[0]: return False
        self.pid = 0
        return True


def start(lab: Lab, folder: Path, world: int, resume: bool, **settings) -> Leg:
    "Start the run `folder`/story, or go on with it, in a forked process that waits for its ranks"
    cfg, said = warm(lab), lab.work / "why.txt"
    said.unlink(missing_ok=True)
    def work() -> int:
        what = dict(cfg=cfg, runs_dir=folder, run_name="story")
        if resume: what = dict(resume=Run(folder / "story"))
        try: train.launch(gpus=world, progress=False, **what, **settings).wait(poll_s=0.02, progress=False)
        except (train.RunFailed, ValueError) as e:
            said.write_text(f"{type(e).__name__}: {e}")
            return 1
        return 0
    return Leg(fork(work, lab.work / "traceback.txt"), said)


def start_program(lab: Lab, folder: Path, world: int, resume: bool, **settings) -> subprocess.Popen:
    "The same by `minigpt train`"
    warm(lab)
    where = ["--runs-dir", folder, *(["--resume", "story"] if resume else ["--run-name", "story"])]
    words = flags(**settings) if resume else flags(**SETTINGS | settings)
    env = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    with open(lab.work / "why.txt", "w") as why:
        return subprocess.Popen([BIN / "minigpt", "train", "--gpus", str(world), *where, *words], env=env,
                                cwd=lab.work, stdout=subprocess.DEVNULL, stderr=why, start_new_session=True)


# --- what is right

def reference(lab: Lab, world: int = 2) -> dict[int, tuple[dict, dict]]:
    "(weights, moments) after every step of a run that nothing happens to"
    def make() -> dict:
        folder = lab.fresh(f"reference{world}")
        leg = start(lab, folder, world, False, keep_last=STEPS)
        wait_for(leg.ended, LEG_S, "the reference run")
        run = Run(folder / "story")
        if run.state != "finished": raise Lost(f"the reference run: {run.state}: {run.error}")
        return {c.step: tensors(c) for c in list_checkpoints(run)}
    return lab.once(("reference", world), make)


def tensors(c: Checkpoint) -> tuple[dict, dict]:
    "Weights and moments of a checkpoint, by name"
    moments = {f"{key}.{n}": v for n, keys in c.load_optimizer().items() for key, v in keys.items()}
    return c.load_model(), moments


def check_checkpoint(lab: Lab, c: Checkpoint, exact: bool) -> None:
    "Lost when a checkpoint is not what the run that nothing happened to had at its step"
    for right, found in zip(reference(lab)[c.step], tensors(c)):
        difference = diff_weights(right, found)
        distance = difference.total["relative"]
        if any(difference.only) or distance > (0 if exact else NEAR) or (exact and not difference.equal):
            raise Lost(f"{c.path.name} is off by {distance:.3g}; {difference.rows[0]['name']} first")


def check_run(lab: Lab, run: Run, exact: bool) -> int | None:
    "Newest acknowledged checkpoint and the ledger up to it -> the newest step; None before the first"
    acknowledged = max((row["step"] for row in run.rows("save")), default=0)
    if not list_checkpoints(run) and not acknowledged: return None
    try: c = find_checkpoint(run)
    except ValueError as e: raise Lost(f"step {acknowledged} was acknowledged: {e}") from None
    if c.step < acknowledged: raise Lost(f"step {acknowledged} was acknowledged, the newest is {c.step}")
    check_checkpoint(lab, c, exact)
    try: read = samples_read(run, steps=c.step)
    except ValueError as e: raise Lost(f"ledger up to step {c.step}: {e}") from None
    if not read == c.state["samples"] == c.step * BATCH: raise Lost(f"step {c.step}: {read} samples in it")
    return c.step


def check_finished(lab: Lab, run: Run, exact: bool) -> None:
    "The run has come to its end, and nothing tells that anything ever happened to it"
    if run.state != "finished": raise Lost(f"it should have finished: {run.state}: {run.error}")
    if (step := check_run(lab, run, exact)) != STEPS: raise Lost(f"it finished at step {step}")
    if (read := samples_read(run)) != STEPS * BATCH: raise Lost(f"{read} samples in a finished run's ledger")
    if left := litter_in(run.checkpoints_dir): raise Lost(f"litter in a finished run: {left}")


def no_orphans(known: Sequence[int]) -> None:
    "Every process of a run is gone soon, with all its threads"
    def gone() -> bool:
        found = {*known, *descendants(os.getpid())}
        for pid in found:
            try: os.waitpid(pid, os.WNOHANG)
            except ChildProcessError: continue  # its parent reaps it
        return not any(Path(f"/proc/{pid}").exists() for pid in found)
    wait_for(gone, ORPHAN_S, "the end of the run's processes: they outlive it", 0.01)


# --- moments and victims

def rows_of(run: Run) -> int: return len([r for r in run.follow()[0] if r.get("kind") == "train"])


MOMENTS = "start", "step", "step", "save", "save"


def some_moment(run: Run, rng: random.Random, ended: Callable, moments: Sequence[str] = MOMENTS) -> None:
    "Wait for a random moment: while it starts, in a step, or while a checkpoint is being written"
    what, rows, more, delay = rng.choice(moments), rows_of(run), rng.randrange(1, 5), rng.random()
    if what == "start": time.sleep(delay); return
    wait_for(lambda: rows_of(run) >= rows + more or ended(), LEG_S, f"row {rows + more} of the training")
    if what == "step": time.sleep(delay * 0.06); return
    written = lambda: any(run.checkpoints_dir.glob(".tmp-*")) or ended()
    wait_for(written, LEG_S, "a checkpoint on its way", 0.0003)
    time.sleep(delay * 0.008)


def strike(launcher: int, run: Run, rng: random.Random) -> list[int]:
    "SIGKILL to one rank, to the launcher, or to all -> the pids of every process that there was"
    below = descendants(launcher)
    main = [p for p in (int(b["pid"]) for b in run.heartbeats().values()) if p in below] or below
    whom = rng.choice(["a rank", "the launcher", "all"])
    victims = {"a rank": [rng.choice(main)] if main else [launcher], "the launcher": [launcher],
               "all": rng.sample([launcher, *below], 1 + len(below))}[whom]
    for pid in victims:
        try: os.kill(pid, signal.SIGKILL)
        except ProcessLookupError: continue
    return [launcher, *below]


# --- the kinds

@kind("kill -9 in training", 48)
def kill_training(lab: Lab, case: int, rng: random.Random) -> Faults:
    "A run on 2 ranks, or on 1 to 3 as it comes, killed up to four times, then left alone"
    reference(lab)
    folder, fixed, exact, known = lab.fresh("runs"), rng.random() < 0.6, True, False
    run = Run(folder / "story")
    for kill in [*range(rng.randrange(3, 5)), None]:
        if not known: folder, exact = lab.fresh("runs"), True  # there is nothing to go on from
        world = 2 if fixed else rng.choice([1, 2, 3])
        exact = exact and world == 2
        leg = start(lab, folder, world, known, save_every=rng.choice([1, 2]))
        if kill is None: break
        some_moment(run, rng, leg.ended)
        if leg.ended(): break  # too late
        pids = strike(leg.pid, run, rng)
        wait_for(leg.ended, ORPHAN_S, "the end of the launcher")
        no_orphans(pids)
        if run.path.exists():
            known = check_run(lab, run, exact) is not None
            if run.state not in ("failed", "finished"): raise Lost(f"a run that was killed is {run.state}")
        yield
    wait_for(leg.ended, LEG_S, "the end of the last start")
    if leg.said.exists(): raise Lost(f"it does not resume: {leg.said.read_text()[-500:]}")
    check_finished(lab, run, exact)


@kind("kill -9 of minigpt train", 8)
def kill_program(lab: Lab, case: int, rng: random.Random) -> Faults:
    "The same with programs as a user starts them; every other time the program resumes as well"
    reference(lab)
    folder = lab.fresh("runs")
    run, program = Run(folder / "story"), start_program(lab, folder, 2, False)
    ended = lambda: program.poll() is not None
    wait_for(lambda: run.path.exists() or ended(), LEG_S, "a run")
    some_moment(run, rng, ended, MOMENTS[1:])
    pids = strike(program.pid, run, rng)
    wait_for(ended, ORPHAN_S, "the end of minigpt")
    no_orphans(pids)
    known = check_run(lab, run, True) is not None
    if run.state != "failed": raise Lost(f"a run that was killed is {run.state}")
    if case % 2:
        program = start_program(lab, folder if known else lab.fresh("runs"), 2, known)
        wait_for(ended, LEG_S, "the end of minigpt")
        if program.returncode: raise Lost(f"it does not resume: {(lab.work / 'why.txt').read_text()[-500:]}")
    else:
        leg = start(lab, folder if known else lab.fresh("runs"), 2, known)
        wait_for(leg.ended, LEG_S, "the end of the last start")
    check_finished(lab, run, True)
    yield


def failed_clearly(leg: Leg, words: str) -> str:
    "Why a start failed; Lost when that is none of `words`"
    wait_for(leg.ended, LEG_S, "the end of a training that cannot go on")
    why = leg.said.read_text() if leg.said.exists() else "nothing was said"
    if not re.search(words, why): raise Lost(f"an unclear error: {why[-600:]}")
    return why


def resumed(lab: Lab, run: Run) -> None:
    "A run that failed goes on to its end, or starts anew when it had no checkpoint yet"
    no_orphans([])
    known = check_run(lab, run, True) is not None
    folder = run.path.parent if known else lab.fresh("again")
    leg = start(lab, folder, 2, known, keep_last=3)
    wait_for(leg.ended, LEG_S, "the end of the resumed run")
    if leg.said.exists(): raise Lost(f"it does not resume: {leg.said.read_text()[-500:]}")
    check_finished(lab, Run(folder / "story"), True)


@kind("training on a full disk", 8, no_mount)
def training_on_a_full_disk(lab: Lab, case: int, rng: random.Random) -> Faults:
    "The run's disk fills with its checkpoints: the error names bytes, and it goes on once there is room"
    reference(lab)
    folder = lab.fresh("disk")
    with disk(folder, f"size={rng.randrange(300, 3500)}k") as resize:
        leg = start(lab, folder, 2, False, keep_last=STEPS)
        failed_clearly(leg, NEEDS.pattern)
        run = Run(folder / "story")
        if not NEEDS.search(run.error or ""): raise Lost(f"status.json does not say it: {run.error}")
        resize("size=64m")
        resumed(lab, run)
    yield


@kind("somebody else fills the disk", 8, no_mount)
def somebody_fills_the_disk(lab: Lab, case: int, rng: random.Random) -> Faults:
    "To the last byte, in the middle of a training: it says so all the same, and goes on once there is room"
    reference(lab)
    folder = lab.fresh("disk")
    with disk(folder, "size=16m"):
        leg, run, hog = start(lab, folder, 2, False), Run(folder / "story"), folder / "hog"
        wait_for(lambda: run.path.exists() and rows_of(run) >= 1 or leg.ended(), LEG_S, "a step")
        some_moment(run, rng, leg.ended)
        fill(hog)
        wait_for(leg.ended, LEG_S, "the end of a training that cannot go on")
        hog.unlink()
        if run.state != "finished":
            failed_clearly(leg, "No space left on device|no room for a whole line|could not be saved")
            resumed(lab, run)
            yield


def fill(hog: Path) -> None:
    "Take every byte of a disk"
    with open(hog, "wb", buffering=0) as f:
        try:
            while True: f.write(bytes(4096))
        except OSError as e:
            if e.errno != errno.ENOSPC: raise


@kind("calls fail in training", 24, no_shim)
def calls_fail_in_training(lab: Lab, case: int, rng: random.Random) -> Faults:
    "In one rank the k-th write, fsync, rename or mkdir fails, once or from there on"
    reference(lab)
    call = rng.choice(["write", "write", "fsync", "rename", "mkdir"])
    k = rng.randrange(1, {"write": 200, "fsync": 60, "rename": 40, "mkdir": 20}[call])
    error, count = rng.choice([errno.EIO, errno.ENOSPC, errno.EDQUOT]), rng.choice([1, 3, 10**6])
    folder = lab.fresh("runs")
    FAULTY[rng.choice([0, 0, 0, 1])] = call, k, count, error
    try: leg = start(lab, folder, 2, False)
    finally: FAULTY.clear()
    wait_for(leg.ended, LEG_S, "the end of a training in which calls fail")
    run = Run(folder / "story")
    if run.state == "finished": check_finished(lab, run, True)
    else:
        failed_clearly(leg, rf"could not be saved|\[Errno {error}\]|no room for a whole line")
        resumed(lab, run)
    yield
