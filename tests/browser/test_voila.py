"""nbs/generate.ipynb as an app: voila serves it, and the playground in it writes."""
import json, os, re, signal, socket, subprocess, sys, time

import pytest
from .conftest import ROOT, free_port

sync_api = pytest.importorskip("playwright.sync_api")
pytest.importorskip("voila", reason="no voila here: pip install voila")
expect = sync_api.expect
STYLE = re.compile(r"https://[^/]+/npm/@fortawesome/[^?]+/(all|v4-shims)\.min\.css$")  # asked by voila


@pytest.fixture
def app(runs, tmp_path):
    "The notebook, served for a folder of runs -> its address"
    text, given = (ROOT / "nbs/generate.ipynb").read_text(), json.dumps(repr(str(runs)))[1:-1]
    assert text.count("runs_dir: str = None ") == 1
    changed = text.replace("runs_dir: str = None ", f"runs_dir: str = {given} ")
    (tmp_path / "generate.ipynb").write_text(changed)
    port, log = free_port(), tmp_path / "voila.log"
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "IPYTHONDIR": str(tmp_path / "ipy")}
    env |= {f"JUPYTER_{kind.upper()}_DIR": str(tmp_path / kind) for kind in ("config", "data", "runtime")}
    command = [sys.executable, "-m", "voila", "generate.ipynb", "--no-browser", "--Voila.ip=127.0.0.1"]
    with log.open("w") as out:
        process = subprocess.Popen([*command, f"--port={port}"], cwd=tmp_path, env=env, stdout=out,
                                   stderr=out, start_new_session=True)
    try:
        end = time.monotonic() + 90
        while socket.socket().connect_ex(("127.0.0.1", port)):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(log.read_text()[-3000:])
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)  # its kernels end with it
        try: process.wait(15)
        except subprocess.TimeoutExpired: os.killpg(process.pid, signal.SIGKILL)


def test_the_playground_writes(app, chrome, tmp_path):
    page = chrome.new_page(viewport=dict(width=1280, height=1200))
    outside, bad, known = [], [], (app, app.replace("http", "ws"), "data:", "blob:")
    page.route(STYLE, lambda route: route.abort())
    page.on("request", lambda r: r.url.startswith(known) or STYLE.match(r.url) or outside.append(r.url))
    page.on("pageerror", lambda e: bad.append(str(e)))
    try:
        page.goto(app, timeout=120_000)
        panel = page.locator(".playground")
        expect(panel).to_be_visible(timeout=120_000)
        for again in range(2):
            panel.get_by_label("Seed").fill(str(again))
            panel.get_by_label("Seed").press("Tab")
            panel.get_by_role("button", name="Generate", exact=True).click()
            texts = panel.get_by_label("Text", exact=True).locator("option")
            expect(texts).to_have_count(again + 1, timeout=60_000)
            expect(panel.get_by_role("status")).to_contain_text("tokens/s", timeout=60_000)  # at the end
            expect(panel.locator(".tv-token[role=button]").first).to_be_visible()
        expect(page.locator(".compare, .history, .surprisal, .next-token, .batch")).to_have_count(5)
        assert "skip_exec" not in page.locator("body").inner_text()
        assert outside == [] and bad == []
    finally:
        folder = os.environ.get("MINIGPT_WB_SHOTS", tmp_path)
        page.screenshot(path=f"{folder}/voila.png", full_page=True)
        page.close()
