"""Speed and peak memory of one training step, against nanoGPT's model and step.

    python bench/bench_step.py --peer PATH_TO_NANOGPT [--shape words] [--dtype float32 bfloat16] [--rounds 7]

Contenders live in processes of their own and take turns (A B, B A, ...), each with one thread, timed by its
own CPU clock. Both start from the same weights and read the same tokens; the losses of their first five steps
are compared before anything is timed. The third contender is the floor: every matrix product of the step
at its own shape, and nothing else. Without --peer only ours and the floor are run.
"""
import argparse, json, os, platform, resource, statistics, subprocess, sys, tempfile, time
from pathlib import Path

SHAPES = dict(words=dict(n_layer=6, n_head=6, d_model=384, context_length=256, vocab_size=50304),
              bytes=dict(n_layer=6, n_head=6, d_model=384, context_length=256, vocab_size=256),
              shakespeare=dict(n_layer=4, n_head=4, d_model=128, context_length=64, vocab_size=65,
                               bias=False))
BATCH = dict(words=4, bytes=4, shakespeare=12)
STEPS = dict(words=2, bytes=4, shakespeare=60)     # of a turn
LR, BETAS, DECAY, CLIP, CHECKED = 1e-3, (0.9, 0.95), 0.1, 1.0, 5
TOLERANCE = dict(float32=1e-4, bfloat16=1e-2)   # relative, of each of the first losses


def batches(args):
    "The same endless batches in every process"
    import torch
    rng, shape = torch.Generator().manual_seed(1), SHAPES[args.shape]
    while True:
        size = (args.batch_size, shape["context_length"] + 1)
        rows = torch.randint(shape["vocab_size"], size, generator=rng)
        yield rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def nanogpt(args):
    "nanoGPT's model and the step of its train.py"
    sys.path.insert(0, args.peer)
    import contextlib, io, torch
    with contextlib.redirect_stdout(io.StringIO()):
        from model import GPT, GPTConfig
        torch.manual_seed(0)
        shape = SHAPES[args.shape]
        model = GPT(GPTConfig(block_size=shape["context_length"], vocab_size=shape["vocab_size"],
                              n_layer=shape["n_layer"], n_head=shape["n_head"], n_embd=shape["d_model"],
                              dropout=0.0, bias=shape.get("bias", True)))
        opt = model.configure_optimizers(DECAY, LR, BETAS, "cpu")
    torch.save({k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}, args.weights)
    for tokens, targets in batches(args):
        with torch.autocast("cpu", enabled=args.dtype == "bfloat16"): _, loss = model(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        opt.step()
        opt.zero_grad(set_to_none=True)
        yield loss.item()


def ours(args):
    "Our model, objective, clipping and optimiser, from nanoGPT's weights where there are any"
    import torch
    from minigpt_wb.config import ModelConfig, OptimConfig
    from minigpt_wb.model.gpt import GPT
    from minigpt_wb.model.objectives import TrainStep, keep_freed_memory
    from minigpt_wb.training.optim import clip_grad_norm, make_optimizer
    keep_freed_memory()
    torch.manual_seed(0)
    model = GPT(ModelConfig(**SHAPES[args.shape]))
    if args.peer:
        names = {"transformer.wte": "tok_embed", "transformer.wpe": "pos_embed", "transformer.h.": "layers.",
                 "transformer.ln_f": "norm", "ln_1": "norm1", "ln_2": "norm2", "attn.c_attn": "attention.qkv",
                 "attn.c_proj": "attention.out", "mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.down"}
        state = torch.load(args.weights, weights_only=True, mmap=True)
        for old, new in names.items(): state = {k.replace(old, new): v for k, v in state.items()}
        model.load_state_dict(state)
        del state
    opt = make_optimizer(model, OptimConfig(learning_rate=LR, weight_decay=DECAY, betas=BETAS), "cpu")
    step, params = TrainStep(model), list(model.parameters())
    for tokens, targets in batches(args):
        with torch.autocast("cpu", enabled=args.dtype == "bfloat16"):
            loss = step(tokens, targets) / targets.numel()
        loss.backward()
        clip_grad_norm(params, CLIP)
        opt.step()
        opt.zero_grad(set_to_none=True)
        yield loss.item()


def floor(args):
    "Only the matrix products of forward and backward, at their shapes, into memory that is there already"
    import torch
    dtype, shape = getattr(torch, args.dtype), SHAPES[args.shape]
    C, V, L, T = (shape[k] for k in ("d_model", "vocab_size", "n_layer", "context_length"))
    N = args.batch_size * T
    shapes = [(N, C, n) for n in (3 * C, C, 4 * C)] * L + [(N, 4 * C, C)] * L + [(N, C, V)]
    heads, D = args.batch_size * shape["n_head"], C // shape["n_head"]
    made = {}
    def buffers(n, k, m):
        if (n, k, m) not in made:
            made[n, k, m] = [torch.randn(s).to(dtype) for s in ((n, k), (m, k), (n, m), (n, k), (m, k))]
        return made[n, k, m]
    table, side = torch.randn(heads, T, T).to(dtype), torch.randn(heads, T, D).to(dtype)
    while True:
        for x, w, y, dx, dw in (buffers(*s) for s in shapes):
            torch.mm(x, w.T, out=y); torch.mm(y, w, out=dx); torch.mm(y.T, x, out=dw)
        for _ in range(3 * L): torch.bmm(table, side)   # six products a layer, half of them masked
        yield 0.0


def worker(args):
    "Run as many steps as a line on stdin says, answer with losses, CPU seconds and peak memory"
    import torch
    torch.set_num_threads(1)
    steps = globals()[args.worker](args)
    for line in sys.stdin:
        start = time.process_time()
        losses = [next(steps) for _ in range(int(line))]
        cpu_s, rss = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(dict(losses=losses, cpu_s=cpu_s, rss=rss)), flush=True)


