"""The panels beside the playground: every control, each button twice, with text that means harm."""
import json, re

import pytest

sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect
expect.set_options(timeout=20_000)  # a kernel's first checkpoint imports much

CLICKED = """(name) => {  // when the next click is made, how long until the status says `stopped`
  const panel = document.querySelector(name), shown = () => panel.querySelector(".panel-status").textContent;
  window.took_ms = new Promise((done) => panel.addEventListener("click", () => {
    const began = performance.now(), passed = () => performance.now() - began;
    const over = () => shown().startsWith("stopped") || passed() > 10000;
    const look = () => over() ? done(passed()) : setTimeout(look, 5);
    look();
  }, {capture: true, once: true}));
}"""
HARM = "<img src=x onerror='window.XSS=1'><script>window.XSS=2</script></div>\u202e\x07&lt;"
SLOWLY = """
import time, minigpt_wb.{module} as module
fast = module.{name}
def slowly(*args, **kwargs):
    for x in fast(*args, **kwargs): time.sleep({delay}); yield x
module.{name} = slowly
"""


@pytest.fixture(scope="session")
def three(tmp_path_factory):
    "A folder with a run of three checkpoints"
    from minigpt_wb.train import launch
    folder = tmp_path_factory.mktemp("three")
    tiny = dict(preset="debug", data="toy", n_layer=1, d_model=32, context_length=64, batch_size=4,
                max_steps=30, save_every=10, eval_every=10, keep_last=5, tensorboard=False)
    launch(runs_dir=folder, run_name="tiny", gpus="1", progress=False, **tiny).wait(progress=False)
    return folder


class App:
    "The parts of a panel on a page"
    def __init__(self, nb, name):
        self.name, self.nb, self.page, self.app = name, nb, nb.page, nb.page.locator(f".{name}")
        self.status, self.stop = self.app.locator(".panel-status"), self.button("Stop")
        self.tokens = self.app.locator(".tv-token")

    def button(self, name, nth=0):
        return self.app.get_by_role("button", name=name, exact=True).nth(nth)

    def label(self, name): return self.app.get_by_label(name, exact=True)
    def row(self, name): return self.app.locator(".widget-inline-hbox").filter(has_text=name)
    def readout(self, name):
        return self.row(name).locator(".widget-readout")

    def press(self, name, key="ArrowLeft"):
        "Move a slider by its keys"
        self.row(name).locator(".noUi-handle").focus()
        self.page.keyboard.press(key)

    def controls(self, *names):
        "Move each slider, there and back, and throw the dice"
        for name in names:
            before = self.readout(name).inner_text()
            self.press(name)
            expect(self.readout(name)).not_to_have_text(before)
            self.press(name, "ArrowRight")
            expect(self.readout(name)).to_have_text(before)
        if "Max tokens" not in names: return
        for _ in range(2):
            seed = self.label("Seed").input_value()
            self.app.get_by_role("button", name="Dice").click()  # its icon is a part of the name
            expect(self.label("Seed")).not_to_have_value(seed)
        self.label("Seed").fill("7")
        self.label("Seed").press("Tab")

    def refresh(self, nth=0):
        for _ in range(2):
            self.button("Refresh", nth).click()
            expect(self.button("Refresh", nth)).to_be_enabled()

    def stops(self, go, showing):
        "Start and stop, twice: the first click of a kernel is heard in another thread than later ones"
        for _ in range(2):
            go.click()
            expect(self.status).to_contain_text(showing)
            expect(go).to_be_disabled()
            self.page.evaluate(CLICKED, f".{self.name}")
            self.stop.click()
            assert self.page.evaluate("() => window.took_ms") < 500
            expect(go).to_be_enabled()

    def reload(self):
        self.nb.save()
        self.page.reload()
        self.nb.ready()
        expect(self.app).to_be_visible()

    def dark(self, name):
        "Pictures by day and by night"
        self.nb.picture(f"{name}_light")
        self.nb.command("apputils:change-theme", theme="JupyterLab Dark")
        expect(self.page.locator("#jupyterlab-splash")).to_have_count(0)
        self.nb.picture(f"{name}_dark")
        self.nb.command("apputils:change-theme", theme="JupyterLab Light")

    def clean(self):
        assert self.page.bad == [] and self.page.outside == []
        assert self.page.evaluate("() => window.XSS") is None
        assert self.app.locator(".jupyter-widgets img, .jupyter-widgets script").count() == 0
        assert not re.search("[\x07\u202e]", self.app.inner_text())


@pytest.fixture
def open_app(open_nb, three):
    def go(module, name, *before, delay=0, slow="", **values):
        call = f"panel = {name}({str(three)!r}, **{values!r}); panel"
        call = f"from minigpt_wb.views.{module} import {name}\n{call}"
        where = "sampling.decoder" if slow == "stream_all" else f"views.{module}"
        cells = [SLOWLY.format(module=where, name=slow, delay=delay)] if slow else []
        nb = open_nb(*cells, *before, call)
        nb.run_all()
        app = App(nb, name.replace("_", "-"))
        expect(app.app).to_be_visible()
        return app
    return go


