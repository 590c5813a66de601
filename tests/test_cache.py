"What a cell cannot hold of data.cache and data.prepare: many processes, killed writers, refusing disks"
import hashlib, json, os, pickle, random, shutil, signal, subprocess, sys, time
from pathlib import Path

import numpy as np
import pytest

from minigpt_wb.config import CorpusConfig
from minigpt_wb.data import prepare as module
from minigpt_wb.data.prepare import clear_caches, datasets_dir, list_caches, prepare
from minigpt_wb.data.tokenizer import decode

LINE = "It was the best of lines, it was the {} of lines.\n"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    "About 2 MB of ASCII"
    path = tmp_path/"text.txt"
    path.write_text("".join(LINE.format(i) for i in range(45_000)))
    return path

def config(path: Path, **more) -> CorpusConfig:
    return CorpusConfig(data=str(path), **more)

def whole(cache, path: Path) -> bool:
    "Whether the ids of both splits are the bytes of the text"
    return np.concatenate([cache.train, cache.val]).astype(np.uint8).tobytes() == path.read_bytes()

def refused(why: str, cfg: CorpusConfig, root: Path, **more) -> None:
    with pytest.raises(ValueError, match=why): prepare(cfg, root, progress=False, **more)

def litter(root: Path) -> list[str]:
    return [p.name for p in datasets_dir(root).glob(".*.part")]

def digests(folder: Path) -> dict[str, tuple]:
    files = [p for p in folder.rglob("*") if p.is_file()]
    return {p.name: (p.stat().st_mtime_ns, hashlib.sha256(p.read_bytes()).hexdigest()) for p in files}

def child(code: str, *args) -> subprocess.Popen:
    "A fresh Python that runs `code` with `args`"
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)

PREPARE = """
import sys
from minigpt_wb.config import CorpusConfig
from minigpt_wb.data.prepare import prepare
try: print(prepare(CorpusConfig(data=sys.argv[2]), sys.argv[1], progress=False).path.name)
except ValueError as e: print("ValueError:", e)
"""

# --- many processes at once ---

EIGHT = """
import os, sys, time
from pathlib import Path
from minigpt_wb.config import CorpusConfig
from minigpt_wb.data import prepare as module
root, text, i = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
fill = module.fill
def counted(*args):
    (root/f"filled-{i}").touch()
    time.sleep(0.5)  # long enough for every other process to ask
    fill(*args)
module.fill = counted
(root/f"ready-{i}").touch()
while not (root/"go").exists(): time.sleep(0.001)
c = module.prepare(CorpusConfig(data=text), root, progress=False)
print(c.path.name, len(c.train), len(c.val))
"""

def test_eight_processes_prepare_once(tmp_path, text):
    root = tmp_path/"root"; root.mkdir()
    children = [child(EIGHT, root, text, i) for i in range(8)]
    deadline = time.time() + 120
    while len(list(root.glob("ready-*"))) < 8:
        assert time.time() < deadline
        ended = [p for p in children if p.poll() is not None]
        assert not ended, ended[0].communicate()
        time.sleep(0.05)
    (root/"go").touch()
    said = [p.communicate(timeout=120) for p in children]
    assert all(p.returncode == 0 for p in children), said
    assert len(list(root.glob("filled-*"))) == 1
    assert len({out for out, _ in said}) == 1
    assert sum("waiting for another process" in err for _, err in said) >= 1
    assert litter(root) == []
    assert whole(prepare(config(text), root), text)

# --- writers that die ---

SLOW = """
import sys, time
from minigpt_wb.config import CorpusConfig
from minigpt_wb.data.cache import TokenFile
from minigpt_wb.data.prepare import prepare
write = TokenFile.write
def slow(self, ids):
    n = write(self, ids)
    self.file.flush()
    time.sleep(60)
    return n
TokenFile.write = slow
prepare(CorpusConfig(data=sys.argv[2]), sys.argv[1], progress=False)
"""

def test_killed_writer_leaves_nothing_and_frees_its_lock(tmp_path, text):
    root = tmp_path/"root"
    writer = child(SLOW, root, text)
    deadline = time.time() + 60
    while not any(p.stat().st_size for p in root.rglob("train.bin")):
        assert time.time() < deadline and writer.poll() is None, writer.communicate()
        time.sleep(0.02)
    assert list_caches(root) == []
    waiting = child(PREPARE, root, text)
    assert "waiting for another process" in waiting.stderr.readline()
    writer.kill(); writer.communicate()
    out, err = waiting.communicate(timeout=60)
    assert waiting.returncode == 0 and "ValueError" not in out, (out, err)
    assert litter(root) == []
    (cache,) = list_caches(root)
    assert cache.path.name == out.strip() and whole(cache, text)

