"""Batch fetch: microseconds from a memory-mapped file of ids to tensors, ours against two usual ways.

    python bench/bench_fetch.py [--rounds 15] [--fetches 1024] [--batch-size 8] [--context-length 256]
                                [--json PATH|-] [--budget-us 30]

ours        Batches.step: Feistel order included, one copy into a reused buffer
get_batch   random offsets, a slice, a cast and a stack, for inputs and for targets; the map is reopened
            each time, as nanoGPT does
dataloader  torch's DataLoader over a map-style dataset of windows, shuffle=True, in this process

Rounds are interleaved, so that a busy machine slows all three alike; a ratio compares the
members of one round. A round's figure is its wall time divided by its fetches: it holds every block of the
order that was computed on the way (one per 512 fetches of 8), which a median of single fetches would hide.
With --budget-us the exit status is 1 when our median is above it.
"""
import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from itertools import count

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from minigpt_wb.data.batches import Batches, to_device


def ours(path, B, T):
    batches = Batches(np.memmap(path, dtype=np.uint16, mode="r"), T, B, seed=1337)
    for step in count():
        for batch in to_device(batches.step(step * B, B), "cpu"): yield batch.tokens, batch.targets


def get_batch(path, B, T):
    while True:
        ids = np.memmap(path, dtype=np.uint16, mode="r")
        offsets = torch.randint(len(ids) - T, (B,))
        x = torch.stack([torch.from_numpy(ids[i:i + T].astype(np.int64)) for i in offsets])
        y = torch.stack([torch.from_numpy(ids[i + 1:i + 1 + T].astype(np.int64)) for i in offsets])
        yield x, y


class WindowDataset(Dataset):
    def __init__(self, path, T): self.ids, self.T = np.memmap(path, dtype=np.uint16, mode="r"), T
    def __len__(self): return (len(self.ids) - 1) // self.T
    def __getitem__(self, i):
        window = torch.from_numpy(self.ids[i * self.T:i * self.T + self.T + 1].astype(np.int64))
        return window[:-1], window[1:]


def dataloader(path, B, T):
    loader = DataLoader(WindowDataset(path, T), batch_size=B, shuffle=True, drop_last=True)
    while True: yield from loader


def us_per_fetch(fetcher, fetches):
    "Mean microseconds per fetch, and the slowest one"
    slowest, start = 0, time.perf_counter_ns()
    last = start
    for _ in range(fetches):
        next(fetcher)
        now = time.perf_counter_ns()
        slowest, last = max(slowest, now - last), now
    return (last - start) / fetches / 1000, slowest / 1000


def measure(path, B, T, rounds, fetches):
    "A row of figures for each way; ratio: how many times as long as ours, round by round"
    ways = {f.__name__: f(path, B, T) for f in (ours, get_batch, dataloader)}
    for way in ways.values(): us_per_fetch(way, 64)  # first touches of pages and caches belong to nobody
    figures = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items(): figures[name].append(us_per_fetch(way, fetches))
    rows = []
    for name, pairs in figures.items():
        us = [u for u, _ in pairs]
        ratios = [u / o for u, (o, _) in zip(us, figures["ours"])]
        rows.append(dict(name=name, median_us=statistics.median(us), min_us=min(us), max_us=max(us),
                         slowest_us=max(s for _, s in pairs), ratio=statistics.median(ratios),
                         ratio_min=min(ratios), ratio_max=max(ratios)))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    numbers = {"rounds": 15, "fetches": 1024, "batch-size": 8, "context-length": 256, "million-tokens": 20}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", metavar="PATH", help="write the figures as JSON too (-: to stdout, alone)")
    parser.add_argument("--budget-us", type=float, help="exit with 1 when our median is above it")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "train.bin")
        np.random.default_rng(0).integers(0, 50257, args.million_tokens * 10**6, dtype=np.uint16).tofile(path)
        rows = measure(path, args.batch_size, args.context_length, args.rounds, args.fetches)
    result = dict(bench="fetch", batch_size=args.batch_size, context_length=args.context_length,
                  rounds=args.rounds, fetches=args.fetches, torch=torch.__version__, numpy=np.__version__,
                  rows=rows)
    if args.json == "-": print(json.dumps(result))
    else:
        print(f"{args.batch_size} x {args.context_length} tokens, "
              f"{args.rounds} interleaved rounds of {args.fetches} fetches")
        print(f"{'':12}{'us per fetch':>14}{'min..max':>18}{'slowest':>10}   ratio to ours (min..max)")
        for r in rows:
            print(f"{r['name']:12}{r['median_us']:14.1f}{r['min_us']:11.1f}..{r['max_us']:<5.1f}"
                  f"{r['slowest_us']:10.0f}"
                  f"{r['ratio']:14.2f} ({r['ratio_min']:.2f}..{r['ratio_max']:.2f})")
        if args.json:
            with open(args.json, "w") as f: json.dump(result, f, indent=1)
    ours_us = rows[0]["median_us"]
    if args.budget_us and ours_us > args.budget_us:
        sys.exit(f"fetch takes {ours_us:.1f} us, more than the budget of {args.budget_us:.1f} us")


if __name__ == "__main__":
    main()
