"""README.md is nbs/index.ipynb without outputs: `python tests/readme.py` writes it, a test compares them."""
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def readme(notebook: Path = ROOT / "nbs/index.ipynb") -> str:
    "The markdown cells as they are, the code cells as fenced Python"
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    texts = [(c["cell_type"], "".join(c["source"])) for c in cells]
    parts = [text if kind == "markdown" else f"```python\n{text}\n```" for kind, text in texts]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__": (ROOT / "README.md").write_text(readme(), encoding="utf-8")