def test_compare(open_app):
    p = open_app("panels", "compare", prompt="Once upon", max_new_tokens=60, slow="written", delay=0.01)
    first, second = p.label("First checkpoint"), p.label("Second checkpoint")
    expect(first.locator("option:checked")).to_contain_text(re.compile(r"step\s30"))
    expect(second.locator("option:checked")).to_contain_text(re.compile(r"step\s20"))
    p.refresh(); p.refresh(1)
    second.select_option(index=2)
    p.controls("Temperature", "Top-p", "Top-k, 0 for all", "Max tokens")
    p.press("Max tokens")
    p.stops(p.button("Generate"), "generating")
    texts = []
    for _ in range(2):
        p.button("Generate").click()
        expect(p.status).to_contain_text("generating")
        expect(p.status).to_contain_text(re.compile(r"done: \d+ and \d+ tokens"), timeout=30_000)
        expect(p.app.locator(".tv-branched")).to_have_count(2)
        texts.append(p.app.locator(".tv-text").all_inner_texts())
    assert texts[0] == texts[1] and texts[0][0] != texts[0][1]
    assert "tiny@30, loss" in p.app.inner_text() and "tiny@10, loss" in p.app.inner_text()
    p.app.locator(".tv-branched").first.hover()
    expect(p.app.get_by_role("dialog").first).to_contain_text("tiny@10:")
    p.dark("compare")
    p.reload()
    expect(p.app.locator(".tv-branched")).to_have_count(2)
    assert p.app.locator(".tv-text").all_inner_texts() == texts[0]
    p.label("Prompt").fill(HARM)
    p.button("Generate").click()
    expect(p.app.locator(".tv-prompt").first).to_contain_text("<script>window.XSS=2</script></div>\\u202e\\x07&lt;")
    p.clean()


def test_history(open_app):
    p = open_app("panels", "history", prompt="Once upon", max_new_tokens=40, slow="written", delay=0.01)
    p.refresh()
    expect(p.label("Run").locator("option:checked")).to_have_text("tiny")
    p.label("Run").select_option(index=0)
    p.controls("Temperature", "Top-p", "Top-k, 0 for all", "Max tokens")
    p.stops(p.button("Write all"), "writing")
    expect(p.app).to_contain_text("step 30, val loss")
    p.label("Seed").fill("8"); p.label("Seed").press("Tab")  # of this nothing is there, however late Stop was
    for new in (3, 0):
        p.button("Write all").click()
        if new: expect(p.app).to_contain_text("being written")  # while the one that is shown is
        expect(p.status).to_contain_text(f"3 of 3 written, {new} of them now", timeout=30_000)
    texts = [p.app.locator(".tv-text").inner_text()]
    for step in (20, 10):
        p.press("Checkpoint")
        head = p.app.locator(".widget-html").filter(has_text=f"step {step}").last
        expect(head).to_contain_text(re.compile(r"\d+ tokens"))
        texts.append(p.app.locator(".tv-text").inner_text())
    assert len(set(texts)) == 3
    p.dark("history")
    p.reload()
    assert p.app.locator(".tv-text").inner_text() == texts[2]
    expect(p.app).to_contain_text("step 10")
    p.label("Prompt").fill(HARM)
    for _ in range(2):
        p.button("Write", 0).click()
        expect(p.status).to_contain_text("1 of 1 written", timeout=30_000)
    expect(p.app.locator(".tv-prompt")).to_contain_text("</div>\\u202e\\x07&lt;")
    p.press("Checkpoint", "ArrowRight")  # not written with this prompt: it is, once the slider rests
    expect(p.status).to_contain_text("1 of 1 written, 1 of them now", timeout=30_000)
    expect(p.tokens.nth(10)).to_be_visible()
    p.clean()


def test_surprisal(open_app):
    p = open_app("readings", "surprisal", slow="each_score", delay=0.02)
    score, text = p.button("Score"), p.label("Text")
    for _ in range(2):
        score.click()
        expect(p.status).to_contain_text("no text to score")
    p.refresh()
    text.fill("The king said. " * 30)
    p.stops(score, "scoring with")
    expect(p.app).to_contain_text("tiny@30")
    text.fill("Good evening, <b>said</b> the king.\n\tAnd the queen said nothing. " + HARM)
    expect(p.label("Second checkpoint")).to_be_hidden()
    p.app.get_by_text("Compare with a second checkpoint").click()
    p.refresh(1)
    p.label("Second checkpoint").select_option(index=2)
    p.label("Checkpoint").select_option(index=0)
    for _ in range(2):
        score.click()
        expect(p.status).to_contain_text("scoring with")
        expect(p.status).to_contain_text("done", timeout=60_000)
        for word in ("bits per byte", "nats per token", "Where they differ most", "tiny@30", "tiny@10"):
            expect(p.app).to_contain_text(word)
    tokens = "<script>window.XSS=2</script></div>\\xe2\\x80\\xae\\x07&lt;"  # they are bytes
    assert tokens in p.app.inner_text()
    p.dark("surprisal")
    result = p.app.locator(".widget-html").filter(has_text="Where they differ most")
    before = result.text_content()
    p.reload()
    expect(result).to_be_visible()
    assert result.text_content() == before
    p.app.get_by_text("Compare with a second checkpoint").click()
    expect(p.label("Second checkpoint")).to_be_hidden()
    p.clean()


