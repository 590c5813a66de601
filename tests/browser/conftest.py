"""A notebook in JupyterLab in headless Chromium: `lab` (server), `chrome` (browser), `open_nb` (a page).

One server and one browser for all tests; each test has a page on a copy of its notebook, and its kernel ends
with it. Requests that leave the server are kept in `page.outside`, errors in `page.bad`. Without Chromium all
is skipped, and says so; MINIGPT_WB_CHROMIUM names a binary, MINIGPT_WB_SHOTS a folder to keep pictures in.
"""
import json, os, secrets, shutil, signal, socket, subprocess, sys, time
from pathlib import Path

import nbformat, pytest
from nbformat.v4 import new_code_cell, new_notebook

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = os.environ.get("MINIGPT_WB_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
BROWSER = ("--no-sandbox --headless --disable-gpu --disable-quic --no-first-run --disable-sync "
           "--disable-background-networking --disable-component-update").split()
QUIET = '{"fetchNews":"false","checkForUpdates":false,"doNotDisturbMode":true}'
ERRORS = ", ".join(f'.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.{kind}"]'
                   for kind in ("error", "stderr"))
READY = """async () => {const p = jupyterapp.shell.currentWidget; await p.context.ready;
                        await p.sessionContext.ready; await p.sessionContext.session.kernel.info}"""


def server(port: int, token: str, root: Path) -> list[str]:
    "The command that starts JupyterLab, for one folder and for this machine alone"
    return [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1",
            f"--port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}",
            f"--ServerApp.root_dir={root}", "--LabApp.expose_app_in_browser=True",
            "--LabApp.extension_manager=readonly", "--LabApp.news_url=None",
            "--ServerApp.shutdown_no_activity_timeout=900"]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    "A running server -> url, token, root"
    for package in ("jupyterlab", "playwright"): pytest.importorskip(package)
    if not CHROMIUM: pytest.skip("no chromium here: install it, or name one in MINIGPT_WB_CHROMIUM")
    root, home = tmp_path_factory.mktemp("root"), tmp_path_factory.mktemp("home")
    settings = home / "config/lab/user-settings/@jupyterlab/apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text(QUIET)
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "IPYTHONDIR": str(home / "ipy")}
    env |= {f"JUPYTER_{kind.upper()}_DIR": str(home / kind) for kind in ("config", "data", "runtime")}
    port, token, log = free_port(), secrets.token_hex(16), home / "lab.log"
    with log.open("w") as out:
        process = subprocess.Popen(server(port, token, root), stdout=out, stderr=out, env=env, cwd=root,
                                   start_new_session=True)
    try:
        end = time.monotonic() + 90
        while socket.socket().connect_ex(("127.0.0.1", port)):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(log.read_text()[-3000:])
            time.sleep(0.1)
        yield dict(url=f"http://127.0.0.1:{port}", token=token, root=root)
    finally:
        process.send_signal(signal.SIGTERM)  # its kernels end with it
        try: process.wait(15)
        except subprocess.TimeoutExpired: os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def chrome(lab):
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=BROWSER)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    "A folder with a run of a few steps and two checkpoints"
    from minigpt_wb.train import launch
    folder = tmp_path_factory.mktemp("runs")
    tiny = dict(preset="debug", data="toy", n_layer=1, d_model=32, context_length=64, batch_size=2,
                max_steps=4, save_every=2, tensorboard=False)
    launch(runs_dir=folder, run_name="tiny", gpus="1", progress=False, **tiny).wait(progress=False)
    return folder


class Notebook:
    "A notebook on a page"
    def __init__(self, page, path: Path): self.page, self.path = page, path

    def command(self, name: str, **args):
        "Run a command of JupyterLab to its end"
        self.page.evaluate("async ([c, a]) => {await jupyterapp.commands.execute(c, a)}", [name, args])

    def run_all(self):
        "Run all cells; one that fails ends it without a word, so its output is looked for"
        self.command("notebook:run-all-cells")
        assert (errors := self.page.locator(ERRORS).all_inner_texts()) == [], errors

    def ready(self):
        "Wait until the notebook is there, and its kernel"
        self.page.wait_for_selector(".jp-Notebook .jp-CodeCell")
        self.page.wait_for_function("() => !!window.jupyterapp?.shell?.currentWidget?.sessionContext")
        self.page.evaluate(READY)  # what is sent before is lost, though the page reads `idle`

    def run_beside(self, code: str):
        "Have the kernel run code, and go on"
        self.page.evaluate("(code) => {jupyterapp.shell.currentWidget.sessionContext.session.kernel"
                           ".requestExecute({code})}", code)

    def save(self) -> dict:
        self.command("docmanager:save")
        return json.loads(self.path.read_text())

    def picture(self, name: str):
        "Keep what the page shows, where somebody wants to look at it"
        if folder := os.environ.get("MINIGPT_WB_SHOTS"):
            self.page.screenshot(path=str(Path(folder) / f"{name}.png"))


@pytest.fixture
def open_nb(lab, chrome, tmp_path):
    "A notebook, or cells, on a page of its own -> Notebook"
    opened = []

    def go(*cells: str, source: Path | None = None) -> Notebook:
        path = lab["root"] / f"{secrets.token_hex(4)}.ipynb"
        if source: shutil.copy(source, path)
        else:
            kernel = dict(kernelspec=dict(name="python3", display_name="python3"))
            nbformat.write(new_notebook(cells=list(map(new_code_cell, cells)), metadata=kernel), path)
        context = chrome.new_context(viewport=dict(width=1280, height=1200))
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.bad, page.outside = [], []
        known = (lab["url"], lab["url"].replace("http", "ws"), "data:", "blob:")
        page.on("pageerror", lambda e: page.bad.append(f"pageerror {e}"))
        page.on("response", lambda r: r.status >= 400 and "/lsp/status" not in r.url and
                page.bad.append(f"{r.status} {r.url}"))
        page.on("request", lambda r: r.url.startswith(known) or page.outside.append(r.url))
        page.goto(f"{lab['url']}/doc/tree/{path.name}?token={lab['token']}")  # one document, no side bar
        opened.append((context, nb := Notebook(page, path)))
        nb.ready()
        return nb

    yield go
    for context, nb in opened:
        try:
            nb.page.screenshot(path=str(tmp_path / "last.png"))
            nb.page.evaluate("async () => {await jupyterapp.shell.currentWidget.sessionContext.shutdown()}")
        finally: context.close()
