"Texts and conversations from the command line: what comes out, where, and how it ends"
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from conftest import BIN, TINY, flags
from minigpt_wb import cli
from minigpt_wb.commands.generate import visible
from minigpt_wb.config import RunConfig, plain
from minigpt_wb.data.tokenizer import char_tokenizer, save_tokenizer
from minigpt_wb.model.gpt import build_model
from minigpt_wb.run import Run
from minigpt_wb.sampling.decoder import generate, generate_text
from minigpt_wb.sampling.open import open_model
from minigpt_wb.training.checkpoints import save_checkpoint

END, ESC = 256, 27
ONLY_ESC = ",".join(str(i) for i in range(257) if i != ESC)
FOREVER = ["--max-new-tokens", "1000000", "--banned", END, "--device", "cpu"]


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    "A folder with one tiny trained run, `tiny`"
    folder = tmp_path_factory.mktemp("talk") / "runs"
    settings = flags(**TINY | dict(save_every=2), max_steps=4, gpus=1, runs_dir=folder, run_name="tiny")
    subprocess.run([BIN / "minigpt", "train", *settings], check=True, capture_output=True, cwd=folder.parent)
    return folder


@pytest.fixture(scope="session")
def opened(runs): return open_model("tiny", "cpu", runs)


@pytest.fixture
def minigpt(runs, tmp_path, monkeypatch, capsys):
    "The command in this process -> (status, stdout, stderr)"
    monkeypatch.chdir(tmp_path)
    def run(command, *argv, stdin=b"", place=runs):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        status = cli.main([command, "--runs-dir", str(place), "--device", "cpu", *map(str, argv)])
        return status, *capsys.readouterr()
    return run


def store(folder, name, tokenizer, **settings):
    "A run with an untrained model"
    cfg = RunConfig.preset("debug").override(vocab_size=len(tokenizer))
    torch.manual_seed(0)
    state = {"config": plain(cfg.override(**settings).tree())}
    words = save_tokenizer(tokenizer, folder / f"{name} words")
    save_checkpoint(Run.create(cfg, folder, name), 1, build_model(cfg.model).state_dict(), None, state, words)


def test_the_same_text_everywhere(shell, runs, opened, tmp_path):
    words = ["generate", "--runs-dir", runs, "--prompt", "Once", "--seed", 3, "--device", "cpu"]
    wanted = generate_text(opened.model, opened.tokenizer, "Once", seed=3)
    loss = f"{opened.val_loss:.2f}"
    streamed = shell("minigpt", *words)
    assert (streamed.returncode, streamed.stdout) == (0, wanted + "\n")
    assert streamed.stderr.splitlines()[0] == f"minigpt: tiny@4, val loss {loss}, on cpu"
    assert len(wanted) > 50  # beyond the context of 32
    assert [line for line in streamed.stderr.splitlines()[1:] if "longer than the context" not in line] == []
    assert streamed.stderr.count("longer than the context") == 1
    written = shell("minigpt", *words, "--output", "a.txt")
    assert (written.stdout, (tmp_path / "a.txt").read_text()) == ("", wanted + "\n")
    assert written.stderr.endswith(f"minigpt: 1 text written to {tmp_path / 'a.txt'}\n")


@pytest.mark.parametrize("typed", [
    "tiny --prompt Once --max-new-tokens 8", "tiny@4 --prompt=Once --max-length 8",
    "latest --prompt Once --max_length=8", "--checkpoint tiny --prompt Once --max_tokens 8",
    "--prompt Once --gen-length 8 --top_k 50 --top-p 0.9 --temperature 0.8 --seed 0 --num-samples 1",
    "--prompt Once --max_new_tokens 8 --min-p 0 --repetition_penalty 1 --weights float32 --tokenizer bytes"])
def test_spellings(typed, minigpt, opened):
    status, out, _ = minigpt("generate", *typed.split())
    assert (status, out) == (0, generate_text(opened.model, opened.tokenizer, "Once", 8) + "\n")


