"Writing text where a cell is too small: random shapes, thread counts, frequencies, other people's models."
import math, os, random, subprocess, sys, threading

import pytest
import torch

from minigpt_wb.config import ModelConfig
from minigpt_wb.data.tokenizer import load_tokenizer
from minigpt_wb.model.gpt import GPT
from minigpt_wb.sampling.decoder import generate, stream
from minigpt_wb.sampling.loops import compiler
from minigpt_wb.sampling.samplers import dice, draw, settings
from minigpt_wb.sampling.scores import score_text
from minigpt_wb.sampling.steps import Cached, Uncached, next_logits
from minigpt_wb.sampling.weights import Fused, pack

LETTERS = load_tokenizer("bytes")
SAMPLED = dict(max_new_tokens=30, temperature=1.2, top_k=None, top_p=0.95, seed=11)


def random_model(rng: random.Random, dtype: torch.dtype) -> GPT:
    "A GPT of any shape that the config allows, small, with weights large enough that attention matters"
    n_head = rng.choice([1, 2, 4])
    head_dim = rng.choice([16, 2, 6, 34])
    shape = dict(n_layer=rng.randint(1, 3), n_head=n_head, d_model=n_head * rng.choice([16, 7, 25]),
                 head_dim=head_dim, d_ff=rng.choice([None, 37, 96]),
                 vocab_size=rng.choice([5, 257, 999]), context_length=rng.choice([1, 2, 7, 16, 40]),
                 bias=rng.random() < 0.5, qk_norm=rng.random() < 0.5,
                 position=rng.choice(["learned", "rotary"]), norm=rng.choice(["layernorm", "rmsnorm"]),
                 activation=rng.choice(["gelu", "gelu_tanh", "swiglu"]), tie_embeddings=rng.random() < 0.5,
                 n_kv_head=rng.choice([k for k in (1, 2, 4) if n_head % k == 0]), init_std=0.2,
                 attention=rng.choice(["auto", "explicit", "sdpa"]), dropout=rng.choice([0.0, 0.3]))
    torch.manual_seed(rng.randint(0, 10**6))
    return GPT(ModelConfig(**shape)).to(dtype)


def random_prompts(rng: random.Random, model: GPT) -> list[list[int]]:
    "One to six prompts, for a short context now and then 70, some longer than the context"
    V, n = model.cfg.vocab_size, model.cfg.context_length
    lengths = [rng.choice([1, 2, n, n + 3, 3 * n]) for _ in range(rng.randint(1, 6))]
    if n < 8 and rng.random() < 0.2: lengths = [n] * 70  # more than the compiled code takes
    return [[rng.randrange(V) for _ in range(length)] for length in lengths]


def greedy(reader, lengths: list[int]) -> list[list[int]]:
    "The likeliest tokens of rows that end after `lengths` tokens"
    out, scores = [[] for _ in lengths], reader.read()
    while scores:
        taken = {row: int(s.argmax()) for row, s in scores.items() if len(out[row]) < lengths[row]}
        for row, token in taken.items(): out[row].append(token)
        scores = reader.read(taken)
    return out


@pytest.mark.parametrize("seed", range(60))
def test_cached_writes_what_uncached_writes(seed):
    rng = random.Random(seed)
    model = random_model(rng, torch.float64)
    prompts, context = random_prompts(rng, model), model.cfg.context_length
    lengths = [rng.choice([1, 5, 2 * context + 9]) for _ in prompts]
    fast = greedy(Cached(pack(model), prompts, context, room=rng.choice([1, 8, 99])), lengths)
    assert fast == greedy(Uncached(model, prompts, context), lengths)


