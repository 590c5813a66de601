"""One run, whatever starts it and on however many ranks: the same losses, one state, nobody left behind."""
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import BIN, ROOT, TINY, alive, flags, until

from minigpt_wb.config import RunConfig
from minigpt_wb.run import Run, list_runs
from minigpt_wb.train import launch
from minigpt_wb.training.checkpoints import list_checkpoints
from minigpt_wb.training.evaluation import evaluate_checkpoint
from minigpt_wb.watch import RunFailed

NOTEBOOK = ROOT / "nbs/train.ipynb"
TORCHRUN = ["torchrun", "--nproc-per-node", "2", "--master-port"]
SAME = TINY | dict(max_steps=20, log_every=1, dropout=0.2, dtype="float32", learning_rate=3e-3)


def losses(run: Run) -> list[float]:
    return [row["loss"] for row in run.rows("train")]


def train_in(folder: Path, gpus: int = 1, **settings) -> Run:
    "Train to the end in spawned ranks"
    return launch(gpus=gpus, runs_dir=folder, progress=False, **settings).wait(progress=False)


def only(folder: Path) -> Run:
    "The one run in a folder"
    [run] = list_runs(folder)
    return run


def close(a: list[float], b: list[float], tolerance: float = 1e-5) -> bool:
    return len(a) == len(b) > 0 and all(abs(x - y) <= tolerance for x, y in zip(a, b))


# --- world sizes

@pytest.mark.parametrize("batch", [8, 7, 3], ids=["divides", "ragged", "a rank without samples"])
def test_same_losses_on_1_2_and_4_ranks(tmp_path, batch):
    "1 process with accumulation, 2 ranks and 4; micro-batches of 2, the last of 1; batch 3 makes only two"
    found = {}
    for gpus in (1, 2, 4):
        run = train_in(tmp_path, gpus=gpus, run_name=f"world{gpus}", global_batch_size=batch, **SAME)
        found[gpus] = losses(run)
    assert len(found[1]) == 20 and found[1][-1] < found[1][0]
    assert close(found[1], found[2]) and close(found[1], found[4]), found


def test_dropout_and_order_matter(tmp_path):
    "What the test above compares does depend on the seed"
    curves = []
    for seed in (1, 2):
        run = train_in(tmp_path, run_name=f"seed{seed}", seed=seed, **SAME | dict(max_steps=3))
        curves.append(losses(run))
    assert not close(*curves, tolerance=1e-3)


# --- doors

def test_every_door_gives_the_same_curve(shell, tmp_path):
    same = SAME | dict(global_batch_size=4)
    words = flags(**same)
    papermill = [w for name, value in same.items() for w in ("-p", name, str(value))]
    doors = {
        "alone": [sys.executable, "-m", "minigpt_wb.train", *words],
        "minigpt": ["minigpt", "train", "--gpus", "2", *words],
        "torchrun": [*TORCHRUN, "29611", "-m", "minigpt_wb.train", *words],
        "papermill": ["papermill", NOTEBOOK, tmp_path / "out.ipynb", *papermill, "-p", "gpus", "2"],
    }
    curves = {}
    for name, door in doors.items():
        where = ["-p", "runs_dir"] if name == "papermill" else ["--runs-dir"]
        done = shell(*door, *where, tmp_path / name)
        assert done.returncode == 0, (name, done.stdout[-2000:], done.stderr[-2000:])
        run = only(tmp_path / name)
        assert run.state == "finished", (name, run.status)
        curves[name] = losses(run)
    assert all(close(curve, curves["alone"]) for curve in curves.values()), curves
    linked = run.path / "train.ipynb"  # of the last door, papermill
    assert linked.resolve() == (tmp_path / "out.ipynb").resolve()


def test_torchrun_refuses_gpus(shell, tmp_path):
    done = shell(*TORCHRUN, "29612", "-m", "minigpt_wb.train", *flags(**TINY), "--gpus", "2")
    assert done.returncode != 0 and done.stderr.count("torchrun has started the ranks") == 1
    assert not (tmp_path / "runs").exists()