@pytest.mark.parametrize("typed", [
    dict(temperature=0), dict(temperature=1.7), dict(top_k=3), dict(top_k=None), dict(top_p=0.3),
    dict(min_p=0.5, temperature=2), dict(repetition_penalty=1.8), dict(seed=5), dict(weights="int8"),
    dict(weights="bfloat16"), dict(banned=(32, 101)), dict(stop=("e", "\n"))])
def test_every_setting_is_a_flag(typed, minigpt, opened):
    words = flags(**typed) if "stop" not in typed else ["--stop", "e", "--stop", "\\n"]
    words = [",".join(map(str, typed["banned"])) if w.startswith("(") else w for w in words]
    status, out, err = minigpt("generate", "--prompt", "Once", "--max-new-tokens", 20, *words)
    [wanted] = generate(opened.model, opened.tokenizer, ["Once"], max_new_tokens=20, **typed)
    assert (status, out) == (0, f"{wanted}\n"), err


def test_a_path_will_do(minigpt, runs, opened, tmp_path):
    wanted = generate_text(opened.model, opened.tokenizer, "x", 8) + "\n"
    for path in (runs / "tiny", opened.path):
        assert minigpt("generate", path, "--prompt", "x", "--max-length", 8, place=tmp_path)[1] == wanted


def test_stdin_is_one_prompt(shell, minigpt, runs, opened):
    wanted = generate_text(opened.model, opened.tokenizer, "two\nlines", 8) + "\n"
    r = shell("minigpt", "generate", "--runs-dir", runs, "--max-length", 8, "--device", "cpu",
              input="two\nlines\n")
    assert (r.returncode, r.stdout) == (0, wanted)
    assert minigpt("generate", "--max-length", 8, stdin=b"two\nlines\r\n")[1] == wanted
    status, out, err = minigpt("generate", stdin=b"ab\xff")
    assert (status, out) == (2, "") and err == "minigpt: stdin is not UTF-8 text at byte 2\n"


def test_an_empty_prompt_begins_a_document(minigpt, opened):
    wanted = generate_text(opened.model, opened.tokenizer, "", 8) + "\n"
    assert minigpt("generate", "--prompt", "", "--max-length", 8)[:2] == (0, wanted)
    assert minigpt("generate", "--max-length", 8, stdin=b"")[:2] == (0, wanted)


def test_many_texts(minigpt, opened, tmp_path):
    prompts = [f"p{i}\nx" for i in range(7)]
    (tmp_path / "p.txt").write_text("\n".join(p.replace("\n", "\\n") for p in prompts) + "\n\n")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    wanted = generate(opened.model, opened.tokenizer, prompts, num_samples=3, max_new_tokens=8, seed=4)
    shared = ("--num-samples", 3, "--max-length", 8, "--seed", 4)
    status, out, err = minigpt("generate", "--prompts-file", "p.txt", *shared)
    assert status == 0 and out == "---\n".join(f"{g}\n" for g in wanted)  # 21 texts, two batches
    assert minigpt("generate", "--prompts_file", "p.jsonl", *shared, "--output", "o.jsonl")[:2] == (0, "")
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().split("\n")[:-1]]
    assert rows == [dict(prompt=g.prompt, text=g.text, seed=g.seed, end=g.end, checkpoint="tiny@4")
                    for g in wanted]
    assert [row["seed"] for row in rows[:4]] == [4, 5, 6, 4]
    minigpt("generate", "--prompts-file", "p.jsonl", *shared, "--output", "o.txt")
    assert (tmp_path / "o.txt").read_text() == out


def test_a_file_is_replaced_only_by_force(minigpt, tmp_path):
    file = tmp_path / "o.txt"
    file.write_text("precious")
    status, out, err = minigpt("generate", "--prompt", "x", "--output", file)
    assert (status, out) == (2, "")
    assert err == f"minigpt: {file} exists: give --force to replace it, or another --output\n"
    assert file.read_text() == "precious"
    assert minigpt("generate", "--prompt", "x", "--max-length", 2, "--output", file, "--force")[0] == 0
    assert file.read_text().startswith("x") and [p.name for p in tmp_path.iterdir()] == ["o.txt"]