@pytest.mark.parametrize("way,seed", [("compiled", i) for i in range(30)] + [("torch", i) for i in range(8)])
def test_cached_scores_are_those_of_uncached(way, seed, monkeypatch):
    if way == "torch": monkeypatch.setattr("minigpt_wb.sampling.weights.library", lambda: None)
    elif not compiler(): pytest.skip("no C compiler here")
    rng = random.Random(1000 + seed)
    model = random_model(rng, torch.float32)
    assert any(type(m) is Fused for m in pack(model).model.modules()) == (way == "compiled")
    prompts, context = random_prompts(rng, model), model.cfg.context_length
    fast, slow = Cached(pack(model), prompts, context), Uncached(model, prompts, context)
    a, b = fast.read(), slow.read()
    for _ in range(2 * context + 3):
        for row in b:
            apart, size = (a[row] - b[row]).abs().max().item(), b[row].abs().max().item()
            assert apart <= 1e-5 * max(1.0, size), (row, apart, size)
        taken = {row: int(s.argmax()) for row, s in b.items()}
        a, b = fast.read(taken), slow.read(taken)


def model_for(tokenizer, n_layer=3, d_model=64, context_length=48) -> GPT:
    torch.manual_seed(5)
    cfg = ModelConfig(n_layer=n_layer, n_head=4, d_model=d_model, context_length=context_length,
                      vocab_size=len(tokenizer), init_std=0.15)
    return GPT(cfg)


@pytest.mark.parametrize("how", [SAMPLED, dict(max_new_tokens=30, temperature=0)], ids=["sampled", "greedy"])
def test_one_seed_is_one_text(how):
    "On 1 and 2 threads, streamed or not, alone or in a batch, with the cache or without"
    model, prompts = model_for(LETTERS, n_layer=1, d_model=960), ["Once", "", "a longer beginning " * 4]
    texts, before = {}, torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            texts[n] = [str(g) for g in generate(model, LETTERS, prompts, **how)]
            texts[n, "alone"] = [str(generate(model, LETTERS, [p], **how)[0]) for p in prompts]
            texts[n, "streamed"] = [p + "".join(e.text for e in stream(model, LETTERS, p, **how))
                                    for p in prompts]
        texts["uncached"] = [str(g) for g in generate(model, LETTERS, prompts, cached=False, **how)]
    finally: torch.set_num_threads(before)
    assert sum(p.numel() for p in model.parameters()) > 10_000_000  # smaller ones take one thread anyway
    assert len({tuple(t) for t in texts.values()}) == 1


def test_scores_are_the_same_bits_on_one_and_two_threads():
    model, before = model_for(LETTERS, d_model=512), torch.get_num_threads()
    packed, ids = pack(model), [list(b"the same bits"), list(b"of a batch")]
    try:
        found = []
        for n in (1, 2):
            torch.set_num_threads(n)
            reader = Cached(packed, ids, 48)
            reader.read()
            found.append(torch.stack(list(reader.read({0: 97, 1: 98}).values())))
    finally: torch.set_num_threads(before)
    assert torch.equal(*found)


def expected(logits: torch.Tensor, keep: list[int]) -> torch.Tensor:
    "Softmax over the ids `keep` alone"
    kept = torch.full_like(logits, -math.inf).index_copy(0, torch.tensor(keep), logits[keep])
    return kept.double().softmax(0)


LOGITS = torch.tensor([2.0, 1.5, 1.0, 0.0, -0.5, -1.0, -3.0, 1.9])
BEST = [0, 7, 1, 2, 3, 4, 5, 6]                          # their ids, best first
P = LOGITS.double().softmax(0)
HALF = [i for n, i in enumerate(BEST) if P[BEST[:n]].sum() < 0.7]   # top-p 0.7
PENALISED = torch.where(torch.arange(8) < 2, LOGITS / 1.5, LOGITS)