def test_lines_of_all_ranks_in_a_pipe(shell):
    done = shell("minigpt", "train", "--gpus", "2", *flags(**TINY | dict(max_steps=3, log_every=1)))
    line = (r"^GPU{0}:INFO \| \[GPU {0}\] Step \[\d/3\] \| Loss: \d+\.\d{{4}} \| LR: \d\.\d\de-\d\d \| "
            r"Grad Norm: \d+\.\d{{4}} \| ETA: \d+:\d\d$")
    for rank in (0, 1): assert len(re.findall(line.format(rank), done.stdout, re.M)) == 3, done.stdout
    alone = [sys.executable, "-m", "minigpt_wb.train", *flags(**TINY | dict(max_steps=1))]
    renamed = shell(*alone, env=os.environ | {"GPU_RANK": "5"})
    assert re.search(r"^GPU5:INFO \| \[GPU 5\] Step \[0/1\]", renamed.stdout, re.M)


# --- your own model

MODEL = '''
import torch
def build(cfg):
    class Bigram(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(cfg.vocab_size, 16)
            self.head = torch.nn.Linear(16, cfg.vocab_size, bias=False)
        def hidden(self, tokens, attention_mask=None, positions=None, cache=None): return self.table(tokens)
        @property
        def head_weight(self): return self.head.weight
        def forward(self, tokens): return self.head(self.hidden(tokens))
    return Bigram()
'''


def test_model_of_a_notebook_cell_on_two_ranks(tmp_path):
    import nbformat
    from nbclient import NotebookClient
    settings = TINY | dict(max_steps=5, log_every=1, runs_dir=str(tmp_path))
    cells = [MODEL, "from minigpt_wb.train import launch",
             f"run = launch(gpus=2, model_fn=build, **{settings!r})", "run.wait()\nrun.state"]
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    NotebookClient(nb, timeout=200, kernel_name="python3").execute()
    assert nb.cells[-1].outputs[-1]["data"]["text/plain"] == "'finished'"
    assert len(losses(only(tmp_path))) == 5


