"""A run directory under several processes, kills, garbage and full disks."""
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time

import pytest

from minigpt_wb import run as module
from minigpt_wb.config import RunConfig
from minigpt_wb.run import Run, list_runs
from minigpt_wb.watch import RunFailed

TINY = RunConfig.preset("tiny")
spawn = multiprocessing.get_context("spawn")


@pytest.fixture
def run(tmp_path): return Run.create(TINY, tmp_path, "a")


def child(code, *argv):
    command = [sys.executable, "-c", "import sys; from minigpt_wb.watch import Run\n" + code, *map(str, argv)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_rows_of_many_writers_do_not_mix(run):
    code = "for i in range(300): Run(sys.argv[1]).log_row('train', who=sys.argv[2], step=i, text='x' * 3000)"
    writers = [child(code, run.path, n) for n in range(4)]
    rows, offset = [], 0
    while any(w.poll() is None for w in writers):
        new, offset = run.follow(offset)
        rows += new
        time.sleep(0.01)
    rows += run.follow(offset)[0]
    assert len(rows) == 1200 == len(run.rows())
    for n in range(4): assert [r["step"] for r in rows if r["who"] == str(n)] == list(range(300))
    for w in writers: w.communicate()


def test_a_torn_line_costs_only_itself(run):
    path = run.path / "metrics.jsonl"
    run.log_row("train", step=1)
    whole = path.read_bytes()
    for cut in range(1, len(whole)):
        path.write_bytes(whole + whole[:cut])
        rows, offset = run.follow()
        assert [r["step"] for r in rows] == [1] and offset == len(whole)
        run.log_row("train", step=2)
        expected = [1, 1, 2] if cut == len(whole) - 1 else [1, 2]  # all but the line break is a whole row
        assert [r["step"] for r in run.rows()] == expected
    path.write_bytes(b'\xff\xfe\n[1]\n"x"\n' + b"[" * 100_000 + b"\n\n" + whole)
    assert [r["step"] for r in run.rows()] == [1]


def test_values_come_back(run):
    import numpy as np
    values = dict(i=1, f=0.1, nan=float("nan"), inf=-float("inf"), b=True, none=None,
                  text='ä "|"\n\u2028\udc80', deep=[{"x": [1.5]}])
    run.log_row("train", **values, array=np.float32([1, 2]), scalar=np.float64("inf"), path=run.path)
    [row] = run.rows()
    assert repr({k: row[k] for k in values}) == repr(values)
    assert (row["array"], row["scalar"], row["path"]) == ([1, 2], float("inf"), str(run.path))
    json.loads((run.path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)  # legal JSON


def test_names_are_claimed_once(tmp_path):
    code = "from minigpt_wb.config import RunConfig\n"
    code += "print(Run.create(RunConfig.preset('tiny'), sys.argv[1], {}).name)"
    free = [child(code.format("preset='tiny'"), tmp_path) for _ in range(4)]
    assert len({p.communicate()[0] for p in free}) == 4
    taken = [child(code.format("'mine'"), tmp_path) for _ in range(3)]
    outcomes = [(p.communicate(), p.returncode) for p in taken]
    assert sorted(code for _, code in outcomes) == [0, 1, 1]
    assert all("run 'mine' exists in" in said[1] for said, code in outcomes if code)
    assert len(list_runs(tmp_path)) == 5


def test_a_run_that_cannot_be_made_leaves_nothing(tmp_path, monkeypatch):
    def full(*_): raise OSError(28, "No space left on device")
    monkeypatch.setattr(module, "write_atomically", full)
    with pytest.raises(OSError): Run.create(TINY, tmp_path / "runs", "a")
    assert list((tmp_path / "runs").iterdir()) == []


def test_killed_launcher_is_seen_even_as_a_zombie(run):
    process = child("import os, time; Run(sys.argv[1]).set_status(state='running', pid=os.getpid())\n"
                    "print('up', flush=True); time.sleep(60)", run.path)
    process.stdout.readline()
    assert run.state == "running"
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead and not yet collected
    assert run.state == "failed" and "launcher died" in run.error and "no rank had started" in run.error
    with pytest.raises(RunFailed, match="launcher died"): run.wait(progress=False)
    process.communicate()


def test_a_number_used_again_is_not_the_launcher(run):
    run.set_status(state="running", pid=os.getpid())
    run.set_status(pid_started="an earlier process")
    assert run.state == "failed"


def test_silence_from_elsewhere(run, monkeypatch):
    run.set_status(state="running", pid=1, host="elsewhere")
    run.heartbeat(0, 5, "train")
    assert run.state == "running"
    monkeypatch.setattr(module, "SILENT_S", -1.0)
    assert run.state == "failed" and "nothing from elsewhere since" in run.error
    run.set_status(state="preparing")  # reading a corpus takes as long as it takes
    assert run.state == "preparing"


def test_end_between_two_looks_is_an_end(run, monkeypatch):
    "The launcher writes `finished` and ends just after a reader has read `running`"
    run.set_status(state="running", pid=os.getpid())
    run.set_status(pid_started="gone")
    stored = run.stored_status()
    looks = iter([stored, stored | {"state": "finished"}])
    monkeypatch.setattr(Run, "stored_status", lambda self: next(looks))
    assert run.state == "finished"


def change(path, name):
    for i in range(100): Run(path).set_status(**{name: i})


def test_two_writers_lose_nothing(run):
    writers = [spawn.Process(target=change, args=(run.path, name)) for name in ("step", "other")]
    for w in writers: w.start()
    while any(w.is_alive() for w in writers): assert run.stored_status()["state"] == "preparing"
    assert (run.status["step"], run.status["other"]) == (99, 99)


def test_garbage_beside_runs(run, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for name, text in [("b", "{"), ("c", "[]"), ("d", '{"state": 3, "started": "x"}'),
                       ("e", '{"state": "finished"}')]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "status.json").write_text(text)
    (tmp_path / "f").mkdir()
    os.mkfifo(tmp_path / "f" / "status.json")
    (tmp_path / "g").mkdir()
    TINY.save(tmp_path / "g" / "config.yaml")
    os.mkfifo(tmp_path / "g" / "metrics.jsonl")
    runs = {r.name: r for r in list_runs(tmp_path)}
    assert set(runs) == set("abcdeg") and next(iter(runs)) == "a"
    assert [runs[n].state for n in "bcdeg"] == ["failed", "failed", "failed", "finished", "failed"]
    for r in runs.values(): assert r._repr_markdown_()


def test_only_the_path_travels(run):
    run.supervisor = spawn.Lock()
    other = pickle.loads(pickle.dumps(run))
    assert other == run and other.supervisor is None


def test_code_and_packages_are_kept(tmp_path, monkeypatch):
    def git(*words):
        name = ["-c", "user.name=x", "-c", "user.email=x"]
        subprocess.run(["git", *name, *words], cwd=tmp_path, check=True, capture_output=True)
    git("init"); (tmp_path / "model.py").write_text("n = 1\n"); git("add", "."); git("commit", "-m", "x")
    (tmp_path / "model.py").write_text("n = 2\n"); (tmp_path / "new.py").touch()
    monkeypatch.chdir(tmp_path)
    kept = Run.create(TINY, "runs", "a").path
    patch = (kept / "code.patch").read_text()
    assert "\n+n = 2\n" in patch and "# not in git: new.py\n" in patch and "# commit " in patch
    assert "numpy==" in (kept / "packages.txt").read_text()
    monkeypatch.setenv("PATH", "")
    assert Run.create(TINY, "runs", "b").state == "preparing"  # no git, no patch, no harm
    assert not (tmp_path / "runs/b/code.patch").exists()


def test_second_interrupt_ends_the_wait(run):
    process = child("Run(sys.argv[1]).wait(poll_s=0.05)", run.path)
    process.stderr.readline()  # it has said where the run stands
    process.send_signal(signal.SIGINT)
    until = time.monotonic() + 10
    while not run.commands()[0] and time.monotonic() < until: time.sleep(0.02)
    assert [c["command"] for c in run.commands()[0]] == ["stop"] and process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(10) != 0
    assert "KeyboardInterrupt" in process.communicate()[1]


def test_cheap():
    "A run is light: its module loads no torch"
    code = "import sys, minigpt_wb.watch, minigpt_wb.signals; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_values_of_the_wrong_type_are_passed_over(tmp_path):
    "Files may hold anything: every reader shows what it can, and the run beside it"
    _, bad = (Run.create(TINY, tmp_path, name) for name in ("good", "bad"))
    odd = dict(state="running", host="elsewhere", pid=1, updated="yesterday", step="x", total_steps=[1])
    (bad.path / "status.json").write_text(json.dumps(odd | {"started": "NaN", "ended": {}}))
    (bad.path / "heartbeat" / "rank0").write_text('{"rank": 0, "time": "Infinity", "step": []}\n')
    for row in ({"kind": ["train"]}, {"kind": "train", "step": "x", "loss": 1.0}, {"kind": "resume"},
                {"kind": "train", "step": 10**400, "loss": {}}, {"kind": "train", "step": 3, "loss": 2.5}):
        module.append_line(bad.path / "metrics.jsonl", row)
    from minigpt_wb.views.html import loss_curves, run_row
    assert bad.state == "failed" and bad._repr_markdown_() and bad.status["step"] == 0
    assert loss_curves(bad)["step"].tolist() == [3.0]
    assert [run_row(r)["run"] for r in list_runs(tmp_path)] == ["good", "bad"]


def test_the_step_is_the_latest_heard_of(run):
    run.set_status(state="running", step=0)
    run.heartbeat(0, 7, "step"); run.heartbeat(1, 8, "step")
    assert (run.status["step"], run.stored_status()["step"]) == (8, 0)
    run.set_status(state="finished", step=9)
    assert run.status["step"] == 9


def test_papermill_shows_the_line_too(monkeypatch):
    "In papermill's kernel a line goes to the stderr that the kernel was started with, now and then"
    from types import SimpleNamespace
    from minigpt_wb import watch
    shell = SimpleNamespace(kernel=1)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setattr(watch, "in_place", lambda: lambda line: None)
    monkeypatch.setenv(watch.NOTEBOOK, "x.ipynb")
    read, write = os.pipe()
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(_original_stdstream_copy=write))
    tell = watch.teller()
    for line in ("a: preparing", "a: running | 1", "a: running | 2", "a: finished | 3"): tell(line)
    assert os.read(read, 999) == b"\na: preparing\n\na: running | 1\n\na: finished | 3\n"
    sys.stderr._original_stdstream_copy = None
    tell("a: failed")
    os.close(read); os.close(write)
