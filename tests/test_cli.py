"The command: what it prints, and how it ends"
import json
import time

import pytest

from minigpt_wb import __version__, cli
from minigpt_wb.config import RunConfig
from minigpt_wb.run import Run


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"minigpt {__version__}\n"


@pytest.mark.parametrize("command, said", [
    ("prepare", ["--list", "--clear", "--config", "--preset"]), ("eval", ["RUN@best", "RUN@500"]),
    ("checkpoints", ["RUN@best", "RUN@500"]), ("runs", ["line for each run"]), ("stop", ["`stopped`"])])
def test_help_says_what_comes_out(command, said, capsys):
    with pytest.raises(SystemExit) as end: cli.main([command, "--help"])
    out = capsys.readouterr().out
    assert not end.value.code and [s for s in said if s not in out] == []


def test_one_broken_run_hides_no_other(tmp_path, capsys):
    for name in ("a", "b"): Run.create(RunConfig.preset("tiny"), tmp_path, name)
    broken = tmp_path / "broken"
    broken.mkdir()
    status = dict(state="running", host="elsewhere", pid=1, updated="yesterday", step="x")
    (broken / "status.json").write_text(json.dumps(status))
    (broken / "config.yaml").write_bytes(b"\xff: [")
    (broken / "metrics.jsonl").write_text('{"kind": ["train"]}\n{"kind": "train", "step": "x", "loss": []}\n')
    assert cli.main(["runs", "--runs-dir", str(tmp_path)]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["run", "b", "a", "broken"]


def test_tables_are_for_people(tmp_path, capsys):
    import torch
    from minigpt_wb.training.checkpoints import save_checkpoint
    run = Run.create(RunConfig.preset("tiny"), tmp_path, "a")
    run.set_status(started=time.time() - 400)
    run.log_row("train", step=1, loss=2.123456)
    cli.main(["runs", "--runs-dir", str(tmp_path)])
    out = capsys.readouterr().out
    assert " 0.1" in out and "0.1000" not in out and "2.1235" in out
    save_checkpoint(run, 5, {"w": torch.ones(3)}, state=dict(val_loss=1.5, time=time.time() - 3700.0))
    cli.main(["checkpoints", "a", "--runs-dir", str(tmp_path)])
    [_, row] = capsys.readouterr().out.splitlines()
    assert "1 h" in row and "yes" in row and "best, latest" in row and "1.5" in row


def test_interrupt_is_one_line(monkeypatch, capsys):
    def pressed(argv): raise KeyboardInterrupt
    monkeypatch.setitem(cli.COMMANDS, "runs", pressed)
    assert cli.main(["runs"]) == 130
    assert capsys.readouterr().err == "minigpt: interrupted\n"