def test_model_by_name_under_torchrun(shell, tmp_path):
    (tmp_path / "my_model.py").write_text(MODEL)
    done = shell(*TORCHRUN, "29613", "-m", "minigpt_wb.train", *flags(**TINY), "--model-fn", "my_model:build",
                 env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr[-2000:]
    assert only(tmp_path / "runs").state == "finished"


# --- the end, good and bad

LONG = TINY | dict(max_steps=100000, log_every=1)


def start(folder: Path, *words, **more) -> subprocess.Popen:
    return subprocess.Popen([str(w) for w in words], cwd=folder, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True, start_new_session=True, **more)


def running(folder: Path) -> tuple[Run, list[int]]:
    "The run in `folder` once it has trained some steps, and the pids of its ranks"
    def trained():
        runs = list_runs(folder)
        return runs and len(runs[0].rows("train")) > 2 and runs[0]
    run = until(trained)
    return run, [beat["pid"] for beat in run.heartbeats().values()]


def test_ctrl_c_saves_and_ends_cleanly(tmp_path):
    program = start(tmp_path, BIN / "minigpt", "train", "--gpus", "2", *flags(**LONG))
    run, pids = running(tmp_path / "runs")
    os.killpg(program.pid, signal.SIGINT)
    assert program.wait(30) == 0, program.stderr.read()
    assert run.state == "stopped" and not any(map(alive, pids))
    assert (run.checkpoints_dir / f"step_{run.status['step']:010d}" / "MANIFEST.json").exists()


@pytest.mark.parametrize("gpus", [1, 2])
def test_sigterm_saves_with_status_75(tmp_path, gpus):
    program = start(tmp_path, sys.executable, "-m", "minigpt_wb.train", "--gpus", gpus, *flags(**LONG))
    run, pids = running(tmp_path / "runs")
    program.send_signal(signal.SIGTERM)
    assert program.wait(30) == 75, program.stderr.read()
    assert run.state == "stopped" and (run.checkpoints_dir / "latest").exists() and not any(map(alive, pids))


def test_kill_of_a_rank_is_named(tmp_path):
    program = start(tmp_path, BIN / "minigpt", "train", "--gpus", "2", *flags(**LONG))
    run, pids = running(tmp_path / "runs")
    os.kill(run.heartbeats()[1]["pid"], signal.SIGKILL)
    until(lambda: not any(map(alive, pids)), 2)
    assert program.wait(30) == 1
    assert (run.state, run.status["failed_rank"]) == ("failed", 1)
    assert "rank 1 was killed by SIGKILL" in run.error


@pytest.mark.parametrize("victim", ["papermill", "kernel"])
def test_kill_of_papermill_or_its_kernel(tmp_path, victim):
    words = [w for name, value in LONG.items() for w in ("-p", name, str(value))]
    program = start(tmp_path, BIN / "papermill", NOTEBOOK, tmp_path / "out.ipynb", *words, "-p", "gpus", "2",
                    "-p", "runs_dir", tmp_path / "runs")
    run, pids = running(tmp_path / "runs")
    os.kill(program.pid if victim == "papermill" else run.status["pid"], signal.SIGKILL)
    until(lambda: not any(map(alive, pids)), 2 if victim == "kernel" else 4)
    program.wait(30)
    until(lambda: run.state == "failed", 5)
    assert "launcher died" in run.error


# --- precision, patience, memory

def test_float16_overflow_is_counted_and_does_not_advance(tmp_path):
    "A loss scale of 65536 overflows at once with weights this large; the schedule still takes every step"
    run = train_in(tmp_path, **TINY | dict(max_steps=6, log_every=1, dtype="float16", init_std=2.0))
    skipped = [row for row in run.rows("event") if row.get("event") == "skipped step"]
    assert skipped and run.status["step"] == 6
    assert [row["step"] for row in run.rows("train")] == [1, 2, 3, 4, 5, 6]
    assert run.rows("train")[-1]["samples"] == (6 + len(skipped)) * 2


def test_patience_stops_early(tmp_path):
    settings = dict(max_steps=500, eval_every=5, patience=2, min_delta=5.0, log_every=5)
    run = train_in(tmp_path, **TINY | settings)
    assert run.state == "finished" and run.status["step"] == 15  # the first counts, then two without progress
    assert [row["step"] for row in run.rows("eval")] == [5, 10, 15, 15]


def test_text_without_line_breaks(tmp_path):
    "The usual prompt of a sample is a line break, which this vocabulary does not have"
    (tmp_path / "flat.txt").write_text("no line ever ends in this text. " * 100)
    settings = TINY | dict(data=str(tmp_path / "flat.txt"), tokenizer="chars", max_steps=2)
    run = train_in(tmp_path / "runs", **settings)
    assert run.state == "finished" and run.rows("sample")
    with pytest.raises(ValueError, match="'z'"):
        launch(runs_dir=tmp_path / "more", sample_prompt="zzz", **settings)
    assert not (tmp_path / "more").exists()


def test_broken_weights_are_not_saved(tmp_path):
    "Every step is to be saved, and the last ones are not numbers any more: the good ones stay"
    hot = dict(max_steps=40, learning_rate=1e37, warmup_steps=0, max_grad_norm=0, log_every=30, save_every=1)
    with pytest.raises(RunFailed, match="not finite|loss"): train_in(tmp_path, run_name="hot", **TINY | hot)
    stored = list_checkpoints(Run.open("hot", tmp_path))
    for c in stored: assert all(weights.isfinite().all() for weights in c.load_model("cpu").values()), c


def test_error_of_a_model_is_no_bad_input(shell, tmp_path):
    "A ValueError out of somebody's forward: status 1 and its traceback, not status 2 and a line"
    broken = MODEL.replace("return self.table(tokens)", "raise ValueError('boom')")
    (tmp_path / "broken.py").write_text(broken)
    done = shell("minigpt", "train", *flags(**TINY), "--model-fn", "broken:build")
    assert done.returncode == 1 and "in hidden" in done.stderr and "boom" in done.stderr
    assert only(tmp_path / "runs").state == "failed"


def test_evaluation_of_a_text_that_has_changed(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven. " * 100)
    run = train_in(tmp_path / "runs", **TINY | dict(data=str(text), tokenizer="chars", max_steps=2))
    assert abs(evaluate_checkpoint(run)["loss"] - run.rows("eval")[-1]["val_loss"]) < 1e-4
    text.write_text("one two three four five six eight! " * 100)
    with pytest.raises(ValueError, match="has changed since"): evaluate_checkpoint(run)


def test_goldens(tmp_path):
    "Twenty steps on toy, which a refactor must not move; `python tests/test_training.py` writes them"
    assert close(golden_losses(tmp_path), json.loads(GOLDEN.read_text()), tolerance=2e-4)


GOLDEN = ROOT / "tests/goldens/debug.json"


def golden_losses(folder: Path) -> list[float]:
    run = train_in(folder, preset="debug", max_steps=20, learning_rate=3e-3, eval_every=0, dropout=0.1,
                   data="toy", log_level="info", tensorboard=False, max_new_tokens=4)
    return [round(loss, 6) for loss in losses(run)]


# --- bad input

BAD = {
    "n_head=12 does not divide d_model=500": ["--n-head", "12", "--d-model", "500"],
    "did you mean 'n_layer'": ["--n-layr", "3"],
    "learning_rate=inf": ["--learning-rate", "inf"],
    "learning_rate=nan": ["--learning-rate", "nan"],
    "batch_size=0": ["--batch-size", "0"],
    "nothing.txt": ["--data", "nothing.txt"],
    "empty.txt": ["--data", "empty.txt"],
    "binary.txt": ["--data", "binary.txt"],
    "offset 12": ["--data", "latin.txt"],
    "context_length": ["--data", "short.txt"],
    "validation": ["--data", "small.txt", "--val-fraction", "0.001"],
    "Without network, copy its": ["--data", "hf:nobody/nothing"],
    "'taken' exists": ["--run-name", "taken"],
    "vocab_size=10": ["--vocab-size", "10"],
    "no_such_module": ["--model-fn", "no_such_module:build"],
    "model_fn='foo'": ["--model-fn", "foo"],
    "objective='foo'": ["--objective", "foo"],
    "gpus='many'": ["--gpus", "many"],
    "preset 'smal'": ["--preset", "smal"],
    "lost.yaml": ["--config", "lost.yaml"],
}


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty.txt").write_bytes(b"")
    (folder / "binary.txt").write_bytes(b"text\0more" * 100)
    (folder / "latin.txt").write_bytes(b"twelve bytes\xe9 " * 9)
    (folder / "short.txt").write_text("too short")
    (folder / "small.txt").write_text("a few words only, " * 40)
    Run.create(RunConfig.preset("debug"), folder / "runs", "taken")
    return folder


@pytest.mark.parametrize("says", BAD)
def test_bad_input(says, bad_files, capfd, monkeypatch):
    "Status 2, a line that names the trouble, and no new run"
    from minigpt_wb.train import main
    monkeypatch.chdir(bad_files)
    before = sorted((bad_files / "runs").iterdir())
    base = flags(**{k: v for k, v in TINY.items() if f"--{k.replace('_', '-')}" not in BAD[says]})
    assert main([*base, *BAD[says]]) == 2
    assert says in capfd.readouterr().err
    assert sorted((bad_files / "runs").iterdir()) == before


def test_unknown_parameter_stops_papermill(shell, tmp_path):
    wrong = ["-p", "n_layr", "3", "-p", "runs_dir", tmp_path / "runs"]
    done = shell("papermill", NOTEBOOK, tmp_path / "out.ipynb", *wrong)
    assert done.returncode == 1 and "did you mean 'n_layer'" in done.stderr
    assert not (tmp_path / "runs").exists()


if __name__ == "__main__":
    import tempfile
    GOLDEN.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as d: GOLDEN.write_text(json.dumps(golden_losses(Path(d))) + "\n")