@pytest.mark.parametrize("how,chances", [
    (dict(temperature=1), P),
    (dict(temperature=0.5), (LOGITS.double() / 0.5).softmax(0)),
    (dict(temperature=1, top_k=3), expected(LOGITS, BEST[:3])),
    (dict(temperature=1, top_p=0.7), expected(LOGITS, HALF)),
    (dict(temperature=1, min_p=0.2), expected(LOGITS, [i for i in range(8) if P[i] >= 0.2 * P.max()])),
    (dict(temperature=1, repetition_penalty=1.5), PENALISED.double().softmax(0)),
    (dict(temperature=1, banned=(0, 7)), expected(LOGITS, [1, 2, 3, 4, 5, 6])),
    (dict(temperature=2, top_k=4, top_p=0.8), None),
    (dict(temperature=0), expected(LOGITS, [0])),
], ids=lambda v: " ".join(v) if isinstance(v, dict) else "")
def test_draws_come_as_often_as_their_definition_says(how, chances):
    sampler = settings(**dict(top_k=None, top_p=1) | how).sampler(8)
    if chances is None:  # several together: each takes what the one before left
        kept = expected(LOGITS / 2, BEST[:4])
        kept = [i for n, i in enumerate(BEST[:4]) if kept[BEST[:n]].sum() < 0.8]
        chances = expected(LOGITS / 2, kept)
    n, throw = 6000, dice(3)
    seen = torch.tensor([draw(sampler(LOGITS, [0, 1, 1]), throw) for _ in range(n)]).bincount(minlength=8)
    assert not seen[chances == 0].any()
    expect = n * chances[chances > 0]
    chi2 = ((seen[chances > 0] - expect) ** 2 / expect).sum().item()
    assert chi2 < 30, (chi2, seen, expect)  # 7 degrees of freedom: once in 10,000


def test_two_threads_may_share_a_model():
    model, found = model_for(LETTERS), {}
    def texts(seed): return generate(model, LETTERS, ["a", "bc"], **SAMPLED | dict(seed=seed))
    def write(seed): found[seed] = texts(seed)
    threads = [threading.Thread(target=write, args=(seed,)) for seed in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    for seed in range(4): assert found[seed] == texts(seed)


def test_weights_that_change_change_the_text():
    "What was laid out for decoding is never older than the model"
    model = model_for(LETTERS)
    opt = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    up = lambda: model.layers[0].mlp.up
    half = lambda: {k: v * 0.5 for k, v in model.state_dict().items()}
    changes = {"an optimiser": lambda: (model(torch.tensor([[1, 2]])).sum().backward(), opt.step()),
               "load_state_dict": lambda: model.load_state_dict(half()),
               "behind autograd's back": lambda: model.layers[1].mlp.up.weight.data.mul_(3),
               "another tensor": lambda: setattr(up(), "weight", torch.nn.Parameter(-up().weight.detach()))}
    for what, change in changes.items():
        generate(model, LETTERS, ["a"], **SAMPLED)
        change()
        fast, slow = (generate(model, LETTERS, ["a"], cached=c, **SAMPLED)[0].text for c in (True, False))
        assert fast == slow, what


@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_bits_depend_on_nobody_else(weights):
    "On 1 and 2 threads, alone and in a batch: the scores of one token, bit by bit"
    model, before = model_for(LETTERS, d_model=512), torch.get_num_threads()
    for p in model.parameters(): p.data += 0.01  # no bias is zero
    packed, ids = pack(model, weights), [list(b"one text"), list(b"some of a"), list(b"batch"), list(b"of 4")]
    x = torch.randn(len(ids), 1, 512)
    def scores(rows: list[int]) -> torch.Tensor:
        cache = packed.new_cache(len(rows), 4)
        with torch.no_grad(): y = packed.model.layers[0](x[rows], None, None, cache)
        return packed.logits(y[:, 0])
    try:
        together = []
        for n in (1, 2):
            torch.set_num_threads(n)
            together += [scores([0, 1, 2, 3]), torch.cat([scores([i]) for i in range(4)])]
    finally: torch.set_num_threads(before)
    if not compiler(): pytest.skip("no C compiler here, and torch promises less")
    assert all(torch.equal(t, together[0]) for t in together)


def test_numbers_that_move_in_mid_text():
    "A model whose tensors are replaced while it writes: the old ones are not read once they are gone"
    model = model_for(LETTERS)
    whole = generate(model, LETTERS, ["abc"], **SAMPLED)[0].text
    events = stream(model, LETTERS, "abc", **SAMPLED)
    text = next(events).text
    for p in model.parameters(): p.data = p.data.clone()
    rubbish = [torch.full((p.numel(),), torch.nan) for p in model.parameters()]
    assert text + "".join(e.text for e in events) == whole and rubbish


@pytest.mark.parametrize("what", ["logit_transform", "head_bias", "eps", "hook", "forward", "compile"])
def test_a_model_that_is_set_up_anew(what):
    "What is no weight counts as well, whenever it was set"
    model = model_for(LETTERS)
    generate(model, LETTERS, ["a"], **SAMPLED)
    block, heard = model.layers[0], []
    if what == "logit_transform": model.logit_transform = lambda y: -y
    if what == "head_bias": model.head_bias = torch.randn(257) * 5
    if what == "eps": block.norm1.eps, block.mlp.activation = 3.0, "gelu_tanh"
    if what == "hook": block.mlp.register_forward_hook(lambda m, x, y: (heard.append(1), y * -3)[1])
    if what == "forward":
        down = block.mlp.down
        down.forward = lambda x: torch.nn.functional.linear(x, down.weight, down.bias) * -3
    if what == "compile":
        model = GPT(ModelConfig(**vars(model.cfg) | dict(dropout=0.5)))
        for layer in model.layers: layer.compile(backend="eager")
    fast, slow = (generate(model, LETTERS, ["a"], cached=c, **SAMPLED)[0].text for c in (True, False))
    assert fast == slow and bool(heard) == (what == "hook")


ALONE = """
import sys, torch
from minigpt_wb.config import ModelConfig
from minigpt_wb.data.tokenizer import load_tokenizer
from minigpt_wb.model.gpt import GPT
from minigpt_wb.sampling.decoder import generate
from minigpt_wb.sampling.native import code_dir, library
tokenizer = load_tokenizer("bytes")
torch.manual_seed(5)
model = GPT(ModelConfig(n_layer=1, n_head=2, d_model=32, context_length=32, vocab_size=257, init_std=0.2))
{before}
text = generate(model, tokenizer, ["a"], max_new_tokens=20, seed=1)[0].text
{after}
print(library() is not None, len(list(code_dir().glob("*"))), ascii(text))
"""


def written_alone(tmp_path, before="", after="", **env) -> list[str]:
    "What a process of its own writes, its compiled code in `tmp_path` -> [whether compiled, files, text]"
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path)} | env
    code = ALONE.format(before=before, after=after)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return [*done.stdout.split(" ", 2), done.stderr]


