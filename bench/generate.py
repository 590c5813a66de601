"""Speed of writing, against Hugging Face's generate, nanoGPT's generate, and what memory allows.

    python bench/generate.py [--peer PATH_TO_NANOGPT] [--shape words] [--batch-size 1 16] [--threads 1 2]
    python bench/generate.py --first       the first token of a long prompt, against one forward pass
    python bench/generate.py --agreement   how often int8 picks the token that float32 picks

Contenders live in processes of their own and take turns (A B C, C B A, ...). All have the same weights and
continue the same prompts greedily; the ids must be equal before anything is timed. Ours goes through
`sampling.decoder.generate`, text and stop strings included. The limit reads every weight once per token and
does nothing else. One thread is timed by the process's own CPU clock, two by the wall.
"""
import argparse, json, os, platform, statistics, subprocess, sys, time
from pathlib import Path

SHAPES = dict(words=dict(vocab_size=50304), bytes=dict(vocab_size=256))
SIZE = dict(n_layer=6, n_head=6, d_model=384, context_length=1024)
NAMES = {"tok_embed": "transformer.wte", "pos_embed": "transformer.wpe", "layers.": "transformer.h.",
         "norm1": "ln_1", "norm2": "ln_2", "norm.": "transformer.ln_f.", "attention.qkv": "attn.c_attn",
         "attention.out": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
WEIGHTS = ("float32", "int8", "bfloat16")


def our_model(args):
    "The same weights in every process"
    import torch
    from minigpt_wb.config import ModelConfig
    from minigpt_wb.model.gpt import GPT
    torch.manual_seed(0)
    return GPT(ModelConfig(**SIZE, **SHAPES[args.shape])).eval()


def their_weights(args):
    "Ours under GPT-2's names"
    state = our_model(args).state_dict()
    for ours, theirs in NAMES.items(): state = {k.replace(ours, theirs): v for k, v in state.items()}
    return state | {"lm_head.weight": state["transformer.wte.weight"]}


def prompts(args, length):
    import torch
    size = (args.batch_size, length)
    return torch.randint(SHAPES[args.shape]["vocab_size"], size, generator=torch.Generator().manual_seed(1))


def our_tokenizer(args):
    "Bytes, or as many words"
    from minigpt_wb.data.tokenizer import byte_tokenizer, wrap
    if args.shape == "bytes": return byte_tokenizer()
    from tokenizers import Tokenizer, models
    words = {f"w{i}": i for i in range(SHAPES[args.shape]["vocab_size"])}
    return wrap(Tokenizer(models.WordLevel(words, unk_token="w0")))


def ours(args, weights="float32"):
    from minigpt_wb.sampling.decoder import generate
    model, tokenizer = our_model(args), our_tokenizer(args)
    rows = prompts(args, args.prompt).tolist()
    while True:
        texts = generate(model, tokenizer, rows, max_new_tokens=args.new, temperature=0, weights=weights)
        assert all(len(t.ids) == args.new for t in texts), "a text ended early"
        yield [t.ids for t in texts]


def int8(args): return ours(args, "int8")


def bfloat16(args): return ours(args, "bfloat16")


def hf(args):
    "Hugging Face transformers, cache on"
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel
    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=SHAPES[args.shape]["vocab_size"], n_positions=SIZE["context_length"],
        n_embd=SIZE["d_model"], n_layer=SIZE["n_layer"], n_head=SIZE["n_head"], activation_function="gelu",
        bos_token_id=0, eos_token_id=None)).eval()
    matrices = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    model.load_state_dict({k: v.T if k.endswith(matrices) else v for k, v in their_weights(args).items()})
    rows = prompts(args, args.prompt)
    how = dict(attention_mask=torch.ones_like(rows), max_new_tokens=args.new, do_sample=False, use_cache=True,
               pad_token_id=0)
    while True: yield model.generate(rows, **how)[:, args.prompt:].tolist()


def nanogpt(args):
    "nanoGPT, which has no cache; the likeliest token by top_k=1"
    sys.path.insert(0, args.peer)
    import contextlib, io, torch
    with contextlib.redirect_stdout(io.StringIO()):
        from model import GPT, GPTConfig
        model = GPT(GPTConfig(block_size=SIZE["context_length"], vocab_size=SHAPES[args.shape]["vocab_size"],
                              n_layer=SIZE["n_layer"], n_head=SIZE["n_head"], n_embd=SIZE["d_model"],
                              dropout=0.0, bias=True)).eval()
    model.load_state_dict(their_weights(args))
    rows = prompts(args, args.prompt)
    with torch.no_grad():
        while True: yield model.generate(rows, args.new, top_k=1)[:, args.prompt:].tolist()


def limit(args):
    "Every weight that a token needs, read once per token"
    import torch
    model = our_model(args)
    n = sum(p.numel() for p in model.parameters()) - model.pos_embed.weight.numel()
    weights = torch.ones(n)
    while True:
        for _ in range(args.new): weights.sum()
        yield None


