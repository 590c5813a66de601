"Ranks under fire: whatever dies, nothing goes on without it, and the run says which rank and why"
import json, multiprocessing.spawn, os, resource, shutil, signal, subprocess, sys, threading, time
from concurrent.futures import ThreadPoolExecutor

import pytest

from minigpt_wb.config import RunConfig
from minigpt_wb.ddp.ranks import parse_gpus, pick, start_ranks, without_main
from minigpt_wb.run import Run, process_start
from minigpt_wb.watch import RunFailed

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc and PDEATHSIG")


def new_run(folder): return Run.create(RunConfig.preset("debug"), runs_dir=folder)

def until(claim, timeout_s=60):
    end = time.monotonic() + timeout_s
    while not claim():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)

def seconds_until_gone(pids, limit_s=10):
    start = time.monotonic()
    until(lambda: not any(process_start(p) for p in pids), limit_s)
    return time.monotonic() - start

def in_session(number):
    "Processes whose session is `number`: those of a launcher started with start_new_session"
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try: stat = open(f"/proc/{pid}/stat").read()
        except OSError: continue
        state, _, _, session = stat[stat.rindex(")") + 2:].split()[:4]
        if int(session) == number and state not in "ZX": found.append(int(pid))
    return found

def said(run, rank): return run.log_path(rank).read_text() if run.log_path(rank).exists() else ""


# What ranks do here. Functions of a test's module travel by reference, those of a main file by value.

def sums(run, fail_rank=None, steps=10**9):
    from minigpt_wb.ddp.process import group, identity, sum_over_ranks
    process = identity("cpu")
    with group(process):
        for step in range(steps):
            if step == 5 and process.rank == fail_rank: raise ValueError(f"no luck on rank {process.rank}")
            sum_over_ranks([step])
            if step == 1: print("going", flush=True)
            time.sleep(0.01)
    if process.is_main: run.set_status(state="finished")

def sleep_on(run):
    print("going", flush=True)
    time.sleep(600)

def finish(run, *args):
    if os.environ["RANK"] == "0": run.set_status(state="finished")

def describe(run):
    early = "torch" in sys.modules
    import torch
    print(json.dumps({"torch_before": early, "threads": torch.get_num_threads(), "stdin": sys.stdin.read(),
                      "omp": os.environ["OMP_NUM_THREADS"], "rank": os.environ["RANK"]}), flush=True)
    finish(run)

def wait_for_signal(run):
    from minigpt_wb import signals
    while not signals.requested(): time.sleep(0.01)
    print("asked by", signals.requested(), flush=True)
    finish(run)

def finish_and_stay(run):
    finish(run)
    sleep_on(run)

def describe_process(run):
    import ctypes, multiprocessing
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    deadly = ctypes.c_int()
    ctypes.CDLL(None).prctl(2, ctypes.byref(deadly))  # PR_GET_PDEATHSIG
    os.write(1, b"by the descriptor\n")
    process = multiprocessing.current_process()
    print(json.dumps({"blocked": len(blocked), "deadly": deadly.value, "name": process.name,
                      "left": os.environ.get("TORCHELASTIC_X"), "daemon": process.daemon}))
    finish(run)

def exit_three(run): sys.exit(3 if os.environ["RANK"] == "1" else 0)

def exit_saying(run): sys.exit("no more paper" if os.environ["RANK"] == "1" else 0)

def leave(run): pass

def fail_without_disk(run):
    if os.environ["RANK"] == "0": return sleep_on(run)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # any write to a file fails
    raise OSError(28, "no room for a whole line")

def crash(run):
    import ctypes
    if os.environ["RANK"] == "1": ctypes.string_at(0)
    time.sleep(600)


@pytest.fixture
def start(tmp_path):
    started = []
    def starter(target, *args, ranks=2):
        run = new_run(tmp_path)
        started.append(start_ranks(target, (run, *args), ranks, run))
        return run, started[-1]
    yield starter
    for supervisor in started: supervisor.kill()


def test_ranks_finish(start):
    run, supervisor = start(sums, None, 10)
    assert supervisor.wait(60) and supervisor.exitcodes == [0, 0] and supervisor.error is None
    status = run.status
    assert (status["state"], status["world_size"], status["pid"]) == ("finished", 2, os.getpid())