@pytest.mark.skipif(not compiler(), reason="no C compiler here")
def test_compiled_code_that_is_damaged_is_made_again(tmp_path):
    compiled, files, text, _ = written_alone(tmp_path)
    assert (compiled, files) == ("True", "2")
    [made] = (tmp_path / "minigpt_wb/native").glob("*.so")
    good = made.read_bytes()
    made.write_bytes(good[:5000])
    assert written_alone(tmp_path)[:3] == ["True", "2", text] and made.read_bytes()[:4] == good[:4]


@pytest.fixture(scope="module")
def by_torch(tmp_path_factory):
    "What is written without compiled code"
    return written_alone(tmp_path_factory.mktemp("none"), MINIGPT_WB_NATIVE="0")[2]


USELESS = ("exit 1", r"printf '\377' >&2; exit 1", "echo x > $(echo $* | grep -o '[^ ]*decode.so')")


@pytest.mark.parametrize("compiles", USELESS, ids=["fails", "says no text", "makes no library"])
def test_a_compiler_of_no_use_is_said_and_done_without(tmp_path, compiles, by_torch):
    fake = tmp_path / "cc"
    fake.write_text(f"#!/bin/sh\n{compiles}\n")
    fake.chmod(0o755)
    compiled, _, text, said = written_alone(tmp_path / "cache", CC=str(fake))
    assert compiled == "False" and "the C compiler is of no use here" in said
    assert text == by_torch