def worker(args):
    "A turn for each line on stdin; answers with ids and seconds"
    import torch
    torch.set_num_threads(args.threads)
    turns, clock = globals()[args.worker](args), time.process_time if args.threads == 1 else time.perf_counter
    for _ in sys.stdin:
        start = clock()
        ids = next(turns)
        print(json.dumps(dict(ids=ids, s=clock() - start)), flush=True)


class Contender:
    def __init__(self, name, args, shape, batch_size, threads):
        argv = [sys.executable, __file__, "--worker", name, "--shape", shape, "--batch-size", str(batch_size),
                "--threads", str(threads), "--new", str(args.new), "--prompt", str(args.prompt)]
        if args.peer: argv += ["--peer", args.peer]
        env = os.environ | dict(OMP_NUM_THREADS=str(threads), TRANSFORMERS_VERBOSITY="error",
                                PYTHONPATH=str(Path(__file__).resolve().parents[1]))
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True, env=env)
        self.name, self.times, self.ids = name, [], self.turn()["ids"]   # the first turn is not counted

    def turn(self):
        print(file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline() or sys.exit("a contender died: see above"))

    def close(self): self.process.stdin.close(); self.process.wait()


def measure(args, shape, batch_size, threads):
    "Rows of the table for one shape"
    names = ["hf", *(["nanogpt"] if args.peer and batch_size == 1 else []), *args.contender, "limit"]
    runs = {name: Contender(name, args, shape, batch_size, threads) for name in names}
    for name in ("nanogpt", "ours"):
        assert name not in runs or runs[name].ids == runs["hf"].ids, f"{name} writes another text than hf"
    for i in range(args.rounds):
        for name in names if i % 2 else names[::-1]: runs[name].times.append(runs[name].turn()["s"])
    for c in runs.values(): c.close()
    rows, least = [], min(runs["limit"].times)
    for name, c in runs.items():
        row = dict(shape=shape, batch_size=batch_size, threads=threads, contender=name,
                   tok_per_s=batch_size * args.new / statistics.median(c.times),
                   of_limit=least / statistics.median(c.times))
        row["same_ids"] = c.ids and sum(x == y for a, b in zip(c.ids, runs["hf"].ids)
                                        for x, y in zip(a, b)) / (batch_size * args.new)
        for base in ("hf", "nanogpt"):
            if base in runs and name != base:
                ratios = [b / a for a, b in zip(c.times, runs[base].times)]
                row[base] = statistics.median(ratios), min(ratios), max(ratios)
        rows.append(row)
    return rows


def show(rows):
    "The rows as text"
    spread = lambda r: f"{r[0]:.2f} [{r[1]:.2f}..{r[2]:.2f}]" if r else ""
    print(f"{'shape':6} {'batch':>5} {'thr':>3} {'contender':9} {'tok/s':>7} {'to hf':>19} "
          f"{'to nanoGPT':>22} {'of limit':>8} {'same ids':>8}")
    for r in rows:
        same = "" if r["same_ids"] is None else f"{r['same_ids']:.0%}"
        print(f"{r['shape']:6} {r['batch_size']:5} {r['threads']:3} {r['contender']:9} {r['tok_per_s']:7.0f} "
              f"{spread(r.get('hf')):>19} {spread(r.get('nanogpt')):>22} {r['of_limit']:8.0%} {same:>8}",
              flush=True)


def first_turns(args, shape, threads):
    "Seconds of [a first token, a forward pass] of a prompt of 1,000, in turns"
    import torch
    from minigpt_wb.sampling.decoder import generate
    torch.set_num_threads(threads)
    args.shape, args.batch_size, clock = shape, 1, time.process_time if threads == 1 else time.perf_counter
    model, tokenizer, row = our_model(args), our_tokenizer(args), prompts(args, 1000)
    how = dict(max_new_tokens=1, temperature=0)

    @torch.no_grad()
    def forward(): return (model.hidden(row)[:, -1] @ model.head_weight.T).argmax(-1).tolist()
    def one(): return generate(model, tokenizer, row.tolist(), **how)[0].ids
    assert one() == forward()
    turns = []
    for i in range(args.rounds):
        took = {}
        for f in (one, forward) if i % 2 else (forward, one):
            start = clock(); f(); took[f] = clock() - start
        turns.append((took[one], took[forward]))
    return turns


def first(args):
    "The first token against one forward pass: the body, and the head on the last row"
    rows = []
    for shape, threads in [(s, t) for s in args.shape for t in args.threads]:
        turns = first_turns(args, shape, threads)
        ratios, (one, forward) = [a / b for a, b in turns], map(statistics.median, zip(*turns))
        rows.append(dict(shape=shape, threads=threads, first_ms=1e3 * one, forward_ms=1e3 * forward,
                         ratio=(statistics.median(ratios), min(ratios), max(ratios))))
        print(f"{shape:6} {threads} threads: first token {1e3 * one:.0f} ms, one forward pass "
              f"{1e3 * forward:.0f} ms, ratio {statistics.median(ratios):.2f} "
              f"[{min(ratios):.2f}..{max(ratios):.2f}]", flush=True)
    return rows


