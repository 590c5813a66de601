"""The playground as a person uses it: every control, by mouse and by keyboard, with text that means harm."""
import re, time

import pytest

sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect
expect.set_options(timeout=30_000)  # a loaded machine is slow; what must be fast is measured

PANEL = """
from minigpt_wb.views.sampler import playground
panel = playground({runs!r}, prompt={prompt!r}, **{values!r}); panel
"""
SLOWLY = """
import time, minigpt_wb.views.sampler as sampler
from dataclasses import replace
fast, delay = sampler.stream, {delay}
def slowly(*args, **kwargs):
    for event in fast(*args, **kwargs): time.sleep(delay); yield change(event)
def change(event): return event
sampler.stream = slowly
"""
HOSTILE = ["<script>window.XSS=1</script>", "<img src=x onerror='window.XSS=2'>",
           "\"'><svg onload=window.XSS=3>", "</span></div></pre>", "&lt;b&gt;",
           "\x00\x07\x1b[31m", "\t", "\n\n", "\u202eabc", "$x^2$ `code`"]


FIRST = """(button) => new Promise((done) => {  // ms from a click to the first token of the new text
    const count = () => document.querySelectorAll(".tv-token").length;
    const before = count(), at = performance.now();
    const look = () => {if (0 < count() && count() < before) done(performance.now() - at);
                        else requestAnimationFrame(look)};
    button.click(); look()})"""


class Panel:
    "The parts of a playground on a page"
    def __init__(self, nb):
        self.nb, self.page = nb, nb.page
        self.app = app = nb.page.locator(".playground")
        self.go, self.stop = self.button("Generate"), self.button("Stop")
        self.text, self.status = app.locator(".tv-text"), app.get_by_role("status")
        self.tokens = app.locator(".tv-token[role=button]")  # what is left of a character at the end is none
        self.card = app.get_by_role("dialog")

    def button(self, name): return self.app.get_by_role("button", name=name, exact=True)

    def generate(self, wait="done"):
        self.go.click()
        expect(self.status).to_contain_text("generating")
        if wait: expect(self.status).to_contain_text(wait, timeout=30_000)


@pytest.fixture
def open_panel(open_nb, runs):
    def go(*more, prompt="Once upon", delay=0.005, **values):
        shown = PANEL.format(runs=str(runs), prompt=prompt, values=values)
        nb = open_nb(SLOWLY.format(delay=delay), *more, shown)
        nb.run_all()
        panel = Panel(nb)
        expect(panel.go).to_be_visible()
        return panel
    yield go


def clean(panel):
    "Nothing went wrong on the page, and it asked nobody else for anything"
    assert panel.page.bad == [] and panel.page.outside == []
    assert panel.page.evaluate("() => window.XSS") is None


def test_every_control(open_panel):
    p = open_panel(max_new_tokens=20)
    app, page = p.app, p.page
    expect(p.stop).to_be_disabled()
    checkpoint = app.get_by_label("Checkpoint")
    labels = [" ".join(t.split()) for t in checkpoint.locator("option").all_inner_texts()]
    assert [re.sub(r"\d\.\d+", "N", t) for t in labels] == ["tiny step 4 val loss N", "tiny step 2 loss N"]
    checkpoint.select_option(index=1)
    for _ in range(2):
        p.button("Refresh").click()
        expect(p.button("Refresh")).to_be_enabled()
        expect(checkpoint.locator("option:checked")).to_contain_text(re.compile(r"step\s2"))
    p.generate()
    expect(p.status).to_contain_text("tiny@2")
    checkpoint.select_option(index=0)
    app.get_by_label("Prompt").fill("There was")
    for name in ("Temperature", "Top-p", "Top-k, 0 for all", "Max tokens"):
        row = app.locator(".widget-inline-hbox").filter(has_text=name)
        before, handle = row.locator(".widget-readout").inner_text(), row.locator(".noUi-handle")
        for key in ("ArrowRight", "ArrowLeft", "ArrowLeft"):
            handle.focus()
            page.keyboard.press(key)
        assert float(row.locator(".widget-readout").inner_text()) < float(before)
    seed, seeds = app.get_by_label("Seed"), set()
    for _ in range(2):
        seeds.add(seed.input_value())
        app.get_by_role("button", name="Dice").click()
        expect(seed).not_to_have_value(sorted(seeds)[-1])
    seed.fill("7"); seed.press("Tab")
    for n in (1, 2):
        p.generate()
        expect(p.status).to_contain_text("19 tokens, tiny@4")
        expect(p.tokens).to_have_count(19)
        expect(app.get_by_label("Text", exact=True).locator("option")).to_have_count(1 + n)
    expect(p.text).to_contain_text("There was")
    same = [p.text.inner_text()]
    for name in ("Previous", "Next", "Previous", "Previous", "Next", "Next"):
        p.button(name).click()
        page.wait_for_timeout(300)
        same.append(p.text.inner_text())
    assert same[0] == same[1] == same[2] == same[6] and same[4] != same[0]  # one seed, one text
    app.get_by_label("Text", exact=True).select_option(index=0)
    expect(p.text).to_contain_text("Once upon")
    p.nb.picture("light")
    clean(p)