def test_defaults_of_a_process_are_its_own(tmp_path):
    "Device, kind of float, threads and random numbers: what decoding finds it leaves, and does not depend on"
    text = written_alone(tmp_path)[2]
    before = "torch.set_default_device('meta'); torch.set_default_dtype(torch.float64)"
    assert written_alone(tmp_path / "other", before)[2] == text
    before = "torch.set_num_threads(2); state = torch.get_rng_state()"
    after = "assert torch.get_num_threads() == 2 and torch.equal(state, torch.get_rng_state())"
    assert written_alone(tmp_path / "new", before, after)[2] == text


class Wrapped(torch.nn.Module):
    "A model of another library behind our contract: what decoding needs of it, and no more"
    def __init__(self, model):
        super().__init__()
        self.model, self.context_length = model, model.config.n_positions
    @property
    def head_weight(self): return self.model.lm_head.weight
    def new_cache(self, B, length=None):
        from transformers import DynamicCache
        return DynamicCache()
    def hidden(self, tokens, attention_mask=None, positions=None, cache=None):
        if attention_mask is not None and positions is None:
            positions = (attention_mask.long().cumsum(1) - 1).clamp_min(0)[:, -tokens.size(1):]
        return self.model.transformer(input_ids=tokens, attention_mask=attention_mask, position_ids=positions,
                                      past_key_values=cache, use_cache=cache is not None).last_hidden_state


def test_a_model_of_another_library_needs_only_the_contract():
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    cfg = GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=24, vocab_size=257, initializer_range=0.2,
                     bos_token_id=256, eos_token_id=256)
    theirs = GPT2LMHeadModel(cfg).double().eval()
    ours, prompts = Wrapped(theirs), ["one", "two of them", "longer than the context of 24 tokens"]
    how = dict(max_new_tokens=40, temperature=0)
    fast, slow = (generate(ours, LETTERS, prompts, cached=c, **how) for c in (True, False))
    assert fast == slow
    ids = torch.tensor([list(b"two of them")])
    told = theirs.generate(ids, max_new_tokens=13, do_sample=False, pad_token_id=256)[0, 11:]
    assert fast[1].ids[:13] == told.tolist() and len(told) == 13


def test_surprisal_is_minus_log_p_of_what_comes():
    model = model_for(LETTERS, context_length=400).double()
    text = "naïve €uro text 😀"
    scored = score_text(model, LETTERS, text)
    assert bytes(s.id for s in scored) == text.encode()
    with torch.no_grad(): logp = model(torch.tensor([[256, *text.encode()]]))[0].log_softmax(-1)
    for i, s in enumerate(scored): assert s.nats == pytest.approx(-logp[i, s.id].item(), abs=1e-4)
    assert next_logits(model, [256]).argmax() == scored[0].top[0].id


def test_no_character_is_split():
    "A model that writes euro signs and smileys a byte at a time"
    class Writer(torch.nn.Module):
        def __init__(self, text):
            super().__init__()
            self.bytes, self.head_weight = text.encode(), torch.nn.Parameter(torch.eye(257))
        def hidden(self, tokens):
            return torch.eye(257)[self.bytes[(tokens.size(1) - 1) % len(self.bytes)]].expand(1, 1, 257) * 50
    text = "a€😀é"
    model = Writer(text)
    pieces = [e.text for e in stream(model, LETTERS, "x", temperature=0, max_new_tokens=len(text.encode()))]
    assert "".join(pieces) == text and [p for p in pieces if p] == list(text)
    cut = list(stream(model, LETTERS, "x", temperature=0, max_new_tokens=3))
    assert "".join(e.text for e in cut) == "a\ufffd" and cut[-1].end == "length"


@pytest.mark.parametrize("weights", ["int8", "bfloat16"])
def test_narrow_weights_stay_near(weights):
    model = model_for(LETTERS, d_model=128)
    exact, near = (Cached(pack(model, w), [list(b"a text")], 48) for w in ("float32", weights))
    a, b = exact.read(), near.read()
    for token in b" that goes on":
        assert torch.cosine_similarity(a[0], b[0], dim=0) > 0.99
        a, b = exact.read({0: token}), near.read({0: token})