SLOW_READ = """
import time, minigpt_wb.views.readings as readings
fast = readings.next_scores
def next_scores(*args): time.sleep(0.7); return fast(*args)
readings.next_scores = next_scores
"""


def test_next_token(open_app):
    p = open_app("readings", "next_token", SLOW_READ, prompt="The king")
    rows, look = p.app.locator("tr"), p.button("Look")
    for _ in range(2):  # one pass is not broken off, but nothing comes of it
        look.click()
        expect(p.status).to_contain_text("reading")
        p.stop.click()
        expect(p.status).to_contain_text("stopping")
        expect(p.status).to_contain_text("stopped")
        expect(rows).to_have_count(0)
    p.nb.run_beside("readings.next_scores = fast")
    p.refresh()
    for _ in range(2):
        look.click()
        expect(p.status).to_contain_text("tiny@30 after 'The king'")
        expect(rows).to_have_count(21)
    before = p.app.locator("table").inner_text()
    p.label("Prompt").fill("The queen")
    expect(p.status).to_contain_text("tiny@30 after 'The queen'")
    expect(p.app.locator("table")).not_to_have_text(before, use_inner_text=True)
    p.label("Checkpoint").select_option(index=1)
    expect(p.status).to_contain_text("tiny@20 after")
    bars = p.app.locator("table").locator("..")
    for name, key in (("Top-k, 0 for all", "Home"), ("Temperature", "ArrowLeft"), ("Top-p", "PageDown"),
                      ("Temperature", "Home")):
        before = bars.inner_text()
        p.press(name, key)
        expect(bars).not_to_have_text(before, use_inner_text=True)
    expect(p.app).to_contain_text("1 of 257 tokens")
    expect(p.app).to_contain_text(re.compile(r"entropy of the model \d\.\d+ nats"))
    p.press("Temperature", "End")
    p.dark("next")
    p.reload()
    expect(rows).to_have_count(21)
    p.label("Prompt").fill(HARM)
    expect(p.status).to_contain_text("</script></div>\\u202e")
    p.clean()


def test_batch(open_app, tmp_path):
    p = open_app("batch", "batch", prompts="Once upon\nThe king", max_new_tokens=30, slow="stream_all",
                 delay=0.005)
    go, save = p.button("Generate"), p.button("Save")
    saved, rows = p.app.locator(".panel-saved"), p.app.locator("tr")
    expect(save).to_be_disabled()
    p.refresh()
    p.label("Checkpoint").select_option(index=1)
    p.controls("Temperature", "Top-p", "Top-k, 0 for all", "Max tokens")
    p.label("Samples of each").fill("2"); p.label("Samples of each").press("Tab")
    p.stops(go, "texts,")
    for _ in range(2):
        go.click()
        expect(p.status).to_contain_text("done: 4 of 4 texts, tiny@20", timeout=30_000)
        expect(rows).to_have_count(5)
    p.label("Prompts, one a line").fill(HARM.replace("\n", "") + "\nThe king")
    go.click()
    expect(rows.nth(1)).to_contain_text("<script>window.XSS=2</script></div>\\u202e\\x07&lt;", timeout=30_000)
    expect(p.status).to_contain_text("done: 4 of 4")
    for kind in ("jsonl", "csv", "txt"):
        file = tmp_path / f"rows.{kind}"
        p.label("File: .jsonl, .csv or .txt").fill(str(file))
        for said in (f"saved 4 rows to {file}", f"{file} exists"):
            save.click()
            expect(saved).to_contain_text(said)
    for said in (f"saved 4 rows to {file}", f"{file} exists") * 2:
        p.app.get_by_text("Replace", exact=True).click()
        save.click()
        expect(saved).to_contain_text(said)
    assert len([json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]) == 4
    p.dark("batch")
    p.reload()
    expect(rows).to_have_count(5)
    (tmp_path / "prompts.txt").write_text("One\n\nTwo\nThree\n")
    p.label("or a file of them").fill(str(tmp_path / "prompts.txt"))
    go.click()
    expect(p.status).to_contain_text("done: 6 of 6", timeout=30_000)
    p.label("or a file of them").fill("/no/such/file")
    go.click()
    expect(p.status).to_contain_text("cannot be read: No such file")
    p.clean()