def test_stop_is_heard(open_panel):
    p = open_panel(max_new_tokens=1000, delay=0.02)
    for _ in range(2):  # JupyterLab hears the first click of a kernel in another thread than later ones
        p.generate(wait=None)
        expect(p.tokens.nth(5)).to_be_visible()
        expect(p.go).to_be_disabled()
        began = time.monotonic()
        p.stop.click()
        expect(p.status).to_contain_text("stopped", timeout=2000)
        assert time.monotonic() - began < 0.5
        n = p.tokens.count()
        p.page.wait_for_timeout(300)
        assert 5 < n == p.tokens.count() < 1000
    p.nb.run_beside("time.sleep(6)")
    began = time.monotonic()
    p.generate(wait=None)
    expect(p.tokens.nth(5)).to_be_visible()
    asked = time.monotonic()
    p.stop.click()
    expect(p.status).to_contain_text("stopped", timeout=2000)
    assert time.monotonic() - asked < 0.5 and time.monotonic() - began < 5
    clean(p)


def test_first_token_comes_at_once(open_panel):
    p = open_panel(max_new_tokens=60, delay=0)
    p.generate()
    times = []
    for _ in range(3):
        expect(p.go).to_be_enabled()
        times.append(p.go.evaluate(FIRST))
    assert min(times) < 300, times
    clean(p)


def test_reload_in_mid_stream(open_panel):
    p = open_panel(max_new_tokens=1000, delay=0.08)  # longer than a page takes to load
    p.generate(wait=None)
    expect(p.tokens.nth(20)).to_be_visible()
    p.nb.save()
    before = p.text.inner_text()
    p.page.reload()
    p.nb.ready()
    expect(p.tokens.nth(20)).to_be_visible()
    expect(p.status).to_contain_text("generating")
    after = p.text.inner_text()
    assert after.startswith(before) and len(after) > len(before)
    n = p.tokens.count()
    expect(p.tokens.nth(n + 10)).to_be_visible()  # it goes on
    p.stop.click()
    expect(p.status).to_contain_text("stopped")
    n = int(re.search(r"(\d+) tokens", p.status.inner_text())[1])
    expect(p.tokens).to_have_count(n)
    clean(p)


def test_messages_that_are_lost(open_panel):
    lossy = """
count, send = 0, sampler.TokenView.send
def lossy(self, *args, **kwargs):
    global count
    count += 1
    if count % 3: send(self, *args, **kwargs)
sampler.TokenView.send = lossy
"""
    p = open_panel(lossy, max_new_tokens=200, delay=0.02)
    for _ in range(2):
        p.generate(wait=None)
        expect(p.tokens.nth(100)).to_be_visible()
        expect(p.status).to_contain_text("generating")
        expect(p.status).to_contain_text("done: 200 tokens")
        expect(p.tokens).to_have_count(200)
    clean(p)


def test_text_that_means_harm(open_panel):
    change = f"""
HOSTILE = {HOSTILE!r}
def change(event):
    if event.id is None: return event
    word = HOSTILE[event.id % len(HOSTILE)]
    top = tuple(replace(c, token=w) for c, w in zip(event.top, HOSTILE))
    return replace(event, token=word, text=word, top=top)
"""
    p = open_panel(change, prompt="".join(HOSTILE), max_new_tokens=60, temperature=2)
    p.generate()
    p.tokens.nth(3).click()
    expect(p.card).to_contain_text("<script>window.XSS=1</script>")
    shown = p.text.inner_text()
    for word in ("<script>window.XSS=1</script>", "onerror='window.XSS=2'>", "</span></div></pre>",
                 "&lt;b&gt;", "\\x00\\x07\\x1b[31m", "→", "↵", "\\u202eabc", "$x^2$ `code`"):
        assert word in shown, word
    assert not re.search(r"[\x00-\x08\x1b\u202e]", p.app.inner_text())
    assert p.app.locator("script, img, svg").count() == 0
    p.nb.picture("harm")
    clean(p)


