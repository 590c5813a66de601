"""`papermill nbs/train.ipynb -p gpus 2` as typed: in a terminal, with pipes, from inside nbs/."""
import json
import os
import pty
import subprocess
import sys

import pytest

NOTEBOOK = {"nbformat": 4, "nbformat_minor": 5,
            "metadata": {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}},
            "cells": [{"cell_type": "code", "id": "a", "metadata": {"tags": ["parameters"]}, "outputs": [],
                       "execution_count": None, "source": "gpus = None"}]}
COMMAND = [sys.executable, "-m", "papermill"]
GPUS = ["-p", "gpus", "2", "--prepare-only"]


@pytest.fixture
def project(tmp_path):
    (tmp_path / "nbs").mkdir()
    (tmp_path / "nbs/train.ipynb").write_text(json.dumps(NOTEBOOK))
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nlib_name = minigpt_wb\n")
    return tmp_path


def written(project):
    "The one executed notebook in runs/, with gpus injected; the source is as it was"
    assert json.loads((project / "nbs/train.ipynb").read_text()) == NOTEBOOK
    [path] = (project / "runs").glob("train-*.ipynb")
    assert "gpus = 2" in path.read_text()
    return path


def test_terminal(project):
    master, slave = pty.openpty()
    papermill = os.path.join(os.path.dirname(sys.executable), "papermill")
    process = subprocess.Popen([papermill, "nbs/train.ipynb", *GPUS], cwd=project,
                               stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    said = b""
    try:
        while data := os.read(master, 4096): said += data
    except OSError: pass  # Linux ends a terminal without a reader this way
    os.close(master)
    assert process.wait(60) == 0, said.decode()
    written(project)


def test_open_pipe_for_input(project):
    "An open pipe on stdin makes papermill alone read the notebook from it, and wait for ever"
    process = subprocess.Popen([*COMMAND, "./nbs/train.ipynb", *GPUS], cwd=project,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.wait(60) == 0, process.stderr.read().decode()
    assert process.stdout.read() == b""
    process.stdin.close(); process.stdout.close(); process.stderr.close()
    written(project)


def test_inside_the_folder_and_named_output(project):
    run = dict(cwd=project / "nbs", stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    done = subprocess.run([*COMMAND, "train.ipynb", *GPUS], **run)
    assert done.returncode == 0, done.stderr
    written(project).unlink()
    done = subprocess.run([*COMMAND, "train.ipynb", *GPUS, "../mine.ipynb"], **run)
    assert done.returncode == 0, done.stderr
    assert "gpus = 2" in (project / "mine.ipynb").read_text()
    assert not list((project / "runs").iterdir())


def test_executes(project):
    done = subprocess.run([*COMMAND, "nbs/train.ipynb", *GPUS[:3]], cwd=project, capture_output=True,
                          text=True, stdin=subprocess.DEVNULL, timeout=120)
    assert done.returncode == 0, done.stderr
    cells = json.loads(written(project).read_text())["cells"]
    assert [c["execution_count"] for c in cells] == [1, 2]


def test_importing_it_elsewhere_changes_nothing():
    code = "import sys; before = list(sys.argv); import minigpt_wb._papermill; assert sys.argv == before"
    subprocess.run([sys.executable, "-c", code, "papermill", "nbs/train.ipynb"], check=True, timeout=60)
