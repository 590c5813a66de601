"""Files that want to run something, or to fill memory: in every place that this project reads."""
import json
import os
import pickle
import random
import resource
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from damage import LAST, three_steps
from lab import LIMIT_S, Faults, Lab, Lost, forked, kind
from safetensors import SafetensorError
from test_checkpoints import forge
from training_faults import STEPS, warm

from minigpt_wb.config import CorpusConfig, RunConfig
from minigpt_wb.data.cache import TokenCache
from minigpt_wb.data.prepare import prepare
from minigpt_wb.run import Run
from minigpt_wb.training import checkpoints as ck
from minigpt_wb.training.checkpoints import find_checkpoint, list_checkpoints, load_model
from minigpt_wb.training.foreign import load_safely, regular_file
from minigpt_wb.training.ledger import samples_read
from minigpt_wb.training.resume import find_start, resumed_config

MOST_MIB = 1024                                     # of memory that a hostile file may take
REFUSALS = ValueError, OSError, SafetensorError     # errors that people can read
Payload = Callable[[Path], bytes]                   # of the canary, a file that only hostile code makes


# --- what is planted

class Call:
    "Pickles as a call of `function(*args)`"
    def __init__(self, function, *args): self.call = function, args
    def __reduce__(self): return self.call


def saved(path: Path, write: Callable[[Path], object]) -> bytes:
    "The bytes of what `write` makes beside the canary"
    part = path.with_suffix(".part")
    write(part)
    try: return part.read_bytes()
    finally: part.unlink()


def zipped(path: Path, name: str, data: bytes) -> bytes:
    "A zip file with one packed entry"
    def write(part: Path) -> None:
        with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as z: z.writestr(name, data)
    return saved(path, write)


def hash_bomb() -> bytes:
    "A dict whose key is a tuple of a tuple of ...: its hash takes 2**60 steps"
    return b"\x80\x02}X\x04\x00\x00\x00itos}" + b"X\x01\x00\x00\x00a" + b"2\x86" * 60 + b"K\x01ss."


def torch_zip(path: Path, data: bytes) -> None:
    "A zip file as torch.save writes them, around the pickle `data`"
    with zipfile.ZipFile(path, "w") as z:
        for name, content in (("data.pkl", data), ("byteorder", b"little"), ("version", b"3\n")):
            z.writestr(f"archive/{name}", content)


def by_module(path: Path) -> bytes:
    "The same call in the words of protocol 4"
    return pickle.dumps(Call(os.system, f"touch {path}"), 4)


