"""The store under faults: killed at every file operation, full disks, damaged and forged files."""
import contextlib, errno, hashlib, json, math, os, pickle, random, resource, shutil, signal, subprocess, sys
import threading, time, traceback
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from minigpt_wb.training import checkpoints as ck
from minigpt_wb.training.snapshot import from_json, take_snapshot, to_json

NAMES = (ck.MODEL, ck.OPTIM, ck.STATE, ck.MANIFEST, "tokenizer/tokenizer.json")


def weights(step: int) -> dict[str, torch.Tensor]:
    "Weights that say which step they are of"
    return {"w": torch.full((64, 64), float(step)), "b": torch.arange(64.0) + step}


@pytest.fixture
def tokenizer(tmp_path):
    folder = tmp_path / "tokenizer"; folder.mkdir()
    (folder / "tokenizer.json").write_text('{"model": "of a kind"}' * 20)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).write_text('{"eos_token": "end"}' * 20)
    return folder


@pytest.fixture
def store(tmp_path): return tmp_path / "run" / "checkpoints"


def save(store: Path, step: int, tokenizer: Path | None = None, mark: float | None = None, **state) -> Path:
    model = nn.Linear(8, 8); optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 8)).sum().backward(); optimizer.step()
    tensors = weights(step if mark is None else mark) | dict(model.state_dict())
    return ck.save_checkpoint(store, step, tensors, optimizer, state, tokenizer)


def marked(c: ck.Checkpoint) -> float:
    "The number in the weights, which must be one and the same"
    w = c.load_model()
    assert (w["w"] == w["w"][0, 0]).all() and torch.equal(w["b"], torch.arange(64.0) + w["w"][0, 0])
    return w["w"][0, 0].item()


def newest(store: Path) -> ck.Checkpoint: return ck.pick(ck.list_checkpoints(store), "latest", "RUN")


def litter(store: Path) -> list[str]:
    return [p.name for p in store.iterdir() if p.name.startswith((".tmp", ".old", ".del"))]


def all_intact(store: Path) -> bool: return not any(c.verify() for c in ck.list_checkpoints(store))


def step_dir(store: Path, step: int) -> Path: return store / ck.step_name(step)


def in_child(work) -> int:
    "Run `work` in a forked process; its exit status, negative for a signal"
    pid = os.fork()
    if not pid:
        status = 1
        try: work(); status = 0
        except BaseException: traceback.print_exc()
        finally: os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def at_event(n: int, do) -> list[int]:
    "Call `do` before the n-th file operation of this process from now on; returns how many are still to come"
    left = [n]
    def hook(event, args):
        if event.split(".")[0] in ("open", "os") and left[0] > 0:
            left[0] -= 1
            if not left[0]: do()
    sys.addaudithook(hook)
    return left


def die(): os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("again", [False, True], ids=["new step", "same step again"])
def test_killed_at_every_file_operation(store, tokenizer, again):
    "What was acknowledged is found bit for bit, what was not is whole or not there; the next save cleans up"
    step, kills, seen = 1 if again else 2, 0, set()
    for n in range(1, 500):
        shutil.rmtree(store, ignore_errors=True); save(store, 1, tokenizer)
        def work(n=n): at_event(n, die); save(store, step, tokenizer, mark=7)
        status = in_child(work)
        c = newest(store)
        seen.add(marked(c))
        assert (c.step, marked(c)) in ([(1, 1.0), (1, 7.0)] if again else [(1, 1.0), (2, 7.0)])
        if status == 0: break
        assert status == -signal.SIGKILL
        kills += 1
        save(store, 3, tokenizer)
        assert litter(store) == [] and newest(store).step == 3 and all_intact(store)
    assert kills > 30 and seen == {1.0, 7.0}


def test_every_file_operation_fails(store, tokenizer):
    "A CheckpointError or a whole checkpoint; the older one as it was, nothing left lying about"
    SAVED, REFUSED, OVER = 0, 9, 8
    def fail(): raise OSError(errno.EIO, "injected")
    def work(n):
        left = at_event(n, fail)
        try: save(store, 2, tokenizer)
        except ck.CheckpointError as e: assert "step 2 could not be saved" in e.strerror; os._exit(REFUSED)
        if left[0]: os._exit(OVER)
    seen = []
    while not seen or seen[-1] != OVER:
        shutil.rmtree(store, ignore_errors=True); save(store, 1, tokenizer)
        seen.append(in_child(lambda: work(len(seen) + 1)))
        assert seen[-1] in (SAVED, REFUSED, OVER) and not ck.Checkpoint(step_dir(store, 1)).verify()
        assert newest(store).step == 2 or seen[-1] == REFUSED
        save(store, 3, tokenizer); assert litter(store) == []
    assert seen.count(REFUSED) > 20