def test_a_file_that_comes_to_be_while_it_writes_is_kept(minigpt, tmp_path, monkeypatch):
    from minigpt_wb.sampling import decoder
    fast, file = decoder.stream_all, tmp_path / "o.txt"
    def meanwhile(*args, **kwargs):
        file.write_text("precious")
        return fast(*args, **kwargs)
    monkeypatch.setattr(decoder, "stream_all", meanwhile)
    status, out, err = minigpt("generate", "--prompt", "x", "--output", file)
    assert (status, out) == (2, "") and "exists: give --force" in err and file.read_text() == "precious"


def test_however_small_a_temperature_is(minigpt):
    greedy, small = (minigpt("generate", "--prompt", "x", "--temperature", t)[1] for t in ("0", "1e-40"))
    assert greedy == small and len(greedy) > 5


def test_a_damaged_checkpoint_is_passed_over_and_named(minigpt, runs, tmp_path):
    shutil.copytree(runs, tmp_path / "copy")
    *_, newest = sorted((tmp_path / "copy/tiny/checkpoints").glob("step_*"))
    weights = newest / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-9] ^= 1
    weights.write_bytes(data)
    status, out, err = minigpt("generate", "tiny", "--prompt", "x", place=tmp_path / "copy")
    assert status == 0 and out.startswith("x") and f"instead of {newest.name} (model.safetensors" in err
    status, out, err = minigpt("generate", "tiny@4", "--prompt", "x", place=tmp_path / "copy")
    assert (status, out) == (2, "") and "holds no intact checkpoint" in err


@pytest.mark.parametrize("typed, said", [
    ("--temperature -1", "temperature='-1' is not valid"), ("--top-p 0", "top_p='0' is not valid"),
    ("--top_p 1.1", "top_p='1.1' is not valid"), ("--top_k 0", "top_k='0' is not valid"),
    ("--top-k 258", "top_k=258 is not valid: the vocabulary has 257 tokens"),
    ("--num-samples 0", "num_samples='0' is not valid"),
    ("--max-length 0", "max_new_tokens='0' is not valid"),
    ("--seed -1", "seed='-1' is not valid"), ("--min-p 2", "min_p='2' is not valid"),
    ("--repetition-penalty 0", "repetition_penalty='0' is not valid"), ("--banned 257", "banned=[257]"),
    ("--stop=", "stop='' is not valid"), ("--weights int4", "weights='int4' is not known"),
    ("--device tpu", "device='tpu' is not known"), ("--tokenizer odd", "tokenizer 'odd' does not exist"),
    ("--model-fn nowhere:f", "nowhere"), ("nowhere", "no run 'nowhere'"), ("tiny@9", "there is no step 9"),
    ("no.pt", "there is no file no.pt"), ("tiny --checkpoint tiny", "both 'tiny' and --checkpoint tiny"),
    ("--prompts-file no.txt", "both --prompt and --prompts-file"),
    ("--temprature 1", "did you mean 'temperature'"),
    ("tiny tiny", "'tiny' is too much"), ("--output no/o.txt", "there is no folder no"),
    ("--output .", ". is not a file"), ("--output /dev/null --force", "/dev/null is not a file"),
    ("--interactive", "--interactive goes without prompt"), ("--seed", "--seed needs a value"),
    ("--banned " + ",".join(map(str, range(257))), "banned leaves no token to draw"),
    ("a" * 300, "no run 'aaa"), ("--output " + "a" * 300, "File name too long")],
    ids=lambda v: v[:30])
def test_bad_input_is_a_line(typed, said, minigpt):
    status, out, err = minigpt("generate", *typed.split(), "--prompt", "x")
    assert (status, out) == (2, "") and said in err and err.splitlines()[-1].startswith(("minigpt: ", "  ["))