def some_text(n):
    "At least `n` characters of Python's standard library, the built-in corpus: train, then the rest"
    from itertools import islice
    from minigpt_wb.config import CorpusConfig
    from minigpt_wb.data.corpus import open_corpus
    documents, parts = open_corpus(CorpusConfig(data="stdlib")).documents(), [[], []]
    for i, text in enumerate(islice(documents, 10_000)):
        parts[i % 10 == 9].append(text)
        if sum(map(len, parts[0])) > n: return parts


def trained(args):
    "A small model after some steps on the built-in corpus, and token ids that it was not trained on"
    import torch
    from minigpt_wb.config import ModelConfig, OptimConfig
    from minigpt_wb.data.tokenizer import bpe_tokenizer, encode
    from minigpt_wb.model.gpt import GPT
    from minigpt_wb.model.objectives import TrainStep
    from minigpt_wb.training.optim import clip_grad_norm, make_optimizer
    train, rest = some_text(3_000_000)
    tokenizer = bpe_tokenizer(train, 4096)
    ids, held = (torch.cat([torch.from_numpy(i).long() for i in encode(tokenizer, t)]) for t in (train, rest))
    torch.manual_seed(0)
    model = GPT(ModelConfig(n_layer=4, n_head=4, d_model=256, context_length=256, vocab_size=4096))
    opt = make_optimizer(model, OptimConfig(learning_rate=2e-3, weight_decay=0.1, betas=(0.9, 0.95)), "cpu")
    step = TrainStep(model)
    for i in range(args.steps):
        for group in opt.param_groups: group["lr"] = 2e-3 * min(1, (i + 1) / 20, 2 * (1 - i / args.steps))
        rows = torch.stack([ids[j:j + 129] for j in torch.randint(len(ids) - 129, (8,)).tolist()])
        loss = step(rows[:, :-1], rows[:, 1:]) / rows[:, 1:].numel()
        loss.backward()
        clip_grad_norm(list(model.parameters()), 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)
    return model, held, loss.item()


def agreement(args):
    "Share of 2,000 positions at which narrow weights pick what float32 picks, both reading the same text"
    import torch
    from minigpt_wb.sampling.weights import pack
    torch.set_num_threads(1)  # on a busy machine two take longer than one
    start = time.perf_counter()
    model, held, loss = trained(args)
    seconds, rows, picked = time.perf_counter() - start, held[:16 * 125].view(16, 125), {}
    for weights in WEIGHTS:
        packed = pack(model, weights)
        cache, picked[weights] = packed.new_cache(16, 125), []
        with torch.no_grad():
            for i in range(125):  # one token at a time, as writing does
                logits = packed.logits(packed.hidden(rows[:, i:i + 1], cache=cache)[:, -1])
                picked[weights].append(logits.argmax(-1))
    picked = {weights: torch.stack(ids) for weights, ids in picked.items()}
    same = {weights: (ids == picked["float32"]).float().mean().item() for weights, ids in picked.items()}
    print(f"{args.steps} steps of 8 x 128 on the standard library's source, {seconds:.0f} s, "
          f"last loss {loss:.2f} nats per token of 4,096; picks the same as float32 at 2,000 positions: "
          + ", ".join(f"{w} {share:.1%}" for w, share in same.items() if w != "float32"))
    return [dict(steps=args.steps, seconds=seconds, loss=loss, **same)]


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--peer", help="a checkout of nanoGPT, for its model.py")
    p.add_argument("--shape", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    p.add_argument("--batch-size", nargs="+", type=int, default=[1, 16])
    p.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    p.add_argument("--contender", nargs="+", default=["ours", "int8"], choices=["ours", "int8", "bfloat16"])
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    p.add_argument("--new", type=int, default=100, help="tokens to write")
    p.add_argument("--first", action="store_true", help="only the first token of a prompt of 1,000 tokens")
    p.add_argument("--agreement", action="store_true", help="only compare int8 with a trained model")
    p.add_argument("--steps", type=int, default=300, help="of training, for --agreement")
    p.add_argument("--json", help="write the rows there")
    p.add_argument("--worker", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.worker:
        args.shape, args.batch_size, args.threads = args.shape[0], args.batch_size[0], args.threads[0]
        return worker(args)
    import torch
    machine = dict(torch=torch.__version__, machine=platform.machine(), cores=os.cpu_count(),
                   load_before=os.getloadavg(), args=vars(args).copy())
    if args.first: rows = first(args)
    elif args.agreement: rows = agreement(args)
    else:
        rows = []
        for case in [(s, b, t) for s in args.shape for b in args.batch_size for t in args.threads]:
            rows += (new := measure(args, *case))
            show(new)
    machine |= dict(load_after=os.getloadavg(), rows=rows)
    if args.json: Path(args.json).write_text(json.dumps(machine, indent=1))


if __name__ == "__main__": main()