def test_killed_at_random_times(store, tokenizer):
    "A loop of saves and prunes, killed 20 times: the newest acknowledged step is found"
    rng, total = random.Random(0), 0
    for round in range(20):
        read, write = os.pipe()
        def work(first=round * 1000, fd=write):
            for step in range(first, first + 1000):
                save(store, step, tokenizer); os.write(fd, b"."); ck.prune(store, 2)
        pid = os.fork()
        if not pid:
            try: work()
            finally: os._exit(1)
        os.close(write); os.read(read, 1); time.sleep(rng.uniform(0, 0.04))
        os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
        acknowledged = round * 1000
        while data := os.read(read, 4096): acknowledged += len(data)
        os.close(read)
        c = newest(store); total += 1
        assert c.step >= acknowledged and marked(c) == c.step
    assert total == 20


@contextlib.contextmanager
def file_limit(size: int):
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_file_too_large(store, tokenizer):
    save(store, 1, tokenizer)
    largest = max(ck.regular_files(store / "step_0000000001").values())
    for size in range(0, largest, largest // 40):
        with file_limit(size), pytest.raises(ck.CheckpointError, match="Older checkpoints are as they were"):
            save(store, 2, tokenizer)
        assert [c.step for c in ck.list_checkpoints(store)] == [1] and litter(store) == []
        assert marked(newest(store)) == 1
    with file_limit(largest): save(store, 2, tokenizer)
    assert newest(store).step == 2


def test_no_space(store, monkeypatch):
    save(store, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(10**9, 10**9, 10))
    with pytest.raises(ck.CheckpointError, match="10 bytes are free") as e: save(store, 2)
    assert e.value.errno == errno.ENOSPC and str(store) in str(e.value)


def test_full_disk(tmp_path, tokenizer):
    "A disk of 150 kB: saves until it is full, then says so, and goes on once there is room"
    store = tmp_path / "small" / "checkpoints"; store.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=150k", "none", store]
    if os.geteuid() or subprocess.run(mount, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        with pytest.raises(ck.CheckpointError, match="free some space"):
            for step in range(1, 99): save(store, step, tokenizer)
        saved = [c.step for c in ck.list_checkpoints(store)]
        assert len(saved) > 1 and litter(store) == [] and all_intact(store)
        ck.prune(store, 1); save(store, 99, tokenizer)
        assert newest(store).step == 99
    finally: subprocess.run(["umount", store], check=True)


def test_damage_is_found(store, tokenizer):
    "Flipped bits, cuts, additions, zeroed blocks and missing files: each is seen, the step before is used"
    rng, faults = random.Random(0), 0
    save(store, 1, tokenizer); save(store, 2, tokenizer)
    c = ck.Checkpoint(store / "step_0000000002")
    def flip(d): i = rng.randrange(len(d)); return d[:i] + bytes([d[i] ^ 1 << rng.randrange(8)]) + d[i + 1:]
    def cut(d): return d[:rng.randrange(len(d))]
    def add(d): return d + b"\0"
    def zero(d): i = rng.randrange(len(d)); return d[:i] + bytes(len(d[i:i + 512])) + d[i + 512:]
    for name in NAMES:
        path = c.path / name; data = path.read_bytes()
        for how in [flip] * 60 + [cut] * 20 + [zero] * 20 + [add]:
            hurt = how(data)
            if hurt == data: continue
            path.write_bytes(hurt)
            assert c.verify(), (name, how); faults += 1
        assert newest(store).step == 1
        path.unlink(); assert c.verify() and newest(store).step == 1; faults += 1
        path.write_bytes(data); assert not c.verify()
    assert faults > 450


def test_rejected_are_named(store, capsys):
    for step in (1, 2, 3): save(store, step)
    (step_dir(store, 3) / ck.STATE).unlink(); (step_dir(store, 2) / ck.MANIFEST).write_text("{}")
    assert newest(store).step == 1
    said = capsys.readouterr()
    assert "step_0000000003 (state.json is missing)" in said.err and not said.out
    assert "step_0000000002 (MANIFEST.json was changed" in said.err
    shutil.rmtree(step_dir(store, 1))
    with pytest.raises(ValueError, match="RUN holds no intact checkpoint: step_0000000003 .*step_0000000002"):
        newest(store)


def forge(folder: Path, **changes) -> None:
    "A manifest that says something else, with its hash put right"
    manifest = json.loads((folder / ck.MANIFEST).read_text()) | changes
    (folder / ck.MANIFEST).write_text(json.dumps(manifest | {"sha256": ck.self_hash(manifest)}))


@pytest.mark.parametrize("changes", [
    dict(files={"../../secret": {"bytes": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}}),
    dict(files=None), dict(files={"a": 1}), dict(files={"a": {"bytes": math.inf, "sha256": ""}}),
    dict(files={}), dict(step=9), dict(step=None), dict(format=2), dict(format=None)])
def test_forged_manifest(store, changes):
    folder = save(store, 1); (store.parent / "secret").write_text("secret")
    forge(folder, **changes)
    assert ck.Checkpoint(folder).verify()


@pytest.mark.parametrize("text", [
    "", "[]", "null", "1", "[" * 10**6, '{"a":' * 10**6, '"' + "x" * 2**25 + '"', "{" + " " * 10**7,
    "\ufeff{}",
    '{"float": "x"}', '{"float": []}', "9" * 5000], ids=range(12))
def test_strange_manifest(store, text):
    folder = save(store, 1); (folder / ck.MANIFEST).write_text(text)
    start = time.perf_counter()
    assert ck.Checkpoint(folder).verify() and ck.Checkpoint(folder).verify(quick=True)
    assert time.perf_counter() - start < 5


def test_links_and_devices(store, tokenizer):
    "Never opened: a FIFO would hang, a link may lead anywhere"
    for name in NAMES:
        folder = save(store, 1, tokenizer); path = folder / name
        real = store.parent / "elsewhere"; path.rename(real)
        path.symlink_to(real)
        assert ck.Checkpoint(folder).verify() == [f"{path.name} is a link or a device, not a file"]
        path.unlink(); os.mkfifo(path); assert "a link or a device" in ck.Checkpoint(folder).verify()[0]
        path.unlink(); path.mkdir(); assert ck.Checkpoint(folder).verify()
    moved = folder.rename(store.parent / "moved"); folder.symlink_to(moved)
    assert ck.Checkpoint(folder).verify() == [f"{folder} is not a folder"]


def test_no_pickle_is_read(store):
    "A pickle in place of each file, with a manifest that fits: nothing but an error comes of it"
    class Bomb:
        def __reduce__(self): return Path.touch, (store.parent / "ran",)
    parts = {ck.MODEL: lambda c: c.load_model(), ck.OPTIM: lambda c: c.load_optimizer(),
             ck.STATE: lambda c: c.state["step"]}
    for name, load in parts.items():
        folder = save(store, 1); (folder / name).write_bytes(pickle.dumps(Bomb()))
        assert ck.Checkpoint(folder).verify()
        files = {n: {"bytes": (folder / n).stat().st_size, "sha256": ck.sha256(folder / n)} for n in parts}
        forge(folder, files=files)
        assert not ck.Checkpoint(folder).verify()
        with pytest.raises((SafetensorError, KeyError)): load(ck.Checkpoint(folder))
    (folder / ck.MANIFEST).write_bytes(pickle.dumps(Bomb()))
    assert ck.Checkpoint(folder).verify() and not (store.parent / "ran").exists()


def test_hints_are_only_hints(store):
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0)): save(store, step, val_loss=loss)
    stored = ck.list_checkpoints(store)
    for garbage in (b"", b"\xff" * 100, b"step_0000000099", b"../../etc/passwd", b"step_0000000002\n"):
        (store / "best").write_bytes(garbage); (store / "latest").write_bytes(garbage)
        assert (ck.pick(stored, "best", "RUN").step, ck.pick(stored, "latest", "RUN").step) == (2, 3)
    (store / "best").unlink(); (store / "best").mkdir(); assert stored.best.step == 2
    (store / "step_0000000002" / ck.MODEL).unlink(); assert ck.pick(stored, "best", "RUN").step == 3


