"""The negative control: the same flipped bits and cuts in files of torch.save and DCP."""
import logging
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from damage import cut, flip
from lab import Lab
from training_faults import STEPS, reference

Load = Callable[[Path], dict]


def torch_save(tensors: dict, folder: Path) -> Load:
    "One file, read as its own documentation says"
    torch.save(tensors, folder / "checkpoint.pt")
    return lambda folder: torch.load(folder / "checkpoint.pt", weights_only=True)


def dcp(tensors: dict, folder: Path) -> Load:
    "torch.distributed.checkpoint"
    import torch.distributed.checkpoint as dcp
    with warnings.catch_warnings(action="ignore"): dcp.save(tensors, checkpoint_id=folder, no_dist=True)
    def load(folder: Path) -> dict:
        found = {n: torch.empty_like(t) for n, t in tensors.items()}
        dcp.load(found, checkpoint_id=folder, no_dist=True)
        return found
    return load


CONTROLS = {"torch.save": torch_save, "torch.distributed.checkpoint": dcp}


def silent(tensors: dict, folder: Path, load: Load, how: Callable, rng: random.Random) -> tuple[bool, bool]:
    "Hurt one of the files, more likely a large one: (it loads without a word, and as other numbers)"
    files = sorted(p for p in folder.iterdir() if p.stat().st_size)
    path = rng.choices(files, [p.stat().st_size for p in files])[0]
    before = path.read_bytes()
    path.write_bytes(how(before, rng))
    try: found = load(folder)
    except BaseException as e:  # DCP's own errors are no Exception
        if isinstance(e, KeyboardInterrupt): raise
        return False, False
    finally: path.write_bytes(before)
    return True, any(not torch.equal(t.nan_to_num(), found[n].nan_to_num()) for n, t in tensors.items())


def control(lab: Lab, seed: int, n: int) -> list[str]:
    "A line for each other format and each way to hurt it"
    logging.disable(logging.ERROR)  # DCP writes tracebacks
    weights, moments = reference(lab)[STEPS]
    tensors, lines = {k: t.clone() for k, t in (weights | moments).items()}, []
    for name, save in CONTROLS.items():
        folder = lab.fresh("control")
        load = save(tensors, folder)
        for what, how in (("flips", flip), ("cuts", cut)):
            rng = random.Random(f"{seed} {name} {what}")
            with warnings.catch_warnings(action="ignore"):
                found = [silent(tensors, folder, load, how, rng) for _ in range(n)]
            loaded, other = (sum(column) for column in zip(*found))
            lines.append(f"{name}: {loaded} of {n} {what} loaded without a word, {other} of them as others")
        shutil.rmtree(folder)
    return lines