@pytest.mark.parametrize("name, content, said", [
    ("no.txt", None, "the prompts file no.txt cannot be read: No such file"),
    ("p.txt", b"\n \n", "holds no prompt"),
    ("p.txt", b"a\xff", "p.txt is not UTF-8 text at byte 1"),
    ("p.jsonl", b'{"prompt": "a"}\n{"text": "a"}\n', 'p.jsonl:2 is not a JSON object with a "prompt"'),
    ("p.jsonl", b'{"prompt": "\\ud800"}', "is not UTF-8 text"),
    (".", None, "cannot be read: Is a directory")])
def test_bad_prompts_files(name, content, said, minigpt, tmp_path):
    if content is not None: (tmp_path / name).write_bytes(content)
    status, out, err = minigpt("generate", "--prompts-file", name)
    assert (status, out) == (2, "") and said in err and err.count("\n") == 1


def test_a_model_that_does_not_fit(minigpt, tmp_path):
    status, out, err = minigpt("generate", "--prompt", "x", place=tmp_path / "none")
    assert (status, out) == (2, "") and "searched" in err and "`minigpt train`" in err
    store(tmp_path, "chars", char_tokenizer("abc"))
    status, out, err = minigpt("generate", "chars", "--prompt", "abé", place=tmp_path)
    assert (status, out) == (2, "") and "has no 'é' (U+00E9)" in err
    assert minigpt("generate", "chars", "--prompt", "ab", place=tmp_path)[0] == 0  # 50 of 4 likeliest
    store(tmp_path, "other", char_tokenizer("abc"), n_layer=3)
    status, out, err = minigpt("generate", "other", "--prompt", "ab", place=tmp_path)
    assert (status, out) == (2, "") and "layers" in err
    assert "Traceback" not in err


def test_undecodable_words(shell, runs):
    r = shell("minigpt", "generate", "--runs-dir", runs, "--prompt", os.fsdecode(b"a\xff"))
    assert (r.returncode, r.stdout) == (2, "") and "is not UTF-8 text" in r.stderr


def test_head_has_seen_enough(runs, tmp_path):
    words = [BIN / "minigpt", "generate", "--runs-dir", runs, "--prompt", "Once", *FOREVER]
    words = " ".join(map(str, words))
    r = subprocess.run(["bash", "-c", f"{words} | head -c 20; echo ${{PIPESTATUS[0]}}"], capture_output=True,
                       timeout=60)
    assert r.stdout.startswith(b"Once") and r.stdout.endswith(b"0\n") and b"Traceback" not in r.stderr


@pytest.mark.parametrize("output", [None, "o.jsonl"])
def test_ctrl_c_ends_the_text(output, runs, tmp_path):
    words = [BIN / "minigpt", "generate", "--runs-dir", runs, "--prompt", "Once", *FOREVER]
    if output: words += ["--output", output]
    p = subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path)
    said = p.stderr.readline() + p.stderr.readline()  # the checkpoint, then that the window slides
    assert b"tiny@4" in said and b"longer than" in said
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=20)
    assert p.returncode == 130 and err.endswith(b"minigpt: interrupted\n") and b"Traceback" not in err
    if output:
        [row] = map(json.loads, (tmp_path / output).read_text().split("\n")[:-1])
        assert row["end"] == "stopped" and len(row["text"]) > 20 and out == b""
    else: assert out.startswith(b"Once") and out.endswith(b"\n") and len(out) > 40


# --- a conversation