PICKLES: dict[str, Payload] = {
    "os.system": lambda p: b"cos\nsystem\n(S'touch %b'\ntR." % os.fsencode(p),
    "os.system, protocol 4": by_module,
    "os.system by INST": lambda p: b"(S'touch %b'\nios\nsystem\n." % os.fsencode(p),
    "exec": lambda p: pickle.dumps(Call(exec, f"open({str(p)!r}, 'w')")),
    "eval in a dict": lambda p: pickle.dumps({"itos": Call(eval, f"open({str(p)!r}, 'w')"), "model": 1}),
    "Path.touch": lambda p: pickle.dumps(Call(Path.touch, p)),
    "a torch zip": lambda p: saved(p, lambda f: torch.save({"model_state_dict": Call(Path.touch, p)}, f)),
    "a torch zip with a slow hash": lambda p: saved(p, lambda f: torch_zip(f, hash_bomb())),
    "a torch file": lambda p: saved(p, lambda f: torch.save(
        {"model": Call(Path.touch, p)}, f, _use_new_zipfile_serialization=False)),
    "an array of objects": lambda p: saved(p, lambda f: np.save(
        open(f, "wb"), np.array([Call(Path.touch, p)], object), allow_pickle=True)),
    "a huge memo": lambda p: b"\x80\x02]r\x00\x00\x00\x20.",
    "a huge string": lambda p: b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x.",
    "a slow hash": lambda p: hash_bomb(),
    "deep lists": lambda p: b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b".",
}
BOMBS: dict[str, Payload] = {
    "nothing": lambda p: b"",
    "noise": lambda p: random.Random(7).randbytes(4096),
    "10 MB of brackets": lambda p: b"[" * 10**7,
    "10 MB of nested names": lambda p: b'{"a":' * 2 * 10**6,
    "10 MB on one line": lambda p: b'"' + b"x" * 10**7 + b'"',
    "a long number": lambda p: b'{"step": ' + b"9" * 10**6 + b"}",
    "100 MB in a zip": lambda p: zipped(p, "archive/data.pkl", bytes(10**8)),
    "a header of 2**63 bytes": lambda p: struct.pack("<Q", 2**63) + b"{}",
    "a header of 2**40 bytes": lambda p: struct.pack("<Q", 2**40) + b"{}",
    "a tensor of 2**62 numbers": lambda p: tensor_header({"w": {"dtype": "F32", "shape": [2**62],
                                                                "data_offsets": [0, 2**64]}}),
    "tensors that overlap": lambda p: tensor_header({n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
                                                     for n in "ab"}) + bytes(4),
}
SIXTY = range(1, 60)
YAML = {
    "apply": "n_layer: !!python/object/apply:os.system ['touch {p}']",
    "new": "x: !!python/object/new:os.system ['touch {p}']",
    "apply with kwds": "!!python/object/apply:subprocess.Popen {args: [['touch', '{p}']], kwds: {}}",
    "name": "data: !!python/name:os.system",
    "module": "data: !!python/module:antigravity",
    "object": "data: !!python/object:pathlib.Path {}",
    "laughs": "\n".join(["a0: &a0 [x,x,x]", *(f"a{i}: &a{i} [*a{i - 1},*a{i - 1}]" for i in SIXTY)]),
    "itself": "data: &a [*a]",
    "merges": "\n".join(["m0: &m0 {k: 1}", *(f"m{i}: &m{i} {{<<: [*m{i - 1}, *m{i - 1}]}}" for i in SIXTY)]),
    "a key of lists": "? [[a], [b]]\n: 1",
    "a million names": "\n".join(f"n{i}: 1" for i in range(10**6)),
    "sexagesimal": "n_layer: " + ":".join(["59"] * 50000),
}
YAMLS: dict[str, Payload] = {f"YAML: {n}": lambda p, t=text: t.replace("{p}", str(p)).encode()
                             for n, text in YAML.items()}


def tensor_header(tensors: dict) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


# --- where it is planted, and who reads it; each takes the lab and the bytes, and returns the reader

def checkpoint_file(name: str, fits: bool):
    "A file of the newest step, or with a manifest that fits it"
    def plant(lab: Lab, data: bytes) -> Callable:
        store = three_steps(lab)
        folder = store / ck.step_name(STEPS)
        (folder / name).write_bytes(data)
        if fits:
            files = {n: {"bytes": size, "sha256": ck.sha256(folder / n)}
                     for n, size in ck.regular_files(folder).items() if n != ck.MANIFEST}
            forge(folder, files=files)
        def read() -> None:
            found = find_checkpoint(store.parent)
            if not fits and found.step != LAST[-2]: raise Lost(f"{found} is used")
            repr(list_checkpoints(store).best)
            resumed_config(find_start(found, fork=True))
            load_model(found); found.load_optimizer()
        return read
    return plant


def hint(name: str):
    def plant(lab: Lab, data: bytes) -> Callable:
        store = three_steps(lab)
        (store / name).write_bytes(data)
        def read() -> None:
            if find_checkpoint(store.parent).step != STEPS: raise Lost("the hint was believed")
            repr(list_checkpoints(store).best)
        return read
    return plant


def run_file(name: str):
    "A file of a run that people look at"
    def plant(lab: Lab, data: bytes) -> Callable:
        three_steps(lab)
        run = Run(lab.fresh("hostile") / "run")
        shutil.copytree(lab.work / "reference2/story", run.path, ignore=shutil.ignore_patterns("checkpoints"))
        (run.path / name).write_bytes(data)
        def read() -> None:
            repr((run.status, run.rows(), run.commands(), run.heartbeats(), run.last_seen()))
            for look in (lambda: run.config, lambda: samples_read(run)):
                try: look()
                except ValueError: continue  # it says what is wrong
        return read
    return plant


