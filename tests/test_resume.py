"Killed, stopped, forked, on other ranks: a run goes on as if nothing had been, or says why it does not"
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import BIN, ROOT, TINY, alive, flags, until

from minigpt_wb.config import RunConfig
from minigpt_wb.ddp.ranks import start_ranks
from minigpt_wb.cli import main as cli
from minigpt_wb.run import Run, list_runs
from minigpt_wb.train import launch, main
from minigpt_wb.training.checkpoints import find_checkpoint, list_checkpoints
from minigpt_wb.training.entry import open_run, ready
from minigpt_wb.training.ledger import resumed_at, samples_read
from minigpt_wb.training.resume import certificate, find_start, resumed_config
from minigpt_wb.verify import die_half_way, verify_resume

SAME = TINY | dict(log_every=1, dropout=0.2, dtype="float32", learning_rate=3e-3, ledger=True)
SHORT = dict(corpus_tokens=1500, val_fraction=0.1)  # 41 windows: an epoch ends within the run
TORCHRUN = ["torchrun", "--nproc-per-node", "2", "--master-port"]


def train(folder: Path, name: str, **settings) -> Run:
    "A run in this process, to its end"
    settings = {"run_name": name, **settings}
    assert main([*flags(**settings), "--runs-dir", str(folder)]) == 0
    return Run(folder / name)


def resume(folder: Path, *words: object) -> int:
    return main(["--resume", *map(str, words), "--runs-dir", str(folder)])


def losses(run: Run) -> dict[int, float]: return {row["step"]: row["loss"] for row in run.rows("train")}


def close(a: dict[int, float], b: dict[int, float]) -> bool:
    return a.keys() == b.keys() and all(abs(a[step] - b[step]) < 1e-5 for step in a)


def files(folder: Path) -> dict[Path, bytes]:
    "What lies in a folder, apart from caches and locks"
    found = (p for p in folder.rglob("*") if p.is_file() and "cache" not in p.parts)
    return {p: p.read_bytes() for p in found if not p.name.endswith(".lock")}


# --- P1, P2, P4, P12

@pytest.mark.parametrize("batch", [7, 1], ids=["not divisible by the ranks", "fewer samples than ranks"])
def test_killed_and_resumed_on_the_same_and_on_other_ranks(batch):
    "Dropout on, an epoch ends inside a batch: bit-identical on 2 ranks, the same samples on 1 and 3"
    steps = 10 if batch == 7 else 6
    settings = {k: v for k, v in (SAME | SHORT).items() if k != "preset"}
    verdict = verify_resume(steps=steps, worlds=(2, 1, 3), global_batch_size=batch, **settings)
    assert verdict.passed, verdict.rows()
    same, *others = verdict.cases
    assert (same.weights, same.moments, same.rng_equal) == (0.0, 0.0, True)
    assert {c.samples for c in verdict.cases} == {steps * batch} and all(c.tokens_equal for c in others)


def test_one_two_three_one_rank_with_kills_between(tmp_path):
    "The ledger is [0, c) exactly once, the curve is the one of a run that nobody killed"
    settings = SAME | SHORT | dict(max_steps=12, global_batch_size=7)
    straight = train(tmp_path, "straight", **settings)
    preset = RunConfig.preset(settings.pop("preset"))
    cfg, cache = ready(preset.override(**settings), progress=False)
    run, start = open_run(cfg, None, tmp_path, "killed"), None
    for world, steps in ((1, 3), (2, 4), (3, 2)):
        args = resumed_config(start) if start else cfg, run, cache, steps, (), start
        start_ranks(die_half_way, args, world, run).wait()
        assert run.state == "failed" and "SIGKILL" in run.error
        run.release()
        start = find_start(run)
        run = open_run(cfg, start)
    run.release()
    assert resume(tmp_path, "killed") == 0
    assert resumed_at(run) == [3, 7, 9] and run.state == "finished"
    assert samples_read(run) == samples_read(straight) == 12 * 7
    ours = losses(run)  # a step whose process was killed has no row where it was not reported
    assert close({step: losses(straight)[step] for step in ours}, ours) and max(ours) == 12
    assert [e["step"] for e in find_checkpoint(run).state["lineage"]] == [3, 7, 9]


