"""Checkpoints that were cut, changed, swapped, renamed or replaced on the disk."""
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from lab import LIMIT_S, Faults, Lab, Lost, forked, kind, wait_for
from training_faults import LEG_S, STEPS, check_finished, reference, start, tensors

from minigpt_wb.training import checkpoints as ck
from minigpt_wb.run import Run
from minigpt_wb.training.checkpoints import Checkpoint, find_checkpoint, list_checkpoints, save_checkpoint

LAST = [STEPS - 2, STEPS - 1, STEPS]
GARBAGE = [b"", b"\xff" * 100, b"step_0000009999\n", b"../../../etc/passwd", b"step_" + b"9" * 4000,
           b"\0" * 10**6, b"step_0000000001/../step_0000000002\n", b"latest\n", b"-1\n", b"[" * 10**5]


def three_steps(lab: Lab) -> Path:
    "A store with the last three checkpoints of a real training, of our own"
    reference(lab)
    store = lab.fresh() / "run" / "checkpoints"
    for name in map(ck.step_name, LAST):
        shutil.copytree(lab.work / "reference2/story/checkpoints" / name, store / name)
    for name in ("latest", "best"): (store / name).write_text(ck.step_name(STEPS) + "\n")
    (store.parent / "config.yaml").touch()  # a run, by its looks
    return store


def files_of(store: Path) -> list[str]:
    "Every file of the newest checkpoint"
    return sorted(ck.regular_files(store / ck.step_name(STEPS)))


def same(a: tuple[dict, dict], b: tuple[dict, dict]) -> bool:
    "Whether weights and moments are equal to the last bit"
    return all(x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x) for x, y in zip(a, b))


def falls_back(lab: Lab, store: Path, expected: int, bad: list[Path]) -> None:
    "The newest intact step is `expected`, with its own weights; what is wrong with the others is said"
    found = find_checkpoint(store.parent / "")
    if found.step != expected: raise Lost(f"step {found.step} is used, {expected} is the newest intact one")
    if not same(tensors(found), reference(lab)[expected]): raise Lost(f"{found} is not what was saved")
    for path in bad:
        if not Checkpoint(path).verify(): raise Lost(f"{path.name} is damaged, and verifies")


# --- bits and bytes; these three are tried on other formats as well

def flip(data: bytes, rng: random.Random) -> bytes:
    "One bit is another"
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1:]


def cut(data: bytes, rng: random.Random) -> bytes: return data[:rng.randrange(len(data))]


def zero(data: bytes, rng: random.Random) -> bytes:
    "A page, or what there is of it, is zero, and was not before"
    pages = [at for at in range(0, len(data), 4096) if data[at:at + 4096].strip(b"\0")]
    at = rng.choice(pages)
    return data[:at] + bytes(len(data[at:at + 4096])) + data[at + 4096:]


def hurt_newest(lab: Lab, name_at: int, how: Callable, rng: random.Random) -> Faults:
    "Change a file of the newest step"
    store = three_steps(lab)
    newest = store / ck.step_name(STEPS)
    path = newest / (names := files_of(store))[name_at % len(names)]
    before = path.read_bytes()
    path.write_bytes(after := how(before, rng))
    assert after != before
    falls_back(lab, store, STEPS - 1, [newest])
    yield


@kind("one bit flips", 180)
def bit_flips(lab: Lab, case: int, rng: random.Random) -> Faults:
    "In each file in turn"
    yield from hurt_newest(lab, case, flip, rng)


@kind("a file is cut short", 90)
def truncation(lab: Lab, case: int, rng: random.Random) -> Faults:
    "At any byte, all of it included"
    yield from hurt_newest(lab, case, cut, rng)


@kind("a page is zeroed", 60)
def zero_page(lab: Lab, case: int, rng: random.Random) -> Faults:
    "As after a crash of some file systems"
    yield from hurt_newest(lab, case, zero, rng)