def test_chat_through_a_pipe(shell, runs, opened):
    typed = ["Once", "set temperature=0", "set top-k 5", "Once", "set temperature cold", "set top_k 999",
             "set", "set the table", "set seed", "\\quit", "help", "clear", " QUIT ", "never"]
    r = shell("minigpt", "chat", "--runs-dir", runs, "--max_tokens", 8, "--device", "cpu",
              input="\n".join(typed) + "\n")
    head, *answers = r.stdout.split("Enter your prompt: ")
    path = opened.path
    assert r.returncode == 0 and head.splitlines() == [
        "Using device: cpu", "Loading tokenizer...", f"Found latest checkpoint: {path} (step 4)",
        f"Loading model from {path}", "Model loaded successfully!", "   Step: 4", f"   Epoch: {opened.epoch}",
        f"   Loss: {opened.loss:.4f}", f"   Validation loss: {opened.val_loss:.4f}",
        "   Model: 32d, 1L, 2H", "",
        "Interactive Text Generation Mode", "Type 'quit' to exit, 'help' for options", "=" * 50, ""]
    def answer(prompt, typed, **how):
        text = generate_text(opened.model, opened.tokenizer, prompt, 8, **how)
        return (f"{typed}\n\nGenerating text...\nPrompt: {prompt}\n\nGenerated text:\n{text}\n"
                + "=" * 50 + "\n\n")
    assert answers[0] == answer("Once", "Once")
    assert answers[1:3] == ["set temperature=0\ntemperature = 0.0\n", "set top-k 5\ntop_k = 5\n"]
    assert answers[3] == answer("Once", "Once", temperature=0)
    assert answers[4:6] == ["set temperature cold\n", "set top_k 999\n"]
    assert [f"  {name} " in answers[6] for name in ("temperature", "top_k", "seed", "stop")] == [True] * 4
    assert re.search(r"temperature +0\.0 ", answers[6]) and re.search(r"top_k +5 ", answers[6])
    assert answers[9] == answer("quit", "\\quit", temperature=0)
    assert "set temperature 0.7" in answers[10] and re.search(r"max_new_tokens +8 ", answers[10])
    assert answers[11] == "clear\n" and answers[12] == " QUIT \n" and len(answers) == 13
    assert [line.split(" is no")[0] for line in r.stderr.splitlines()] == [
        "minigpt: temperature='cold'", "minigpt: top_k=999", "minigpt: 'the'",
        "minigpt: set seed to what? give a value, as in `set temperature 0.7`"]


def test_chat_ends_with_its_input_and_bears_mistakes(minigpt, tmp_path):
    store(tmp_path, "chars", char_tokenizer("abc"))
    words = ("chars", "--max-length", 3)
    status, out, err = minigpt("chat", *words, stdin="é\nÿ\nab".encode(), place=tmp_path)
    assert status == 0 and err.count("minigpt: ") == 2 and "has no 'é'" in err
    assert out.count("Generated text:\nab") == 1 and out.endswith("Enter your prompt: \n")
    status, out, err = minigpt("chat", "chars", stdin=b"a\xff\n", place=tmp_path)
    assert status == 0 and "is not UTF-8 text" in err
    words = ("chars", "--interactive", "--seed", 3)
    status, out, err = minigpt("generate", *words, stdin=b"set\n", place=tmp_path)
    assert status == 0 and re.search(r"seed +3 ", out)


@pytest.mark.parametrize("typed, said", [
    ("--top-k 258", "the vocabulary has 257"), ("--prompt x", "--prompt is not a flag"),
    ("nowhere", "no run 'nowhere'"), ("--temperature -1", "temperature='-1'"),
    ("--device tpu", "device='tpu'")])
def test_chat_refuses_before_it_begins(typed, said, minigpt):
    status, out, err = minigpt("chat", *typed.split())
    assert status == 2 and said in err and "Enter your prompt" not in out


