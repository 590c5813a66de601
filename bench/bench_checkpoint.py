"""What a checkpoint costs: training that stands still, slower steps while it is written, verifying, loading.

Ours beside torch.save, torch.save with fsync, DCP save and DCP async_save, taking turns in one run on one
model that is really trained:

    python bench/bench_checkpoint.py                 # 30 M parameters, 361 MB: a vocabulary of 50,304 words
    python bench/bench_checkpoint.py --shape gpt2    # 124 M parameters, 1.5 GB
    python bench/bench_checkpoint.py --only program  # start with and without resume, signals, a killed rank

stall: until the loop may go on. next: the step that follows, over the median step. during: the mean of the
steps while the write is under way, over the median step. disk: until the bytes are on disk. Ours is fsynced,
hashed and read back before an older one goes; of the others only "+fsync" is fsynced.
"""
import argparse, hashlib, os, shutil, signal, socket, statistics, subprocess, sys, tempfile, time
from pathlib import Path

import torch

from minigpt_wb.config import RunConfig
from minigpt_wb.run import Run
from minigpt_wb.model.gpt import build_model
from minigpt_wb.model.objectives import TrainStep, keep_freed_memory
from minigpt_wb.training.checkpoints import Checkpoint, find_checkpoint, publish
from minigpt_wb.training.optim import make_optimizer
from minigpt_wb.training.saver import Saver
from minigpt_wb.training.snapshot import take_snapshot

SHAPES = {"words": dict(n_layer=6, n_head=6, d_model=384, context_length=256, vocab_size=50304),
          "gpt2": dict(n_layer=12, n_head=12, d_model=768, context_length=256, vocab_size=50304)}


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
        parts = {"model": self.loop.model, "optimizer": self.loop.optimizer}
        torch.save({name: part.state_dict() for name, part in parts.items()}, self.path)
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
        print(f"  read and hash {base:.2f} s; ours verified {verified:.2f} s, loaded {total:.2f} s, "
              f"{ratios[-1]:.2f}x")
    print(f"  ratio, median [min..max]: {spread(ratios)}")


def spread(values: list[float], form: str = ".3f") -> str:
    low, mid, high = (format(f(values), form) for f in (min, statistics.median, max))
    return f"{mid} [{low}..{high}]"


# --- the program as a user starts it

def program(folder: Path, *words: object) -> subprocess.Popen:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "minigpt_wb.train", *map(str, words)], cwd=folder, env=env,
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def until(condition, limit_s: float = 120.0) -> float:
    "Seconds until `condition()` holds"
    start = time.perf_counter()
    while not condition():
        if time.perf_counter() - start > limit_s: raise TimeoutError("it did not happen")
        time.sleep(0.002)
    return time.perf_counter() - start


def trained(run: Run, offset: int = 0) -> bool:
    "Has the run reported a step beyond byte `offset` of its rows?"
    return any(row["kind"] == "train" for row in run.follow(offset)[0])


def kill(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def starts(folder: Path, shape: dict, rounds: int) -> None:
    "From the command to the first step, from nothing and from a checkpoint, in turns"
    sizes = [w for n, v in shape.items() for w in (f"--{n.replace('_', '-')}", v)]
    fixed = ["--preset", "debug", "--log-level", "info", "--data", "stdlib", "--val-fraction", 0, *sizes,
             "--batch-size", 1, "--save-every", 2, "--tensorboard", "False", "--max-steps", 10**6]
    runs = [Run(folder / f"runs/start{i}") for i in range(rounds + 1)]   # the first fills the token cache
    fresh, resumed = [], []
    for run in runs:
        process = program(folder, *fixed, "--run-name", run.name)
        fresh.append(until(lambda run=run: trained(run)))
        until(lambda run=run: run.rows("save"))
        kill(process)
        offset = (run.path / "metrics.jsonl").stat().st_size
        process = program(folder, "--resume", run.name)
        resumed.append(until(lambda run=run, offset=offset: trained(run, offset)))
        kill(process)
    size = max(row["bytes"] for row in run.rows("save"))
    more = [r - f for f, r in zip(fresh[1:], resumed[1:])]
    print(f"from the command to the first step, {size:,} bytes: fresh {spread(fresh[1:], '.2f')} s, resumed "
          f"{spread(resumed[1:], '.2f')} s; a resume adds {spread(more, '.2f')} s")


def signals(folder: Path, rounds: int) -> None:
    "Two ranks: from SIGTERM to the checkpoint on disk; from kill -9 of a rank to its name in status.json"
    fixed = ["--preset", "tiny", "--gpus", 2, "--max-steps", 10**6, "--eval-every", 0, "--sample-every", 0,
             "--log-every", 1]
    saved, seen, steps = [], [], []
    for i in range(rounds):
        for dead in (False, True):
            run = Run(folder / f"runs/s{i}{dead}")
            process = program(folder, *fixed, "--run-name", run.name)
            until(lambda run=run: len(run.rows("train")) > 5)
            steps.append(run.rows("train")[-1]["step_s"])
            if dead:
                os.kill(run.heartbeats()[1]["pid"], signal.SIGKILL)
                seen.append(until(lambda run=run: run.stored_status()["state"] == "failed"))
                assert run.status["failed_rank"] == 1
            else:
                process.send_signal(signal.SIGTERM)
                saved.append(until(lambda run=run: list(run.checkpoints_dir.glob("step_*"))))
            process.wait()
    print(f"2 ranks, a step of {spread(steps)} s: SIGTERM to the launcher until the checkpoint is on disk "
          f"{spread(saved)} s; kill -9 of a rank until status.json names it {spread(seen)} s")


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--shape", choices=SHAPES, default="words")
    ap.add_argument("--batch", type=int, default=4)
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--dtype", default="float32")
    ap.add_argument("--rounds", type=int, default=3)
    ap.add_argument("--only", choices=("loop", "program"))
    ap.add_argument("--dir", help="a folder on the disk to measure")
    a = ap.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-checkpoint-", dir=a.dir))
    try:
        if a.only != "program": in_a_loop(a, folder)
        if a.only != "loop":
            starts(folder, SHAPES[a.shape], a.rounds)
            signals(folder, a.rounds)
    finally: shutil.rmtree(folder, ignore_errors=True)


def in_a_loop(a: argparse.Namespace, folder: Path) -> None:
    "Every way of saving, in turns; then loading"
    torch.set_num_threads(a.threads)
    keep_freed_memory()
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
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
    size = loop.snapshot(0).bytes
    print(f"{size:,} bytes of state, {a.threads} threads, {a.rounds} rounds; medians [min..max]")
    for name, rows in found.items():
        print(f"{name:>17}: {'  '.join(f'{k} {spread([r[k] for r in rows])}' for k in rows[0])}")
    loading(loop, folder, a.rounds)
    torch.distributed.destroy_process_group()


if __name__ == "__main__": main()