class Contender:
    def __init__(self, name, args, dtype, weights):
        argv = [sys.executable, __file__, "--worker", name, "--shape", args.shape, "--dtype", dtype,
                "--batch-size", str(args.batch_size), "--weights", weights]
        if args.peer: argv += ["--peer", args.peer]
        env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(Path(__file__).resolve().parents[1]))
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True, env=env)
        self.times, self.rss = [], 0

    def run(self, steps):
        print(steps, file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline() or sys.exit("a contender died: see above"))
        self.rss = answer["rss"]
        return answer

    def close(self):
        self.process.stdin.close(); self.process.wait()


def measure(args, dtype):
    "Rows of the table for one dtype"
    with tempfile.TemporaryDirectory() as folder:
        weights, names = f"{folder}/weights.pt", (["nanogpt"] if args.peer else []) + ["ours", "floor"]
        contenders, losses = {}, {}
        for name in names:                     # the first one writes the weights that the next one reads
            contenders[name] = Contender(name, args, dtype, weights)
            losses[name] = contenders[name].run(CHECKED)["losses"]
        if args.peer:
            apart = max(abs(a / b - 1) for a, b in zip(losses["ours"], losses["nanogpt"]))
            assert apart < TOLERANCE[dtype], f"{dtype}: first losses differ by {apart:.1e}: {losses}"
            print(f"{dtype}: first {CHECKED} losses equal to {apart:.1e}", file=sys.stderr)
        for i in range(args.rounds):
            for name in names if i % 2 else names[::-1]:
                contenders[name].times.append(contenders[name].run(args.steps)["cpu_s"] / args.steps)
        for c in contenders.values(): c.close()
    base, rows, tokens = contenders[names[0]], [], args.batch_size * SHAPES[args.shape]["context_length"]
    floor_times = contenders["floor"].times
    for name, c in contenders.items():
        ratios = [a / b for a, b in zip(base.times, c.times)]
        rows.append(dict(dtype=dtype, contender=name, first_losses=losses[name],
                         tok_per_s=tokens / statistics.median(c.times),
                         ratio=statistics.median(ratios), ratio_min=min(ratios), ratio_max=max(ratios),
                         share_of_floor=statistics.median(f / t for f, t in zip(floor_times, c.times)),
                         peak_gb=c.rss / 1e9, memory_ratio=c.rss / base.rss))
    return rows


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--peer", help="a checkout of nanoGPT, for its model.py")
    p.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=list(TOLERANCE))
    p.add_argument("--shape", default="words", choices=list(SHAPES))
    p.add_argument("--batch-size", type=int)
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--steps", type=int, help="steps of a turn")
    p.add_argument("--json", help="write the rows there")
    p.add_argument("--worker", help=argparse.SUPPRESS)
    p.add_argument("--weights", help=argparse.SUPPRESS)
    args = p.parse_args()
    args.batch_size, args.steps = args.batch_size or BATCH[args.shape], args.steps or STEPS[args.shape]
    if args.worker: args.dtype = args.dtype[0]; return worker(args)
    import torch
    machine = dict(torch=torch.__version__, machine=platform.machine(), cores=os.cpu_count(),
                   clock="process CPU, 1 thread", batch_size=args.batch_size, rounds=args.rounds,
                   shape=SHAPES[args.shape], load_before=os.getloadavg())
    rows = [row for dtype in args.dtype for row in measure(args, dtype)]
    print(f"{'dtype':9} {'contender':9} {'tok/s':>7} {'ratio [min..max]':>20} {'of floor':>8} "
          f"{'peak GB':>8} {'ratio':>6}")
    for r in rows:
        spread = f"{r['ratio']:.2f} [{r['ratio_min']:.2f}..{r['ratio_max']:.2f}]"
        print(f"{r['dtype']:9} {r['contender']:9} {r['tok_per_s']:7.0f} {spread:>20} "
              f"{r['share_of_floor']:8.0%} {r['peak_gb']:8.2f} {r['memory_ratio']:6.2f}")
    machine |= dict(load_after=os.getloadavg(), rows=rows)
    if args.json: Path(args.json).write_text(json.dumps(machine, indent=1))


if __name__ == "__main__": main()