def test_another_batch_keeps_the_global_batch(tmp_path):
    "Accumulation follows, the curve stays; the certificate says that dropout would not"
    settings = SAME | dict(dropout=0.0, save_every=4)
    straight = train(tmp_path, "a", **settings | dict(max_steps=8, global_batch_size=6))
    before = losses(straight)
    assert resume(tmp_path, "a@4", "--batch-size", 3) == 0
    assert close(before, losses(straight)) and samples_read(straight) == 48
    said = certificate(straight).verdicts["steps"]
    assert "2 micro-batches of up to 3 over 1 rank, the accumulation follows" in said
    assert resume(tmp_path, "a@4", "--grad-accum-steps", 2, "--fork", "--run-name", "b") == 0
    assert Run(tmp_path / "b").config["global_batch_size"] == 4


def test_torchrun_resumes_what_one_process_began(shell, tmp_path):
    settings = SAME | dict(global_batch_size=6)
    straight = train(tmp_path / "runs", "straight", **settings | dict(max_steps=8))
    run = train(tmp_path / "runs", "a", **settings | dict(max_steps=8, save_every=4))
    done = shell(*TORCHRUN, "29641", "-m", "minigpt_wb.train", "--resume", "a@4")
    assert done.returncode == 0, done.stderr[-3000:]
    assert close(losses(straight), losses(run)) and samples_read(run) == 48
    assert "world_size  1 -> 2" in done.stdout and done.stdout.count("resume of a@4") == 1
    refused = shell(*TORCHRUN, "29642", "-m", "minigpt_wb.train", "--resume", "a@5")
    assert refused.returncode != 0 and refused.stderr.count("there is no step 5; there are steps 4, 8") == 1


# --- a run that was killed goes on from the notebook