def test_a_kill_at_any_moment_is_harmless(tmp_path, text):
    "Thirty writers killed after a random time: what can be opened is always whole"
    cfg, dice, seen = config(text), random.Random(0), {"none": 0, "whole": 0}
    prepare(cfg, tmp_path, progress=False)  # imports what is imported once
    clear_caches(tmp_path)
    started = time.time(); prepare(cfg, tmp_path, progress=False); takes = time.time() - started
    for _ in range(30):
        clear_caches(tmp_path)
        pid = os.fork()
        if not pid:
            try: prepare(cfg, tmp_path, progress=False)
            finally: os._exit(0)
        time.sleep(dice.uniform(0, 1.3 * takes))
        os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
        caches = list_caches(tmp_path)
        seen["whole" if caches else "none"] += 1
        assert all(whole(c, text) for c in caches)
    assert whole(prepare(cfg, tmp_path, progress=False), text) and litter(tmp_path) == []
    print("after 30 kills:", seen)

FORKED = """
import os, sys
from tqdm import tqdm
from minigpt_wb.config import CorpusConfig
from minigpt_wb.data.prepare import prepare
lock = tqdm.get_lock()  # made before the fork: both have it
if not os.fork():
    lock.acquire()
    os._exit(9)
os.wait()
print(prepare(CorpusConfig(data=sys.argv[2]), sys.argv[1], progress=False).path.name)
"""

def test_a_fork_killed_under_its_bar_blocks_nobody(tmp_path, text):
    out, err = child(FORKED, tmp_path, text).communicate(timeout=60)
    (cache,) = list_caches(tmp_path)
    assert cache.path.name == out.strip(), (out, err)

def test_an_interrupt_leaves_nothing(tmp_path, text, monkeypatch):
    def interrupted(*args): raise KeyboardInterrupt
    monkeypatch.setattr("minigpt_wb.data.cache.encode", interrupted)
    with pytest.raises(KeyboardInterrupt): prepare(config(text), tmp_path, progress=False)
    assert litter(tmp_path) == [] and list_caches(tmp_path) == []

def test_text_that_changes_while_it_is_read_is_refused(tmp_path, text, monkeypatch):
    fill = module.fill
    def meddling(*args):
        fill(*args)
        text.write_text("something else, of another length")
    monkeypatch.setattr(module, "fill", meddling)
    refused("changed while it was read", config(text), tmp_path)
    assert litter(tmp_path) == [] and list_caches(tmp_path) == []

def test_damaged_caches_are_made_again(tmp_path, text):
    for damage in (lambda p: os.truncate(p/"val.bin", 10), lambda p: (p/"train.bin").unlink(),
                   lambda p: (p/"meta.json").unlink(), lambda p: (p/"meta.json").write_text('{"torn'),
                   lambda p: (p/"meta.json").write_text("{}"), lambda p: shutil.rmtree(p/"tokenizer")):
        damage(prepare(config(text), tmp_path, progress=False).path)
        assert whole(prepare(config(text), tmp_path, progress=False), text)

# --- disks that refuse ---

def test_full_disk_by_a_file_size_limit(tmp_path, text):
    "RLIMIT_FSIZE makes every write beyond it fail as a full quota does, for root too"
    other = tmp_path/"other.txt"; other.write_text(LINE * 100)
    old = prepare(config(other), tmp_path, progress=False)
    before = digests(old.path)
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))\n"
    out, err = child(limit + PREPARE, tmp_path, text).communicate(timeout=60)
    assert "ValueError: the disk filled while token ids were written" in out, (out, err)
    assert litter(tmp_path) == [] and digests(old.path) == before
    assert [c.path for c in list_caches(tmp_path)] == [old.path]

