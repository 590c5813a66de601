"""The small character model of nanoGPT's README, by ours and by its own train.py: validation loss, CPU time.

    python bench/bench_shakespeare.py --data tinyshakespeare.txt --peer PATH/TO/nanoGPT

Both train 4 layers, 4 heads, 128 wide, context 64, batch 12, 2000 steps, learning rate 1e-3 to 1e-4 with
warmup 100, betas 0.9 and 0.99, no dropout, on the first 90 % of the text, one thread, no evaluation on the
way. Turns alternate: ours, peer; peer, ours; ... Both are then measured by the same code: every token of
the last 10 % predicted once, in windows of 64. Without --peer only ours runs, and the table says so.
"""
import argparse
import json
import os
import pickle
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

from minigpt_wb.data.batches import IGNORE_INDEX, EvalWindows
from minigpt_wb.training.checkpoints import load_model
from minigpt_wb.training.evaluation import loss_over

STEPS, CONTEXT = 2000, 64


def timed(words: list, folder: Path) -> float:
    "CPU seconds, user and system, of a program on one thread; raises when it fails"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    env = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run([str(w) for w in words], cwd=folder, capture_output=True, text=True, env=env)
    if done.returncode: raise SystemExit(f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


class Scored(torch.nn.Module):
    "A model that gives logits (B, T, V), as a sum of losses"
    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, tokens, targets):
        logits = self.logits(tokens, targets).flatten(0, 1).float()
        return torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum")

    def count(self, tokens, targets): return (targets != IGNORE_INDEX).sum()


def whole_split(logits, val: np.ndarray) -> float:
    "Loss in nats per token over all of `val`"
    windows = EvalWindows(val, CONTEXT, 128).share()
    loss_sum, count = loss_over(Scored(logits), windows, torch.device("cpu"), torch.float32)
    return loss_sum / count


def ours(seed: int, data: Path, folder: Path, val: np.ndarray) -> tuple[float, float]:
    run = folder / f"runs/seed{seed}"
    settings = dict(preset="shakespeare_char", data=data, seed=seed, run_name=run.name, eval_every=0,
                    sample_every=0, max_new_tokens=1)
    words = [f"--{name}={value}" for name, value in settings.items()]
    cpu_s = timed([sys.executable, "-m", "minigpt_wb.train", *words], folder)
    model, _, _ = load_model(run)
    return whole_split(lambda tokens, targets: model(tokens), val), cpu_s


def nanogpt(seed: int, peer: Path, folder: Path, val: np.ndarray) -> tuple[float, float]:
    work = folder / f"nanogpt{seed}"
    work.mkdir()
    for name in ("train.py", "model.py", "configurator.py"):
        (work / name).write_text((peer / name).read_text().replace("(1337 + seed", f"({seed} + seed"))
    (work / "data").symlink_to(folder / "data")
    settings = dict(dataset="shakespeare_char", device="cpu", compile=False, eval_interval=STEPS,
                    eval_iters=1, log_interval=10, block_size=CONTEXT, batch_size=12, n_layer=4, n_head=4,
                    n_embd=128, max_iters=STEPS, lr_decay_iters=STEPS, dropout=0.0, learning_rate=1e-3,
                    min_lr=1e-4, beta2=0.99, warmup_iters=100, gradient_accumulation_steps=1,
                    always_save_checkpoint=True)
    cpu_s = timed([sys.executable, "train.py", *(f"--{k}={v}" for k, v in settings.items())], work)
    sys.path.insert(0, str(peer))
    from model import GPT, GPTConfig
    saved = torch.load(work / "out/ckpt.pt", weights_only=True)
    model = GPT(GPTConfig(**saved["model_args"]))
    model.load_state_dict(saved["model"])
    model.eval()
    return whole_split(lambda tokens, targets: model(tokens, targets.clamp(min=0))[0], val), cpu_s


def characters(data: Path, folder: Path) -> np.ndarray:
    "The text as nanoGPT's train.bin, val.bin and meta.pkl -> the validation ids"
    text = data.read_text(encoding="utf-8")
    stoi = {c: i for i, c in enumerate(sorted(set(text)))}
    ids = np.array([stoi[c] for c in text], dtype=np.uint16)
    target, cut = folder / "data/shakespeare_char", int(len(ids) * 0.9)
    target.mkdir(parents=True)
    ids[:cut].tofile(target / "train.bin")
    ids[cut:].tofile(target / "val.bin")
    meta = {"vocab_size": len(stoi), "stoi": stoi, "itos": {i: c for c, i in stoi.items()}}
    (target / "meta.pkl").write_bytes(pickle.dumps(meta))
    return ids[cut:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="tinyshakespeare.txt")
    parser.add_argument("--peer", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    args = parser.parse_args()
    found, start = {"ours": [], "nanoGPT": []}, time.time()
    with tempfile.TemporaryDirectory() as d:
        folder = Path(d)
        val = characters(args.data, folder)
        sides = {"ours": lambda seed: ours(seed, args.data.resolve(), folder, val)}
        if args.peer: sides["nanoGPT"] = lambda seed: nanogpt(seed, args.peer.resolve(), folder, val)
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            for name in list(sides)[::1 if seed % 2 else -1]:
                loss, cpu_s = sides[name](seed)
                found[name].append((loss, cpu_s))
                print(f"seed {seed}  {name:8} loss {loss:.4f}  CPU {cpu_s:.1f} s", flush=True)
    print(f"\n{'':8}  {'median loss':>11}  {'min..max':>15}  {'median CPU s':>12}")
    for name, rows in found.items():
        if not rows:
            print(f"{name:8}  not measured: give --peer")
            continue
        losses, cpu = zip(*rows)
        spread = f"{min(losses):7.4f}..{max(losses):.4f}"
        print(f"{name:8}  {median(losses):11.4f}  {spread}  {median(cpu):12.1f}")
    if args.peer:
        ratios = [b[1] / a[1] for a, b in zip(found["ours"], found["nanoGPT"])]
        gap = median(a[0] for a in found["ours"]) - median(b[0] for b in found["nanoGPT"])
        print(f"loss: ours - nanoGPT {gap:+.4f}")
        print(f"CPU time: nanoGPT / ours {median(ratios):.2f} [{min(ratios):.2f}..{max(ratios):.2f}]")
    if args.json: args.json.write_text(json.dumps({"seconds": time.time() - start, "runs": found}, indent=1))


if __name__ == "__main__": main()
