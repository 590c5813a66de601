"""nbs/generate.ipynb by papermill: useful without a click, small, and clear where there is no checkpoint."""
import json

import pytest
from conftest import ROOT, TINY

from minigpt_wb.train import launch

NOTEBOOK = ROOT / "nbs/generate.ipynb"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "A folder with two runs: of the older one three checkpoints"
    folder = tmp_path_factory.mktemp("runs")
    for name, steps in (("tiny", 6), ("newer", 2)):
        few = dict(max_steps=steps, save_every=2, keep_last=9)
        launch(runs_dir=folder, run_name=name, gpus="1", progress=False, **TINY | few).wait(progress=False)
    return folder


def outputs(cell) -> list[dict]:
    "What a cell shows, by type; a stream or an error is no such thing"
    kinds = {o["output_type"] for o in cell["outputs"]}
    assert kinds <= {"execute_result", "display_data"}, cell["outputs"]
    return [{kind: "".join(x) if isinstance(x, list) else x for kind, x in o["data"].items()}
            for o in cell["outputs"]]


def test_useful_without_a_click(shell, runs, tmp_path):
    given = ["-p", "runs_dir", runs, "-p", "checkpoint", "tiny@6", "-p", "max_new_tokens", "30"]
    done = shell("papermill", NOTEBOOK, "out.ipynb", *given)
    assert done.returncode == 0, done.stderr[-3000:]
    saved = json.loads((tmp_path / "out.ipynb").read_text())
    cells = saved["cells"]
    at = lambda title: next(i for i, c in enumerate(cells) if "".join(c["source"]).startswith(title))
    clicks, still = at("## Write, and branch"), at("## Without clicking")
    panels = [o for c in cells[clicks:still] if c["cell_type"] == "code" for o in outputs(c)]
    assert [o["text/plain"].partition("(")[0] for o in panels] == [
        "Playground", "Compare", "History", "Surprisal", "NextToken", "Batch"]
    shown = [outputs(c) for c in cells[still:] if c["cell_type"] == "code"]
    assert len(shown) == 7 and all(len(o) == 1 for o in shown)
    for [o] in shown:  # what an untrusted notebook shows, and nothing that it would drop
        assert {"text/html", "image/png"} & set(o) and len(o["text/plain"]) < 100
        assert not any(tag in o.get("text/html", "").lower() for tag in ("<script", "<style", "<svg"))
    texts = [o.get("text/html", "") for [o] in shown]
    assert texts[0].count("background-color") > 30 and texts[3].count("<tr>") == 1 + 3
    assert "step 2" in texts[4] and "step 6" in texts[4] and "tiny@2" in texts[5]
    assert "newer" not in "".join(texts)
    saved["metadata"].pop("widgets")  # papermill's copy of all widgets; JupyterLab saves none
    assert len(json.dumps(saved)) < 300_000


def test_says_how_to_train(shell, tmp_path):
    (tmp_path / "none").mkdir()
    done = shell("papermill", NOTEBOOK, "out.ipynb", "-p", "runs_dir", tmp_path / "none")
    assert done.returncode == 1
    last = [line for line in done.stderr.splitlines() if line.strip()][-1]
    assert last.startswith("ValueError: no checkpoint found") and "Train a model with `minigpt train`" in last
    assert str(tmp_path / "none") in last


def test_a_checkpoint_that_is_not_there(shell, runs):
    done = shell("papermill", NOTEBOOK, "out.ipynb", "-p", "runs_dir", runs, "-p", "checkpoint", "tiny@999")
    assert done.returncode == 1
    assert "ValueError: tiny@999: there is no step 999; there are steps 2, 4, 6" in done.stderr
