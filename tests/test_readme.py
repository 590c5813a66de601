"""The README is the index notebook, and its two commands are what they say."""
import re

from readme import ROOT, readme


def test_readme_is_the_index_notebook():
    assert (ROOT / "README.md").read_text(encoding="utf-8") == readme(), "run `python tests/readme.py`"


def test_two_commands():
    commands = re.findall(r"^pip install .*$", readme(), re.M)
    assert commands == ["pip install -c constraints.txt -e . && papermill nbs/train.ipynb -p gpus 2",
                        "pip install -c constraints.txt -e '.[dev]' && pytest"]