def test_best_is_the_lowest(store):
    losses = [3.0, 2.0, math.nan, 2.5, None, 1.5, math.inf]
    for step, loss in enumerate(losses, 1):
        save(store, step, **({} if loss is None else {"val_loss": loss}))
        finite = [x for x in losses[:step] if x is not None and math.isfinite(x)]
        assert ck.list_checkpoints(store).best.state["val_loss"] == min(finite)
    assert (store / "latest").read_text() == "step_0000000007\n"
    ck.save_checkpoint(store, 8, weights(8), best=True)
    assert (store / "best").read_text() == "step_0000000008\n"


def test_pruning(store):
    for step in range(1, 8): save(store, step, val_loss=10.0 - step if step < 3 else 20.0, final=step == 4)
    assert ck.prune(store, 2) == [1, 3, 5] and ck.prune(store, 2) == []
    assert [c.step for c in ck.list_checkpoints(store)] == [2, 4, 6, 7]
    (store / "step_0000000007" / ck.STATE).unlink(); save(store, 8); save(store, 9)
    assert ck.prune(store, 2) == [6, 7] and litter(store) == []
    last = step_dir(store, 9) / ck.MODEL
    last.write_bytes(last.read_bytes()[:-1] + b"x")
    assert ck.prune(store, 1) == []