class Terminal:
    "A program with a terminal of its own"
    def __init__(self, *words, cwd, **env):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(cwd)
            os.execve(words[0], list(map(str, words)), os.environ | {"TERM": "xterm"} | env)
        self.seen = ""

    def expect(self, wanted: str, timeout: float = 60.0) -> str:
        "What came up to `wanted`"
        end = time.monotonic() + timeout
        while wanted not in self.seen:
            ready, _, _ = select.select([self.fd], [], [], max(0.0, end - time.monotonic()))
            try: data = os.read(self.fd, 65536) if ready else b""
            except OSError: data = b""
            assert data, f"no {wanted!r} came, but {self.seen[-2000:]!r}"
            self.seen += data.decode(errors="replace").replace("\r\n", "\n")
        before, _, self.seen = self.seen.partition(wanted)
        return before

    def type(self, text: str) -> None: os.write(self.fd, text.encode())

    def status(self, timeout: float = 60.0) -> int:
        "The exit status; a program that does not end is killed"
        end = time.monotonic() + timeout
        try:
            while select.select([self.fd], [], [], max(0.0, end - time.monotonic()))[0]:
                if not os.read(self.fd, 65536): break
            else: os.kill(self.pid, signal.SIGKILL)
        except OSError: pass  # the other side is closed
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_chat_at_a_terminal(runs, tmp_path):
    words = (BIN / "minigpt", "chat", "--runs-dir", runs, *FOREVER)
    home = dict(XDG_STATE_HOME=str(tmp_path / "state"), HOME=str(tmp_path))
    t = Terminal(*words, cwd=tmp_path, **home)
    t.expect("Enter your prompt: ")
    t.type("Once\n")
    t.expect("Generated text:\nOnce")
    time.sleep(0.5)
    t.type("\x03")
    assert "minigpt:" not in t.expect("\n" + "=" * 50 + "\n\n", timeout=5)  # not in the text, but after it
    assert "longer than the context" in t.expect("Enter your prompt: ", timeout=5)
    t.type("half a line")
    t.expect("half a line")
    time.sleep(0.5)  # input() hears no signal between its prompt and its wait
    t.type("\x03")
    t.expect("(Ctrl-C stops an answer; quit or Ctrl-D ends the session)\nEnter your prompt: ", timeout=5)
    t.type("set max_length 3\n")
    t.expect("max_new_tokens = 3\n")
    t.expect("Enter your prompt: ")
    t.type("\x1b[A\x1b[A\n")  # up, up: Once
    assert "Once" in t.expect("\n" + "=" * 50 + "\n")
    t.type("clear\n")
    t.expect("\x1b[2J\x1b[H")
    t.expect("Enter your prompt: ")  # only there is Ctrl-D an end
    t.type("\x04")
    assert t.status() == 0
    kept = (tmp_path / "state/minigpt_wb/history").read_text().splitlines()
    assert kept == ["Once", "set max_length 3", "Once", "clear"]
    t = Terminal(*words, cwd=tmp_path, **home)
    t.expect("Enter your prompt: ")
    t.type("\x1b[A\x1b[A\x1b[A\n")
    t.expect("max_new_tokens = 3\n")
    t.type("exit\n")
    assert t.status() == 0


def test_chat_without_a_place_for_its_history(runs, tmp_path):
    (tmp_path / "state").write_text("a file")
    state = str(tmp_path / "state")
    t = Terminal(BIN / "minigpt", "chat", "--runs-dir", runs, cwd=tmp_path, XDG_STATE_HOME=state)
    t.expect("Enter your prompt: ")
    t.type("q\n")
    assert t.status() == 0


def test_escape_sequences_stay_out_of_a_terminal(runs, tmp_path, shell):
    words = ["generate", "--runs-dir", runs, "--prompt", "a\x07\u202eb", "--banned", ONLY_ESC]
    words += ["--max-length", 4]
    assert shell("minigpt", *words).stdout == "a\x07\u202eb" + "\x1b" * 4 + "\n"
    t = Terminal(BIN / "minigpt", *words, cwd=tmp_path)
    assert t.expect("\\x1b\\x1b\\x1b\\x1b\n").endswith("a\\x07\\u202eb")
    assert t.status() == 0
    assert visible("".join(map(chr, range(32)))).count("\\") == 30


def test_a_terminal_has_no_prompt_to_give(runs, tmp_path):
    t = Terminal(BIN / "minigpt", "generate", "--runs-dir", runs, cwd=tmp_path)
    t.expect("minigpt: after what? give --prompt")
    assert t.status() == 2


@pytest.mark.parametrize("command, said", [
    ("generate", ["--prompts-file", "--max-new-tokens", "0.8", "`---`", "130"]),
    ("chat", ["set temperature 0.7", "--top-p", "Ctrl-C", "\\quit"])])
def test_help(command, said, capsys):
    with pytest.raises(SystemExit) as end: cli.main([command, "--help"])
    out = capsys.readouterr().out
    assert not end.value.code and [s for s in said if s not in out] == []