def mounts(folder: Path) -> tuple[str, ...] | None:
    "The words that run a command in a mount namespace of its own, or None where that is not allowed"
    for wrap in (("unshare", "--mount"), ("unshare", "--map-root-user", "--mount")):
        try: done = subprocess.run([*wrap, "mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True)
        except FileNotFoundError: return None
        if done.returncode == 0: return wrap

@pytest.mark.parametrize("case", ["full", "read-only"])
def test_small_and_read_only_file_systems(tmp_path, text, case):
    root = tmp_path/"root"; root.mkdir()
    wrap = mounts(root)
    if wrap is None:
        print(why := "this user may not mount a tmpfs, not even in a namespace of its own")
        pytest.skip(why)
    small = tmp_path/"small.txt"; small.write_text(LINE * 100)
    script = f"""set -e
        mount -t tmpfs -o size=1m tmpfs {root}
        {sys.executable} -c "$CODE" {root} {small}
        {'mount -o remount,ro ' + str(root) if case == 'read-only' else ''}
        {sys.executable} -c "$CODE" {root} {text}
        {sys.executable} -c "$CODE" {root} {small}
        ls -A {root}/cache/datasets"""
    env = os.environ | {"CODE": PREPARE}
    p = subprocess.run([*wrap, "sh", "-c", script], capture_output=True, text=True, env=env, timeout=120)
    first, error, again, *names = p.stdout.splitlines()
    expected = "the disk filled while" if case == "full" else "cannot be written (Read-only file system"
    assert expected in error, (p.stdout, p.stderr)
    assert first == again and first in names  # the old cache was kept, and a read-only one can be read
    assert not any(".part" in n for n in names)

def test_a_file_where_the_folder_should_be(tmp_path, text):
    (tmp_path/"cache").write_text("in the way")
    refused("cannot be written .*make it writable", config(text), tmp_path)
    assert (tmp_path/"cache").read_text() == "in the way"

def test_a_folder_without_write_permission(tmp_path, text):
    if os.getuid() == 0:
        print(why := "root may write to any folder; the read-only file system above tests the same for root")
        pytest.skip(why)
    folder = datasets_dir(tmp_path); folder.mkdir(parents=True); folder.chmod(0o500)
    try: refused("cannot be written", config(text), tmp_path)
    finally: folder.chmod(0o700)

# --- folders that are already tokenised ---

def nano(folder: Path, itos: dict | None) -> str:
    "A folder as nanoGPT's prepare.py leaves it -> its text"
    folder.mkdir()
    text = "".join(LINE.format(i) for i in range(100))
    ids = {c: i for i, c in itos.items()} if itos else None
    data = np.array([ids[c] for c in text] if ids else list(text.encode()), "uint16")
    data[:4000].tofile(folder/"train.bin"); data[4000:].tofile(folder/"val.bin")
    if not itos: return text
    (folder/"meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(itos), "itos": itos, "stoi": ids}))
    return text

def test_nanogpt_folder_is_read_where_it_lies(tmp_path):
    chars = sorted(set("".join(LINE.format(i) for i in range(10))), reverse=True)  # an order that is not ours
    folder = tmp_path/"nano"
    text = nano(folder, dict(enumerate(chars)))
    before = digests(folder)
    cache = prepare(config(folder), tmp_path, progress=False, context_length=64)
    t = cache.tokenizer()
    assert decode(t, cache.train) + decode(t, cache.val) == text
    assert digests(folder) == before and cache.vocab_size == len(chars) + 1
    assert sum(p.stat().st_size for p in cache.path.rglob("*")) < 300_000  # a pointer, not a copy
    assert prepare(config(folder), tmp_path, progress=False) == cache
    (folder/"train.bin").write_bytes((folder/"train.bin").read_bytes()[:2000])
    assert len(prepare(config(folder), tmp_path, progress=False).train) == 1000

def test_nanogpt_folder_without_a_vocabulary(tmp_path):
    folder = tmp_path/"nano"
    text = nano(folder, None)
    cache = prepare(config(folder), tmp_path, progress=False)
    assert decode(cache.tokenizer(), cache.train) == text[:4000]
    refused("no text to make 'chars' from", config(folder, tokenizer="chars"), tmp_path)
    refused("needs 2,000,000", config(folder), tmp_path, context_length=10**6)
    (folder/"val.bin").write_bytes(b"odd")
    refused("odd number of bytes", config(folder), tmp_path)
    (folder/"val.bin").unlink()
    refused("0 validation tokens", config(folder), tmp_path, context_length=64)
    assert len(prepare(config(folder, val_fraction=0), tmp_path, context_length=64).val) == 0

class Bomb:
    def __init__(self, path: Path): self.path = path
    def __reduce__(self): return os.system, (f"touch {self.path}",)

def test_pickles_are_never_executed(tmp_path):
    folder = tmp_path/"nano"
    nano(folder, dict(enumerate(sorted(set("".join(LINE.format(i) for i in range(10)))))))
    bomb = Bomb(tmp_path/"boom")
    objects = [bomb, {"itos": bomb}, {"itos": np.arange(3)}, {"itos": {0: "ab"}}, {"itos": {1: "a"}},
               {}, [], 3]
    for bad in (*map(pickle.dumps, objects), b"", b"\x80", b"text", bytes(range(100))):
        (folder/"meta.pkl").write_bytes(bad)
        refused("meta.pkl is not a character vocabulary", config(folder), tmp_path)
    assert not (tmp_path/"boom").exists() and list_caches(tmp_path) == []

def test_folder_of_numpy_rows(tmp_path, capfd):
    folder = tmp_path/"rows"; folder.mkdir()
    rows = np.random.default_rng(0).integers(0, 256, (20, 64))
    np.save(folder/"train_data.npy", rows); np.save(folder/"val_data.npy", rows[:5].astype("uint16"))
    (folder/"metadata.json").write_text(json.dumps({"sequence_length": 64, "vocab_size": 256}))
    before = digests(folder)
    cache = prepare(config(folder), tmp_path, progress=False, context_length=64)
    assert (cache.train == rows.reshape(-1)).all() and (cache.val == rows[:5].reshape(-1)).all()
    assert digests(folder) == before and "overlap by half" in capfd.readouterr().err
    np.save(folder/"train_data.npy", np.array([Bomb(tmp_path/"boom")], dtype=object), allow_pickle=True)
    refused("no plain array", config(folder), tmp_path)
    np.save(folder/"train_data.npy", -rows)
    refused("holds the id -", config(folder), tmp_path)
    assert not (tmp_path/"boom").exists()