def test_the_rank_that_raised_is_named(start):
    run, supervisor = start(sums, 1)
    until(lambda: 1 in supervisor.told)
    begun = time.monotonic()
    assert supervisor.wait(10) and time.monotonic() - begun < 2
    status = run.status
    assert (status["state"], status["failed_rank"]) == ("failed", 1)
    assert status["error"].startswith("Traceback")
    assert status["error"].endswith("ValueError: no luck on rank 1")
    assert "rank_main" not in status["error"] and "in sums" in status["error"]
    assert "no luck on rank 1" in said(run, 1) and seconds_until_gone(supervisor.pids) < 0.1

def test_the_reason_needs_no_disk(start):
    "Nothing can be written any more where the run is: the error is the one that was raised"
    run, supervisor = start(fail_without_disk)
    assert supervisor.wait(30) and supervisor.failed_rank == 1
    assert supervisor.error.endswith("OSError: [Errno 28] no room for a whole line")
    assert said(run, 1) == ""

@pytest.mark.parametrize("number,name", [(signal.SIGKILL, "SIGKILL"), (signal.SIGSEGV, "SIGSEGV")])
def test_a_killed_rank_is_named(start, number, name):
    run, supervisor = start(sums)
    until(lambda: "going" in said(run, 0) and "going" in said(run, 1))
    os.kill(supervisor.pids[1], number)
    assert seconds_until_gone(supervisor.pids) < 2 and supervisor.wait(5)
    assert run.status["failed_rank"] == 1 and run.status["error"].startswith(f"rank 1 was killed by {name}")

def test_a_crash_leaves_its_stack_in_the_log(start):
    run, supervisor = start(crash)
    assert supervisor.wait(10) and run.status["error"].startswith("rank 1 was killed by SIGSEGV")
    assert "in crash" in said(run, 1)

def test_exit_status(start):
    run, supervisor = start(exit_three)
    assert supervisor.wait(10) and run.status["error"].startswith("rank 1 exited with status 3")

def test_exit_with_words(start):
    run, supervisor = start(exit_saying)
    assert supervisor.wait(10) and run.status["error"].startswith("rank 1 exited with status 1")
    assert "no more paper" in said(run, 1)

def test_a_run_that_nobody_finished_is_not_left_running(start):
    run, supervisor = start(leave)
    assert supervisor.wait(10) and run.status["state"] == "failed" and "none wrote" in run.status["error"]

def test_kill_ends_ranks_that_hear_nothing(start):
    run, supervisor = start(sleep_on)
    until(lambda: "going" in said(run, 1))
    begun = time.monotonic()
    supervisor.kill()
    assert time.monotonic() - begun < 2 and not supervisor.alive and seconds_until_gone(supervisor.pids) < 0.1
    assert run.status["state"] == "failed" and run.status["error"] == "killed by the launcher"

@pytest.mark.parametrize("state", ["finished", "stopped", "failed"])
def test_kill_changes_nothing_in_a_run_that_has_ended(start, state):
    run, supervisor = start(finish_and_stay)
    until(lambda: "going" in said(run, 0) and run.status["state"] == "finished")
    run.set_status(state=state, error="why" if state == "failed" else None)
    supervisor.kill()
    assert not supervisor.alive and seconds_until_gone(supervisor.pids) < 0.1
    assert (run.status["state"], run.status["error"]) == (state, "why" if state == "failed" else None)

@pytest.mark.parametrize("end", ["kill", "a rank fails", "a rank is killed"])
def test_a_deleted_run_is_no_traceback(start, end, monkeypatch):
    caught = []
    monkeypatch.setattr(threading, "excepthook", caught.append)
    run, supervisor = start(sums if end == "a rank fails" else sleep_on)
    until(lambda: "going" in said(run, 0) and "going" in said(run, 1))
    shutil.rmtree(run.path)
    if end == "kill": supervisor.kill()
    else: os.kill(supervisor.pids[1], signal.SIGKILL if end == "a rank is killed" else signal.SIGSEGV)
    assert supervisor.wait(10) and supervisor.error and not caught
    assert seconds_until_gone(supervisor.pids) < 0.1

def test_a_full_disk_is_no_endless_wait(start, monkeypatch):
    "Nobody can write that the run failed: whoever waits for it is told by the supervisor"
    run, supervisor = start(sleep_on)
    until(lambda: "going" in said(run, 0) and "going" in said(run, 1))
    def full(**_): raise OSError(28, "No space left on device")
    monkeypatch.setattr(run, "set_status", full)
    run.supervisor = supervisor
    os.kill(supervisor.pids[1], signal.SIGKILL)
    with pytest.raises(RunFailed, match="rank 1: rank 1 was killed by SIGKILL") as caught:
        run.wait(progress=False)
    assert caught.value.rank == 1 and run.state == "preparing"