@kind("damage, then a resume", 8)
def resume_from_damage(lab: Lab, case: int, rng: random.Random) -> Faults:
    "Some of the newest checkpoints of a run are hurt: it goes on from the newest intact one, to the same end"
    reference(lab)
    run = Run(shutil.copytree(lab.work / "reference2/story", lab.fresh("runs") / "story"))
    first = rng.randrange(STEPS // 2, STEPS)
    for c in list_checkpoints(run):
        if c.step < first: continue
        path, how = c.path / rng.choice(sorted(ck.regular_files(c.path))), rng.choice([flip, cut, zero])
        path.write_bytes(how(path.read_bytes(), rng))
    leg = start(lab, run.path.parent, 2, True)
    wait_for(leg.ended, LEG_S, "the end of the resumed run")
    if leg.said.exists(): raise Lost(f"it does not resume: {leg.said.read_text()[-500:]}")
    [row] = run.rows("resume")
    if row["step"] != first - 1: raise Lost(f"it went on from step {row['step']}, not {first - 1}")
    check_finished(lab, run, True)
    yield


# --- files in the wrong place

@kind("files go astray", 48)
def astray(lab: Lab, case: int, rng: random.Random) -> Faults:
    "Deleted, swapped between two steps, taken from an older one, or there are more than were written"
    store = three_steps(lab)
    newest, older = (store / ck.step_name(s) for s in (STEPS, STEPS - 1))
    name, what = (names := files_of(store))[case % len(names)], case // len(names) % 4
    expected, bad, file = STEPS - 1, [newest], newest / name
    if what == 0: file.unlink()
    elif what == 1:
        if file.read_bytes() == (older / name).read_bytes(): return  # the tokenizer is the same in both
        for a, b in ((file, "x"), (older / name, file), ("x", older / name)):
            os.rename(*(store / p if p == "x" else p for p in (a, b)))
        expected, bad = STEPS - 2, [newest, older]
    elif what == 2:
        if file.read_bytes() == (older / name).read_bytes(): return
        shutil.copy(older / name, file)
    else: shutil.copy(file, file.with_name("more.json"))
    falls_back(lab, store, expected, bad)
    yield


@kind("a step is renamed", 12)
def renamed(lab: Lab, case: int, rng: random.Random) -> Faults:
    "A folder, or a copy of it, says another step; or it is a link"
    store = three_steps(lab)
    source, other = (store / ck.step_name(s) for s in (rng.choice(LAST), STEPS + rng.randrange(1, 10**9)))
    if case % 3 == 0: source.rename(other)
    elif case % 3 == 1: shutil.copytree(source, other)
    else:
        source.rename(store.parent / "elsewhere")
        source.symlink_to(store.parent / "elsewhere"); other = source
    gone = source.is_symlink() or not source.exists()
    falls_back(lab, store, max(s for s in LAST if not gone or store / ck.step_name(s) != source), [other])
    yield


# --- things that are no files

STRANGE = {
    "FIFO": lambda path, aside: os.mkfifo(path),
    "folder": lambda path, aside: path.mkdir(),
    "link to itself": lambda path, aside: path.symlink_to(path),
    "link to its old self": lambda path, aside: path.symlink_to(aside),
    "link to nowhere": lambda path, aside: path.symlink_to("/nowhere/at all"),
    "link to an endless file": lambda path, aside: path.symlink_to("/dev/zero"),
}
HINTS = ["latest", "best"]


def strange_cases(lab: Lab) -> list[tuple[str, str]]:
    "(name of a file or hint, what is in its place)"
    return [(n, s) for n in [*lab.once("names", lambda: files_of(three_steps(lab))), *HINTS] for s in STRANGE]


@kind("no file but a pipe or a link", lambda lab: len(strange_cases(lab)))
def strange(lab: Lab, case: int, rng: random.Random) -> Faults:
    "In place of each file: nothing hangs, no link is followed, the step before is used, saving goes on"
    store = three_steps(lab)
    name, what = strange_cases(lab)[case]
    newest = store / ck.step_name(STEPS)
    path, aside = store / name if name in HINTS else newest / name, store.parent / "aside"
    path.rename(aside)
    STRANGE[what](path, aside)
    def work() -> None:
        if name in HINTS: falls_back(lab, store, STEPS, [])
        else: falls_back(lab, store, STEPS - 1, [newest])
        repr(list_checkpoints(store).best)
        save_checkpoint(store, STEPS + 1, {"w": torch.ones(3)}, state={"val_loss": 1.0})
        ck.prune(store, 3)
        if list_checkpoints(store).best.step != STEPS + 1: raise Lost("the best is not the one with a loss")
    ended = forked(lab, work, LIMIT_S)
    if ended.status: raise Lost(f"{what} in place of {name}: {ended.exception or ended}")
    yield


@kind("hints are garbage", 2 * len(GARBAGE))
def hints(lab: Lab, case: int, rng: random.Random) -> Faults:
    "`latest` and `best` say anything: they are not believed"
    store = three_steps(lab)
    (store / HINTS[case % 2]).write_bytes(GARBAGE[case // 2])
    falls_back(lab, store, STEPS, [])
    if (best := list_checkpoints(store).best) and best.step not in LAST: raise Lost(f"the best is {best}")
    save_checkpoint(store, STEPS + 1, {"w": torch.ones(3)})
    said = (store / "latest").read_text().strip()
    if said != ck.step_name(STEPS + 1): raise Lost(f"the next save leaves the hint at {said[:99]}")
    yield