def config_file(name: str):
    def plant(lab: Lab, data: bytes) -> Callable:
        path = lab.fresh("hostile") / name
        path.write_bytes(data)
        return lambda: RunConfig.load(path)
    return plant


def tokenised(name: str):
    "A file of a folder that is already tokenised"
    def plant(lab: Lab, data: bytes) -> Callable:
        folder = lab.fresh("hostile")
        other = "npy" in name
        for split in ("train", "val"):
            if other: np.save(folder / f"{split}_data.npy", np.ones((99, 64), np.int32))
            else: (folder / f"{split}.bin").write_bytes(np.ones(4096, np.uint16).tobytes())
        (folder / name).write_bytes(data)
        return lambda: prepare(CorpusConfig(data=str(folder)), root=folder, progress=False, context_length=32)
    return plant


def token_cache(name: str):
    "A file of a token cache"
    def plant(lab: Lab, data: bytes) -> Callable:
        warm(lab)
        folder = lab.fresh("hostile") / "cache"
        shutil.copytree(next((lab.work / "cache/datasets").glob("*/meta.json")).parent, folder)
        (folder / name).write_bytes(data)
        def read() -> None:
            cache = TokenCache.open(folder)
            repr((cache.train, cache.val, cache.tokenizer(), cache.vocab_size))
        return read
    return plant


def foreign(name: str):
    "A checkpoint of another system"
    def plant(lab: Lab, data: bytes) -> Callable:
        path = lab.fresh("hostile") / name
        path.write_bytes(data)
        return lambda: load_safely(regular_file(path))
    return plant


CHECKPOINT = (ck.MODEL, ck.OPTIM, ck.STATE, ck.MANIFEST,
              "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json")
PLACES = {
    **{n: checkpoint_file(n, False) for n in CHECKPOINT},
    **{f"{n} with a manifest that fits": checkpoint_file(n, True) for n in CHECKPOINT if n != ck.MANIFEST},
    **{n: hint(n) for n in ("latest", "best")},
    **{n: run_file(n) for n in ("status.json", "metrics.jsonl", "control.jsonl", "heartbeat/rank0",
                                "ledger/rank0.jsonl", "config.yaml")},
    **{n: config_file(n) for n in ("given.yaml", "given.json")},
    **{n: tokenised(n) for n in ("meta.pkl", "train.bin", "train_data.npy", "metadata.json")},
    **{f"cache {n}": token_cache(n) for n in ("meta.json", "tokenizer/tokenizer.json")},
    **{n: foreign(n) for n in ("theirs.pt", "theirs.safetensors", "theirs.bin")},
}


def address_space() -> int:
    "Bytes of it that this process has"
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def hostile_cases(lab: Lab) -> list[tuple[str, str, Payload]]:
    "(place, name of what is planted, its bytes)"
    cases = [(place, name, make) for place in PLACES for name, make in (PICKLES | BOMBS).items()]
    return cases + [(p, n, make) for p in ("config.yaml", "given.yaml") for n, make in YAMLS.items()]


@kind("hostile files", lambda lab: len(hostile_cases(lab)))
def hostile_files(lab: Lab, case: int, rng: random.Random) -> Faults:
    "Nothing is run, nothing takes long or much memory, an error can be read"
    place, name, make = hostile_cases(lab)[case]
    canary = lab.work / "canary"
    canary.unlink(missing_ok=True)
    read = PLACES[place](lab, make(canary))
    def work() -> int:
        most = address_space() + 2**32  # so that this machine outlives a loss
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        os.chdir(lab.work)
        try: read()
        except REFUSALS: return 0
    try: ended = forked(lab, work, LIMIT_S)
    except Lost as e: raise Lost(f"{name} in {place}: {e}") from None
    if canary.exists(): raise Lost(f"{name} in {place} was run")
    if ended.status: raise Lost(f"{name} in {place}: {ended.exception or ended}")
    if ended.grown_mib > MOST_MIB: raise Lost(f"{name} in {place} took {ended.grown_mib:.0f} MiB")
    yield
