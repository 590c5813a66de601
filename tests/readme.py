"""README.md is nbs/index.ipynb without its outputs: `python tests/readme.py` writes it, a test keeps the two in step."""
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def readme(notebook: Path = ROOT / "nbs/index.ipynb") -> str:
    "The markdown cells as they are, the code cells as fenced Python"
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    texts = [("".join(c["source"]), c["cell_type"]) for c in cells if not "".join(c["source"]).startswith("#| hide")]
    return "\n\n".join(text if kind == "markdown" else f"```python\n{text}\n```" for text, kind in texts) + "\n"


if __name__ == "__main__": (ROOT / "README.md").write_text(readme(), encoding="utf-8")