def test_card_by_mouse(open_panel):
    p = open_panel(max_new_tokens=20)
    p.generate()
    p.tokens.nth(4).hover()
    expect(p.card).to_be_visible()
    expect(p.card).to_contain_text(re.compile(r"p \d.*, rank \d+, entropy \d"))
    expect(p.card.get_by_role("button")).to_have_count(5)
    p.app.get_by_label("Prompt").hover()
    expect(p.card).to_be_hidden()
    for _ in range(2):
        p.tokens.nth(4).click()
        p.app.get_by_label("Prompt").hover()
        expect(p.card).to_be_visible()
        p.tokens.nth(4).click()
        expect(p.card).to_be_hidden()
    texts = [p.text.inner_text()]
    for n in (1, 2):
        p.tokens.nth(4).click()
        p.nb.picture(f"card{n}")
        p.card.get_by_role("button", disabled=False).nth(n).click()
        expect(p.app.get_by_label("Text", exact=True).locator("option")).to_have_count(1 + n)
        expect(p.status).to_contain_text("done: 21 tokens")
        expect(p.tokens).to_have_count(25)
        texts.append(p.text.inner_text())
    start = len("Once upon") + 3
    assert len(set(texts)) == 3 and len({t[:start] for t in texts}) == 1
    expect(p.tokens.nth(4)).to_have_class(re.compile("tv-branched"))
    for _ in range(2):
        p.button("Parent").click()
        expect(p.button("Parent")).to_be_disabled()
        assert p.text.inner_text() == texts[0]
        p.button("Branch").click()
        expect(p.button("Parent")).to_be_enabled()
        assert p.text.inner_text() == texts[1]
    p.tokens.nth(4).click()
    p.card.get_by_role("button", name=re.compile("text 3:")).click()
    expect(p.text).to_have_text(texts[2], use_inner_text=True)
    p.nb.picture("branched")
    clean(p)


def test_card_by_keyboard(open_panel):
    p = open_panel(max_new_tokens=20)
    p.app.get_by_label("Prompt").focus()
    p.go.focus()
    p.page.keyboard.press("Space")
    expect(p.status).to_contain_text("done: 20 tokens", timeout=30_000)
    p.tokens.first.focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "End", "Home", "ArrowRight", "ArrowRight"):
        p.page.keyboard.press(key)
    expect(p.tokens.nth(2)).to_be_focused()
    expect(p.card).to_be_visible()
    for _ in range(2):
        p.page.keyboard.press("Enter")
        expect(p.tokens.nth(2)).to_have_attribute("aria-expanded", "true")
        expect(p.card.get_by_role("button").first).to_be_focused()
        p.page.keyboard.press("Escape")
        expect(p.tokens.nth(2)).to_have_attribute("aria-expanded", "false")
        expect(p.tokens.nth(2)).to_be_focused()
    p.page.keyboard.press("Enter")
    for key in ("ArrowDown", "ArrowDown", "ArrowUp", "Enter"): p.page.keyboard.press(key)
    expect(p.status).to_contain_text("done: 21 tokens", timeout=30_000)
    expect(p.tokens).to_have_count(23)
    expect(p.app.get_by_label("Text", exact=True).locator("option")).to_have_count(2)
    mode = p.page.evaluate("() => jupyterapp.shell.currentWidget.content.mode")
    assert mode == "command"  # no key went to the notebook
    clean(p)


def test_in_the_dark(open_panel):
    p = open_panel(max_new_tokens=120, temperature=1)
    p.nb.command("apputils:change-theme", theme="JupyterLab Dark")  # of the server: for what follows, too
    try: look_in_the_dark(p)
    finally: p.nb.command("apputils:change-theme", theme="JupyterLab Light")
    clean(p)


def look_in_the_dark(p):
    p.generate()
    p.tokens.nth(30).click()
    expect(p.card).to_be_visible()
    p.nb.picture("dark")
    colour = "e => getComputedStyle(e).backgroundColor.match(/[0-9]+/g).map(Number)"
    assert max(p.card.evaluate(colour)) < 100 and min(p.tokens.first.evaluate(colour)[:3]) > 120


def test_without_a_checkpoint(open_nb, tmp_path):
    nb = open_nb(PANEL.format(runs=str(tmp_path), prompt="", values={}))
    nb.run_all()
    p = Panel(nb)
    for _ in range(2):
        p.go.click()
        expect(p.status).to_contain_text("Train a model with")
        expect(p.go).to_be_enabled()
        expect(p.app.get_by_label("Text", exact=True).locator("option")).to_have_count(0)
    clean(p)