def test_writers_and_readers_at_once(store):
    "Two writing threads that prune, one reader: every look finds a whole checkpoint"
    save(store, 0); over, looks = threading.Event(), []
    def write(first):
        for step in range(first, first + 40, 2): save(store, step); ck.prune(store, 3)
    def read():
        while not over.is_set(): looks.append(marked(newest(store)))
    threads = [threading.Thread(target=write, args=(i,)) for i in (1, 2)]
    reader = threading.Thread(target=read)
    for t in [*threads, reader]: t.start()
    for t in threads: t.join()
    over.set(); reader.join()
    assert len(looks) > 3 and newest(store).step == 40 and litter(store) == []


def test_odd_tensors(store):
    base = torch.arange(12.0)
    tensors = {"bf16": torch.randn(3).bfloat16(), "f16": torch.randn(3).half(), "ints": torch.arange(3),
               "bool": torch.tensor([True]), "scalar": torch.tensor(math.nan), "empty": torch.zeros(0, 3),
               "empty2": torch.zeros(0, 3), "view": base[2:5], "other": base[4:9],
               "transposed": base.view(3, 4).T, "tied": base, "tied2": base.view(12)}
    c = ck.Checkpoint(ck.save_checkpoint(store, 1, tensors))
    loaded = c.load_model()
    assert loaded.keys() == tensors.keys() and c.state["ties"] == {"tied2": "tied"} and not c.verify()
    for name, t in tensors.items():
        assert loaded[name].dtype == t.dtype and loaded[name].shape == t.shape, name
        assert torch.equal(loaded[name].nan_to_num(5), t.nan_to_num(5)), name
    with pytest.raises(ValueError, match="holds no optimiser"):
        c.restore(Bare(tensors), torch.optim.SGD([nn.Parameter(base)]))


class Bare(nn.Module):
    def __init__(self, tensors):
        super().__init__()
        for name, t in tensors.items(): self.register_buffer(name, t.clone())


@pytest.mark.parametrize("make", [
    lambda ps: torch.optim.AdamW(ps, fused=True),
    lambda ps: torch.optim.AdamW(ps, foreach=False, amsgrad=True),
    lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9), lambda ps: torch.optim.Adafactor(ps),
    lambda ps: torch.optim.NAdam(ps), lambda ps: torch.optim.SGD(ps, lr=0.1)],
    ids="adamw amsgrad momentum adafactor nadam sgd".split())
def test_optimisers_go_on_as_if_nothing_happened(store, make):
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
    def steps(m, opt, n):
        for i in range(n):
            opt.zero_grad(); m(torch.full((3, 4), float(i))).square().mean().backward(); opt.step()
        return [p.clone() for p in m.parameters()]
    one = model(); opt = make(one.parameters()); steps(one, opt, 3)
    c = ck.Checkpoint(ck.save_checkpoint(store, 3, one.state_dict(), opt)); assert not c.verify()
    wrapped = torch.compile(nn.ModuleDict({"module": model()})["module"], backend="eager")
    two = nn.DataParallel(wrapped); other = make(list(two.parameters()))
    c.restore(two, other)
    assert all(torch.equal(a, b) for a, b in zip(steps(one, opt, 3), steps(wrapped._orig_mod, other, 3)))


def test_state_is_strict_json(store):
    state = {"loss": math.nan, "deep": [{"x": (1, 2.5, None, True)}], "inf": -math.inf,
             "text": "\u2028 \U0001f600 NaN", "number": torch.tensor(3.0)}
    folder = ck.save_checkpoint(store, 1, weights(1), state=state)
    json.loads((folder / ck.STATE).read_text(), parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))
    read = ck.Checkpoint(folder).state
    assert math.isnan(read["loss"]) and read["deep"] == [{"x": [1, 2.5, None, True]}]
    assert read["inf"] == -math.inf and read["text"] == state["text"] and read["number"] == 3.0
    assert read["step"] == 1 and read["format"] == 1
    with pytest.raises(ValueError, match=r"state.model is a Linear"):
        ck.save_checkpoint(store, 2, weights(2), state={"model": nn.Linear(1, 1)})
    assert from_json(json.dumps(to_json({"float": 1.5}))) == {"float": 1.5}


def test_a_dead_writers_folder_is_not_read(store):
    save(store, 1)
    shutil.copytree(step_dir(store, 1), store / ".tmp-step_0000000002-1-ab")
    shutil.copytree(step_dir(store, 1), store / ".del-step_0000000003-ab")
    assert [c.step for c in ck.list_checkpoints(store)] == [1]
    step_dir(store, 1).rename(store / ".old-step_0000000001")  # killed between the renames of a replacement
    assert newest(store).step == 1
    save(store, 5); assert litter(store) == [] and [c.step for c in ck.list_checkpoints(store)] == [1, 5]


def test_snapshot_holds_references():
    w = weights(1); assert take_snapshot(1, w).model["w"].data_ptr() == w["w"].data_ptr()
