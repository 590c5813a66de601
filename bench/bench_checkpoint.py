"""What a checkpoint costs: training that stands still, slower steps while it is written, verifying and loading it again.

Ours beside torch.save, torch.save with fsync, DCP save and DCP async_save, taking turns in one run on one model that is really trained:
  python bench/bench_checkpoint.py                     # 30 M parameters, 361 MB: the vocabulary of 50,304 words
  python bench/bench_checkpoint.py --shape gpt2        # 124 M parameters, 1.5 GB
stall: until the loop may go on. next: the step that follows, over the median step. during: the mean of the steps while the write is under
way, over the median step. disk: until the bytes are on disk. Ours is fsynced, hashed and verified before an older one goes; of the others only
"+fsync" is fsynced.
"""
import argparse, hashlib, os, shutil, socket, statistics, tempfile, time
from pathlib import Path

import torch

from minigpt_wb.config import RunConfig
from minigpt_wb.model.gpt import build_model
from minigpt_wb.model.objectives import TrainStep, keep_freed_memory
from minigpt_wb.training.checkpoints import Checkpoint, find_checkpoint, publish
from minigpt_wb.training.optim import make_optimizer
from minigpt_wb.training.saver import Saver
from minigpt_wb.training.snapshot import take_snapshot

SHAPES = {"words": dict(n_layer=6, n_head=6, d_model=384, context_length=256, vocab_size=50304), "gpt2":
          dict(n_layer=12, n_head=12, d_model=768, context_length=256, vocab_size=50304)}


class Loop:
    "A model that is trained on one batch again and again"
    def __init__(self, shape: dict, batch: int, dtype: str):
        cfg = RunConfig().override(**shape)
        torch.manual_seed(0)
        self.step_module, self.dtype = TrainStep(build_model(cfg.model)), getattr(torch, dtype)
        self.model = self.step_module.model
        self.optimizer = make_optimizer(self.model, cfg.optim)
        ids = torch.randint(0, shape["vocab_size"], (batch, shape["context_length"] + 1))
        self.tokens, self.targets = ids[:, :-1], ids[:, 1:]

    def step(self) -> float:
        "One optimiser step -> its seconds"
        start = time.perf_counter()
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            loss = self.step_module(self.tokens, self.targets)
        (loss / self.targets.numel()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - start

    def snapshot(self, step: int): return take_snapshot(step, self.model.state_dict(), self.optimizer)


class Ours:
    def __init__(self, loop: Loop, folder: Path):
        self.loop, self.n, self.saver = loop, 0, Saver(folder / "checkpoints", keep_last=1)
        self.saver.reserve(loop.snapshot(0))
        self.saver.wait()

    def save(self):
        self.n += 1
        norms = torch._foreach_norm(list(self.loop.model.parameters()))
        assert torch.stack(norms).isfinite().all()
        self.saver.save(self.loop.snapshot(self.n))

    def busy(self) -> bool: return self.saver.busy
    def wait(self): self.saver.wait(); self.saver.finished()


class TorchSave:
    def __init__(self, loop: Loop, folder: Path, sync: bool):
        self.loop, self.path, self.sync = loop, folder / f"{sync}.pt", sync

    def save(self):
        torch.save({"model": self.loop.model.state_dict(), "optimizer": self.loop.optimizer.state_dict()}, self.path)
        if self.sync:
            with open(self.path, "rb") as f: os.fsync(f.fileno())

    def busy(self) -> bool: return False
    def wait(self): pass


class Dcp:
    def __init__(self, loop: Loop, folder: Path, later: bool):
        self.loop, self.path, self.later, self.future = loop, folder / f"dcp{later}", later, None

    def save(self):
        import torch.distributed.checkpoint as dcp
        shutil.rmtree(self.path, ignore_errors=True)
        state = {"model": self.loop.model.state_dict(),
                 "optimizer": {str(k): v for k, v in self.loop.optimizer.state_dict()["state"].items()}}
        if self.later: self.future = dcp.async_save(state, checkpoint_id=self.path)
        else: dcp.save(state, checkpoint_id=self.path)

    def busy(self) -> bool: return bool(self.future and not self.future.done())
    def wait(self): self.future = self.future.result() and None if self.future else None


def one_save(way, loop: Loop, median: float) -> dict[str, float]:
    "Save once while training goes on"
    os.sync()
    start = time.perf_counter()
    way.save()
    stall, during = time.perf_counter() - start, [loop.step()]
    while way.busy(): during.append(loop.step())
    disk = time.perf_counter() - start
    way.wait()
    return {"stall_s": stall, "stall/step": stall / median, "next": during[0] / median,
            "during": statistics.mean(during) / median, "disk_s": disk}


def read_and_hash(folder: Path) -> float:
    "Seconds to read every file of a folder and hash it, as cheaply as that is done"
    start = time.perf_counter()
    for path in folder.iterdir():
        if path.is_file():
            with open(path, "rb") as f: hashlib.file_digest(f, "sha256")
    return time.perf_counter() - start


def loading(loop: Loop, folder: Path, rounds: int) -> None:
    "Verify and load beside reading and hashing the same bytes"
    path = publish(folder / "load", loop.snapshot(1))
    print(f"\nload: {Checkpoint(path).bytes:,} bytes, from the page cache, {rounds} rounds")
    ratios = []
    for _ in range(rounds):
        base, start = read_and_hash(path), time.perf_counter()
        find_checkpoint(path)
        verified = time.perf_counter() - start
        Checkpoint(path).restore(loop.model, loop.optimizer)
        total = time.perf_counter() - start
        ratios.append(total / base)
        print(f"  read and hash {base:.2f} s, ours verified after {verified:.2f} s, loaded after {total:.2f} s: {total / base:.2f}x")
    print(f"  ratio, median [min..max]: {statistics.median(ratios):.2f} [{min(ratios):.2f}..{max(ratios):.2f}]")


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--shape", choices=SHAPES, default="words")
    ap.add_argument("--batch", type=int, default=4)
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--dtype", default="float32")
    ap.add_argument("--rounds", type=int, default=3)
    ap.add_argument("--dir", help="a folder on the disk to measure")
    a = ap.parse_args()
    torch.set_num_threads(a.threads)
    keep_freed_memory()
    folder = Path(tempfile.mkdtemp(prefix="bench-checkpoint-", dir=a.dir))
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    try:
        loop = Loop(SHAPES[a.shape], a.batch, a.dtype)
        for _ in range(3): loop.step()
        ways = {"ours": Ours(loop, folder), "torch.save": TorchSave(loop, folder, False),
                "torch.save+fsync": TorchSave(loop, folder, True), "dcp.save": Dcp(loop, folder, False),
                "dcp.async_save": Dcp(loop, folder, True)}
        found = {name: [] for name in ways}
        for i in range(a.rounds + 1):   # the first round warms buffers up, and is not counted
            for name, way in ways.items():
                median = statistics.median(loop.step() for _ in range(5))
                row = one_save(way, loop, median) | {"step_s": median}
                if i: found[name].append(row)
        print(f"{loop.snapshot(0).bytes:,} bytes of state, {a.threads} threads, {a.rounds} rounds; medians [min..max]")
        for name, rows in found.items():
            cells = (f"{k} {statistics.median(v):.3f} [{min(v):.3f}..{max(v):.3f}]" for k in rows[0] for v in [[r[k] for r in rows]])
            print(f"{name:>17}: {'  '.join(cells)}")
        loading(loop, folder, a.rounds)
    finally:
        torch.distributed.destroy_process_group()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__": main()