def test_killed_run_resumes_from_the_notebook(shell, tmp_path):
    "kill -9 of everything, then one parameter"
    words = flags(**SAME | dict(max_steps=10**6, save_every=5))
    program = subprocess.Popen([BIN / "minigpt", "train", "--gpus", "2", *words], cwd=tmp_path,
                               start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    run = until(lambda: next((r for r in list_runs(tmp_path / "runs") if r.rows("save")), None))
    os.killpg(program.pid, signal.SIGKILL)
    program.wait()
    until(lambda: not any(alive(b["pid"]) for b in run.heartbeats().values()), 5)
    acknowledged = max(row["step"] for row in run.rows("save"))
    steps = find_checkpoint(run).step + 3
    done = shell("papermill", ROOT / "nbs/train.ipynb", tmp_path / "out.ipynb",
                 "-p", "runs_dir", tmp_path / "runs", "-p", "resume", "latest", "-p", "max_steps", str(steps))
    assert done.returncode == 0, done.stderr[-3000:]
    assert run.state == "finished" and run.status["step"] == steps and resumed_at(run)[0] >= acknowledged
    assert samples_read(run) == steps * run.config["global_batch_size"]
    assert "resume of" in (tmp_path / "out.ipynb").read_text()


# --- going back, forks

def test_going_back_takes_the_later_steps_back(tmp_path):
    run = train(tmp_path, "a", **SAME | dict(max_steps=8, save_every=2, keep_last=9))
    run.stop()  # asked of a run that has ended: nobody's business any more
    assert resume(tmp_path, "a@4", "--max-steps", 6) == 0
    assert [c.step for c in list_checkpoints(run)] == [2, 4, 6] and run.state == "finished"
    aside = sorted(p.name for p in run.checkpoints_dir.glob("superseded/*/*"))
    assert aside == ["step_0000000006", "step_0000000008"]
    assert [row["step"] for row in run.rows("train")] == list(range(1, 7)) and samples_read(run) == 6 * 2


def test_a_fork_leaves_its_parent_as_it_is(tmp_path):
    parent = train(tmp_path, "a", **SAME | dict(max_steps=6, save_every=3))
    before = files(parent.path)
    assert resume(tmp_path, "a@3", "--fork", "--run-name", "b", "--learning-rate", 0.1) == 0
    assert files(parent.path) == before
    fork = Run(tmp_path / "b")
    assert fork.status["parent"] == {"run": "a", "step": 3} and sorted(losses(fork)) == [4, 5, 6]
    assert samples_read(fork, first=6) == 6
    assert certificate(fork).verdicts["weights"].startswith("CHANGE by request: learning_rate")
    [event] = find_checkpoint(fork).state["lineage"]
    assert (event["kind"], event["run"], event["step"]) == ("fork", "a", 3)


def test_longer_and_other_length(tmp_path):
    "A constant rate: twice the steps are the steps of the longer run; epochs take the place of max_steps"
    settings = SAME | dict(lr_schedule="constant")
    long = train(tmp_path, "long", **settings | dict(max_steps=8))
    run = train(tmp_path, "short", **settings | dict(max_steps=4))
    assert resume(tmp_path, "short", "--max-steps", 8) == 0
    assert close(losses(long), losses(run)) and run.status["total_steps"] == 8
    assert torch.equal(*(find_checkpoint(r).load_model()["tok_embed.weight"] for r in (long, run)))
    assert resume(tmp_path, "short", "--epochs", 0.1) == 0 and run.config["max_steps"] is None


# --- signals

def start(folder: Path, *words) -> tuple[subprocess.Popen, Run]:
    "A program that trains, once it does"
    program = subprocess.Popen([str(w) for w in words], cwd=folder, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True, start_new_session=True)
    trains = lambda: next((r for r in list_runs(folder / "runs") if len(r.rows("train")) > 2), None)
    return program, until(trains)


LONG = SAME | dict(max_steps=10**6)
BUSY = '''
import threading, time
from minigpt_wb.model.gpt import GPT
def read():
    while True: sum(range(10000)); time.sleep(0.001)
def build(cfg):
    for _ in range(2): threading.Thread(target=read, daemon=True).start()
    return GPT(cfg)
'''

@pytest.mark.parametrize("number, more",
                         [(signal.SIGTERM, []), (signal.SIGUSR1, ["--model-fn", "busy:build"])],
                         ids=["SIGTERM", "SIGUSR1 with reading threads"])
def test_a_signal_to_one_rank_stops_all_at_one_step(tmp_path, number, more):
    (tmp_path / "busy.py").write_text(BUSY)
    program, run = start(tmp_path, BIN / "minigpt", "train", "--gpus", "2", *flags(**LONG), *more)
    os.kill(run.heartbeats()[1]["pid"], number)
    begun = time.monotonic()
    assert program.wait(30) == 0 and time.monotonic() - begun < 10, program.stderr.read()
    assert run.state == "stopped" and find_checkpoint(run).step == run.status["step"]
    last = r"stopped \(signal\) at step (\d+)"
    at = [int(re.findall(last, run.log_path(rank).read_text())[0]) for rank in (0, 1)]
    assert at == [run.status["step"]] * 2 and samples_read(run) == at[0] * 4


def test_a_signal_before_the_first_step_is_safe(tmp_path):
    "As soon as the run's directory is there: torch is still being imported by the ranks"
    program = subprocess.Popen([BIN / "minigpt", "train", "--gpus", "2", *flags(**LONG)], cwd=tmp_path,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    run = until(lambda: next((r for r in list_runs(tmp_path / "runs") if r.status.get("world_size")), None))
    program.send_signal(signal.SIGTERM)
    assert program.wait(60) == 75, program.stderr.read()
    assert run.state == "stopped" and find_checkpoint(run).step == run.status["step"]
    assert main(["--resume", str(run.path), "--max-steps", str(run.status["step"] + 3)]) == 0
    assert run.state == "finished"


def test_a_signal_in_an_evaluation(tmp_path):
    "A long one: 10,000 tokens after every step; the stop does not wait for its end"
    text = tmp_path / "text.txt"
    text.write_text("".join(f"sentence number {i}, which nobody reads twice.\n" for i in range(40000)))
    more = dict(data=text, val_fraction=0.5, eval_every=1, max_steps=10**6)
    program = subprocess.Popen([BIN / "minigpt", "train", "--gpus", "2", *flags(**SAME | more)],
                               cwd=tmp_path, start_new_session=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    run = until(lambda: next((r for r in list_runs(tmp_path / "runs")
                              if r.heartbeats().get(1, {}).get("phase") == "eval"), None))
    os.killpg(program.pid, signal.SIGTERM)
    begun = time.monotonic()
    assert program.wait(30) == 75, program.stderr.read()
    assert time.monotonic() - begun < 8 and run.state == "stopped" and not run.rows("eval")
    assert find_checkpoint(run).step == 1


def test_a_signal_while_the_text_is_prepared(tmp_path):
    "Nothing to save yet: the same status, to be begun again"
    (tmp_path / "text.txt").write_text("a line of a text that takes a while to read\n" * 10_000_000)
    program = subprocess.Popen([BIN / "minigpt", "train", "--data", "text.txt"], cwd=tmp_path,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    until(lambda: list((tmp_path / "cache/datasets").glob(".*.part")))
    program.send_signal(signal.SIGTERM)
    assert program.wait(60) == 75, program.stderr.read()
    assert not (tmp_path / "runs").exists() and not list((tmp_path / "cache/datasets").glob(".*.part"))


# --- what a checkpoint costs, and what goes wrong with it

def test_a_failed_write_is_raised_at_the_next_step(tmp_path):
    "Files of at most 20 kB: the first checkpoint cannot be written, and the run says so"
    program = f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); " \
              f"from minigpt_wb.train import main; sys.exit(main({flags(**LONG | dict(save_every=3))!r}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True,
                          timeout=100)
    [run] = list_runs(tmp_path / "runs")
    assert done.returncode == 1 and "step 3 could not be saved" in run.error and "bytes are free" in run.error
    assert not list_checkpoints(run) and not list(run.checkpoints_dir.glob(".tmp*"))
    assert main(["--resume", str(run.path)]) == 2  # and there is nothing to resume


def test_steps_kept_for_good(tmp_path):
    run = train(tmp_path, "a", **SAME | dict(max_steps=13, save_every=1, keep_last=2, keep_every=5))
    assert [c.step for c in list_checkpoints(run)] == [5, 10, 12, 13]
    row = run.rows("save")[0]
    assert row["bytes"] > 10_000 and row["path"] == "step_0000000001"
    assert 0 <= row["stall_s"] <= row["write_s"]


def test_two_trainers(tmp_path, capfd):
    settings = flags(**LONG | dict(save_every=10, keep_last=1000))
    program, run = start(tmp_path, BIN / "minigpt", "train", *settings)
    until(lambda: run.rows("save"))
    assert main(["--resume", str(run.path)]) == 2
    assert f"is being trained by process {program.pid} on {os.uname().nodename}" in capfd.readouterr().err
    with pytest.raises(ValueError, match="is being trained by process"): launch(resume=run.path)
    steps = find_checkpoint(run).step + 1
    assert resume(tmp_path, run.path, "--fork", "--run-name", "b", "--max-steps", steps) == 0
    program.send_signal(signal.SIGTERM)
    assert program.wait(30) == 75 and run.state == "stopped"


# --- another text

def test_a_changed_text_stops_unless_it_is_accepted(tmp_path, capfd):
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven. " * 100)
    run = train(tmp_path / "runs", "a", **SAME | dict(data=text, tokenizer="chars", max_steps=4))
    ids = find_checkpoint(run).config["vocab_size"]
    text.write_text("seven six five four three two one. " * 120)
    assert resume(tmp_path / "runs", "a", "--max-steps", 8) == 2
    said = capfd.readouterr().err
    assert "the data of a@4 has changed (text)" in said and "accept_changed_data" in said
    assert run.state == "finished"
    assert resume(tmp_path / "runs", "a", "--max-steps", 8, "--accept-changed-data") == 0
    assert run.status["step"] == 8 and find_checkpoint(run).config["vocab_size"] == ids
    assert "CHANGES (data)" in certificate(run).verdicts["samples"]
    assert resume(tmp_path / "runs", "a", "--max-steps", 9) == 0  # it is the text of the run now


# --- bad input

@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    "A run of 6 steps, one without a checkpoint, and files that are none"
    folder = tmp_path_factory.mktemp("stored")
    train(folder, "a", **SAME | dict(max_steps=6, save_every=3))
    Run.create(RunConfig.preset("debug"), folder, "empty").set_status(state="failed", error="power cut")
    torch.save({"epochs": 3, "net": {"w": torch.ones(2)}}, folder / "unknown.pt")
    return folder


BAD = {
    "the newest run, empty, has no checkpoint in": ["latest"],
    "the newest run that has one is a": ["latest"],
    "empty has no checkpoint yet": ["empty"],
    "no run 'b'": ["b"],
    "no run 'nowhere/at/all'": ["nowhere/at/all"],
    "a@4: there is no step 4; there are steps 3, 6": ["a@4"],
    "n_layer=3 cannot change on resume: it is 1 in a@6": ["a", "--n-layer", "3"],
    "What may change: dropout, attention": ["a", "--n-layer", "3"],
    "tokenizer=chars cannot change on resume: it is bytes": ["a", "--tokenizer", "chars"],
    "the data of a@6 has changed": ["a", "--data", "stdlib", "--max-steps", "9"],
    "holds moments of AdamW, which SGD cannot go on from": ["a", "--optimizer", "sgd", "--max-steps", "9"],
    "preset='small' with resume": ["a", "--preset", "small"],
    "run_name='c' with resume: the run has a name": ["a", "--run-name", "c"],
    "run 'a' exists": ["a", "--fork", "--run-name", "a", "--max-steps", "9"],
    "unknown.pt' is a file of another system": ["unknown.pt"],
    "did you mean 'max_steps'": ["a", "--max-step", "9"],
    "'last' is not latest, best or a step": ["a@last"],
}


@pytest.mark.parametrize("says", BAD)
def test_bad_input(says, stored, capfd, monkeypatch):
    "Status 2, a line that names the trouble, no new run, and nothing changed in the old one"
    monkeypatch.chdir(stored)
    before = files(stored)
    assert resume(stored, *BAD[says]) == 2
    assert says in capfd.readouterr().err
    assert files(stored) == before


@pytest.mark.parametrize("more", [[], ["--max-steps", "6"], ["--max-steps", "2"],
                                  ["--fork", "--run-name", "c"]])
def test_nothing_left_to_train(more, stored, capfd):
    assert resume(stored, "a", *more) == 0
    assert "nothing is left to train" in capfd.readouterr().err and not (stored / "c").exists()
    run = launch(resume="a", runs_dir=stored, progress=False)
    assert run.wait(progress=False).state == "finished" and run.status["step"] == 6


def test_fork_without_resume(tmp_path, capfd):
    assert main(["--fork", "--runs-dir", str(tmp_path)]) == 2
    assert "give resume as well" in capfd.readouterr().err


def test_reset_optimizer(tmp_path):
    run = train(tmp_path, "a", **SAME | dict(max_steps=4))
    assert resume(tmp_path, "a", "--optimizer", "sgd", "--reset-optimizer", "--max-steps", 6) == 0
    assert find_checkpoint(run).state["optimizer"]["type"] == "SGD" and run.status["step"] == 6
    assert resume(tmp_path, "a", "--max-steps", 8) == 0  # with its momentum


def test_a_damaged_newest_is_passed_over(tmp_path, capfd):
    run = train(tmp_path, "a", **SAME | dict(max_steps=6, save_every=2))
    weights = run.checkpoints_dir / "step_0000000006/model.safetensors"
    data = bytearray(weights.read_bytes()); data[-3] ^= 4; weights.write_bytes(data)
    before = losses(run)
    assert resume(tmp_path, "a") == 0
    said = capfd.readouterr()
    assert "instead of step_0000000006 (model.safetensors was changed" in said.err
    assert "were put aside: 6" in said.out
    assert losses(run) == before and samples_read(run) == 12
    assert [c.step for c in list_checkpoints(run)] == [2, 4, 6]


# --- from other systems, and the story

def test_what_another_system_saved_goes_on(tmp_path, capfd):
    "Out as nanoGPT's file and in again as a run: it resumes, with its moments, and says where it comes from"
    shape = dict(position="learned", dropout=0.0)
    train(tmp_path, "a", **SAME | shape | dict(max_steps=4))
    out = tmp_path / "out"; out.mkdir()
    words = ["--runs-dir", str(tmp_path)]
    assert cli(["checkpoints", "export", "a", "--layout", "nanogpt", "--output", str(out), *words]) == 0
    assert capfd.readouterr().out.splitlines()[-1] == str(out / "ckpt.pt")
    assert cli(["checkpoints", "import", str(out / "ckpt.pt"), "--tokenizer", "bytes", "--data", "toy",
                "--run-name", "b", *words]) == 0
    said = capfd.readouterr()
    assert said.out.splitlines() == [str(tmp_path / "b")] and "both begin anew" in said.err
    assert resume(tmp_path, "b", *flags(max_steps=8, batch_size=2, log_every=1, ledger=True)) == 0
    run = Run(tmp_path / "b")
    assert [e["kind"] for e in find_checkpoint(run).state["lineage"]] == ["import", "resume"]
    assert sorted(losses(run)) == [5, 6, 7, 8] and samples_read(run) == 8
    shown = certificate(run)
    assert shown.verdicts["weights"].startswith("those of the file") and "dtype" not in shown.differences
    assert cli(["checkpoints", "import", str(tmp_path / "b" / "config.yaml"), *words]) == 2
    assert "cannot be read" in capfd.readouterr().err


def test_verify_resume_in_a_shell(shell):
    settings = {k: v for k, v in TINY.items() if k not in ("eval_every", "save_every")}
    done = shell("minigpt", "checkpoints", "verify-resume", "--worlds", "1", "--steps", "4",
                 *flags(**settings | dict(dropout=0.1)))
    assert done.returncode == 0, done.stderr[-2000:]
    header, row = done.stdout.splitlines()
    assert row.startswith("1 to 1 ranks, killed by SIGKILL") and row.endswith("passed")
    assert row.count("equal to the last bit") == 2


def test_the_story(shell, tmp_path):
    "nbs/checkpoints.ipynb from beginning to end"
    done = shell("papermill", ROOT / "nbs/checkpoints.ipynb", tmp_path / "out.ipynb",
                 "-p", "runs_dir", tmp_path / "runs")
    assert done.returncode == 0, done.stderr[-3000:]
    assert {r.name for r in list_runs(tmp_path / "runs")} == {"story", "hotter", "came-back"}
    assert "passed" in (tmp_path / "out.ipynb").read_text()
    assert samples_read(Run(tmp_path / "runs/story")) == 72