def test_too_many_processes_are_refused():
    with pytest.raises(ValueError, match="give a count up to"): pick(parse_gpus(100_000), "cpu")

def test_signals_are_safe_from_the_first_moment(start):
    run, supervisor = start(wait_for_signal)
    for pid in supervisor.pids: os.kill(pid, signal.SIGINT)  # Ctrl-C reaches the whole process group: ignored
    supervisor.send(signal.SIGTERM)                          # Python itself has not come up yet
    assert supervisor.wait(20) and run.status["state"] == "finished"
    assert "asked by SIGTERM" in said(run, 0) and "asked by SIGTERM" in said(run, 1)

def test_environment(start, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    run, supervisor = start(describe, ranks=2)
    assert supervisor.wait(60), run.status
    seen = [json.loads(said(run, r)) for r in (0, 1)]
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert [s["threads"] for s in seen] == [threads] * 2 and [s["omp"] for s in seen] == [str(threads)] * 2
    assert [s["rank"] for s in seen] == ["0", "1"] and [s["stdin"] for s in seen] == ["", ""]
    assert not any(s["torch_before"] for s in seen)

def test_a_rank_is_a_process_of_its_own(start, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_X", "1")
    run, supervisor = start(describe_process)
    assert supervisor.wait(20) and run.status["state"] == "finished"
    first, second = said(run, 1).splitlines()
    seen = {"blocked": 0, "deadly": signal.SIGKILL, "left": None, "name": "rank 1", "daemon": False}
    assert first == "by the descriptor" and json.loads(second) == seen
    assert {p.pid for p in multiprocessing.active_children()} & set(supervisor.pids) == set()

def test_only_our_processes_go_without_main():
    def keys(): return [k for k in multiprocessing.spawn.get_preparation_data("x") if "init_main" in k]
    given = multiprocessing.spawn.get_preparation_data
    with ThreadPoolExecutor(1) as other, without_main():
        assert keys() == [] and len(other.submit(keys).result()) == 1
    assert len(keys()) == 1 and multiprocessing.spawn.get_preparation_data is given

def test_large_arguments(start):
    run, supervisor = start(finish, b"x" * 5_000_000, ranks=3)
    assert supervisor.wait(30) and run.status["state"] == "finished"

def test_one_rank_needs_no_group(start):
    run, supervisor = start(sums, None, 3, ranks=1)
    assert supervisor.wait(60) and run.status["state"] == "finished" and run.status["world_size"] == 1

def test_start_from_a_thread_that_ends(start):
    got = []
    thread = threading.Thread(target=lambda: got.append(start(sums, None, 300)))
    thread.start()
    thread.join()
    run, supervisor = got[0]
    assert supervisor.wait(60) and run.status["state"] == "finished" and supervisor.exitcodes == [0, 0]

def test_what_cannot_be_sent(tmp_path):
    run = new_run(tmp_path)
    with pytest.raises(ValueError, match="cannot be sent to the ranks"):
        start_ranks(finish, (threading.Lock(),), 2, run)

def test_no_log_folder_is_an_error_of_start(tmp_path):
    run = new_run(tmp_path)
    os.rename(run.path / "log", run.path / "gone")
    with pytest.raises(FileNotFoundError): start_ranks(finish, (run,), 2, run)
    assert run.status["state"] == "failed" and "could not be started" in run.status["error"]

def test_a_second_start_forgets_the_first_failure(start):
    run, supervisor = start(exit_three)
    assert supervisor.wait(10) and run.status["state"] == "failed"
    run.set_status(state="preparing")
    again = start_ranks(finish, (run,), 2, run)
    assert again.wait(10) and run.status["state"] == "finished" and run.status["error"] is None


# The launcher as a program of its own, which may be killed: its main file has no guard, but the ranks' work.

PROGRAM = """
import os, sys, time
from minigpt_wb.config import RunConfig
from minigpt_wb.ddp.ranks import say, start_ranks
from minigpt_wb.run import Run

def work(run, how):
    import minigpt_wb.ddp.ranks as ranks
    from minigpt_wb.ddp.process import group, identity, sum_over_ranks
    process = identity("cpu")
    with group(process):
        for step in range(10**9 if how == "endless" else 200):
            sum_over_ranks([step])
            ranks.say(f"GPU{process.rank}:" + str(process.rank) * 300)
            if step == 1: print("going", flush=True)
    if process.is_main: run.set_status(state="finished")

run = Run.create(RunConfig.preset("debug"), runs_dir=sys.argv[1])
supervisor = start_ranks(work, (run, sys.argv[2]), 2, run, echo=sys.argv[2] == "echo")
print(run.path, *supervisor.pids, flush=True)
if sys.argv[2] != "leave": supervisor.wait()
"""

@pytest.fixture
def launch(tmp_path):
    def launcher(how, **kwargs):
        (tmp_path / "program.py").write_text(PROGRAM)
        env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        words = [sys.executable, tmp_path / "program.py", tmp_path / "runs", how]
        program = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=env, **kwargs)
        path, *pids = program.stdout.readline().split()
        programs.append(program)
        return program, Run(path), [int(p) for p in pids]
    programs = []
    yield launcher
    for program in programs:
        program.kill()
        program.wait()

@pytest.mark.parametrize("after", ["at once", "while they import", "while they work"])
def test_kill_of_the_launcher(launch, after):
    program, run, pids = launch("endless")
    if after == "while they import": time.sleep(0.5)
    if after == "while they work": until(lambda: "going" in said(run, 0) and "going" in said(run, 1))
    program.kill()
    program.wait()
    assert seconds_until_gone(pids) < 2
    assert run.status["state"] == "failed" and "launcher died" in run.status["error"]

def test_a_launcher_that_ends_takes_its_ranks_with_it(launch):
    program, run, pids = launch("leave")
    assert program.wait(20) == 0 and seconds_until_gone(pids) < 0.2
    assert run.status["state"] == "failed" and "the launcher ended" in run.status["error"]

def test_interrupt_of_the_launcher(launch):
    program, run, pids = launch("endless", start_new_session=True)
    until(lambda: "going" in said(run, 1))
    os.killpg(program.pid, signal.SIGINT)
    assert program.wait(10) != 0 and seconds_until_gone(pids) < 0.2
    assert run.status["state"] == "failed" and "the launcher ended" in run.status["error"]

@pytest.mark.parametrize("how", ["endless", "leave", "echo"])
def test_no_process_is_left_not_even_the_resource_tracker(launch, how):
    program, run, pids = launch(how, start_new_session=True)
    if how == "endless":
        assert len(in_session(program.pid)) == 4  # the launcher, two ranks, the tracker
        program.kill()
    else: program.stdout.read()
    program.wait(30)
    until(lambda: not in_session(program.pid), 2)

@pytest.mark.parametrize("words", [["program.py"], ["-m", "program"]])
def test_the_main_file_is_not_run_again(tmp_path, words):
    "It has no guard: each rank would launch a run of its own, or die in trying"
    look = "    print('torch' in sys.modules, flush=True)\n"
    head, work, rest = PROGRAM.partition("def work(run, how):\n")
    (tmp_path / "program.py").write_text(f"print('the main file')\nimport torch\n{head}{work}{look}{rest}")
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    out = subprocess.run([sys.executable, *words, "runs", "some"], cwd=tmp_path, env=env, text=True,
                         capture_output=True, timeout=60)
    assert out.returncode == 0 and out.stderr == "", out.stderr
    assert out.stdout.count("the main file") == 1 and len(os.listdir(tmp_path / "runs")) == 1
    run = Run(next((tmp_path / "runs").iterdir()))
    assert run.status["state"] == "finished" and said(run, 1).splitlines() == ["False", "going"]

def test_echo_keeps_lines_whole(launch):
    program, run, pids = launch("echo")
    lines = program.stdout.read().splitlines()
    assert program.wait(20) == 0 and run.status["state"] == "finished", run.status
    assert sorted(set(lines)) == [f"GPU{r}:" + str(r) * 300 for r in (0, 1)] and len(lines) == 400

def test_echo_to_a_reader_that_left(launch):
    program, run, pids = launch("echo")
    program.stdout.close()
    assert program.wait(60) == 0 and run.status["state"] == "finished"


def test_a_rank_is_safe_before_torch_is_there():
    heavy = {"torch", "numpy", "pydantic", "multiprocessing"}
    code = f"import sys, minigpt_wb.ddp.ranks; print(*{heavy} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == ""
