"The model and its loss where a notebook cell is too small: precisions, ranks, a compiler, random shapes."
import os, socket, subprocess, sys
from pathlib import Path

import pytest
import torch

from minigpt_wb.config import ModelConfig
from minigpt_wb.model.gpt import GPT, attend_explicit, attend_sdpa
from minigpt_wb.model.objectives import (IGNORE_INDEX, TrainStep, count_targets, cross_entropy_reference,
                                         linear_cross_entropy, next_token)

ROOT = Path(__file__).resolve().parents[1]
LLAMA = dict(position="rotary", norm="rmsnorm", activation="swiglu", bias=False, n_kv_head=1,
             tie_embeddings=False)


def tiny(**options):
    torch.manual_seed(0)
    shape = dict(n_layer=2, n_head=2, d_model=32, context_length=16, vocab_size=300)
    return GPT(ModelConfig(**shape | options))


def batch(B=3, T=16, V=300, seed=0):
    rows = torch.randint(V, (B, T + 1), generator=torch.Generator().manual_seed(seed))
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def far(a, b):
    "Largest difference, relative to the largest number"
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-12)).item()


@pytest.mark.parametrize("N,C,V,chunk", [(1, 8, 2, 1), (5, 8, 50, 2), (64, 16, 300, 64), (65, 16, 300, 64),
                                         (129, 4, 70000, 50), (7, 8, 50, 100)])
@pytest.mark.parametrize("ignored", [0.0, 0.5, 1.0])
def test_chunked_loss_equals_its_definition(N, C, V, chunk, ignored):
    rng = torch.Generator().manual_seed(N)
    h, w, b = (torch.randn(s, generator=rng).requires_grad_() for s in ((N, C), (V, C), (V,)))
    targets = torch.randint(V, (N,), generator=rng)
    targets[torch.rand(N, generator=rng) < ignored] = IGNORE_INDEX
    got, want = linear_cross_entropy(h, w, targets, b, chunk=chunk), cross_entropy_reference(h, w, targets, b)
    assert got.dtype == torch.float32 and abs(got - want) <= 1e-6 * max(1, abs(want))
    for a, e in zip(torch.autograd.grad(got * 3, (h, w, b)), torch.autograd.grad(want * 3, (h, w, b))):
        assert far(a, e) < 1e-4                                # either is 1e-4 from float64 with 70,000 words


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, LLAMA])
def test_half_precision_is_as_near_to_float32_as_the_plain_loss(dtype, options):
    model, (tokens, targets) = tiny(**options), batch()
    with torch.no_grad():
        for p in model.parameters(): p.mul_(3)                 # away from the uniform start
    exact = gradients(model, next_token(model, tokens, targets)[0])
    def half(loss):
        with torch.autocast("cpu", dtype):
            out = loss(model.hidden(tokens).flatten(0, 1), model.head_weight, targets.flatten())
        return out, gradients(model, out)
    ours, plain = half(linear_cross_entropy), half(cross_entropy_reference)
    assert ours[0].dtype == torch.float32 and all(g.dtype == torch.float32 for g in ours[1])
    assert far(ours[0], plain[0]) < 2e-3
    for a, b, e in zip(ours[1], plain[1], exact): assert far(a, e) < 1.3 * far(b, e) + 0.01


def test_half_precision_weights_get_half_precision_gradients():
    model, (tokens, targets) = tiny(**LLAMA).bfloat16(), batch()
    loss = next_token(model, tokens, targets)[0]
    loss.backward()
    assert loss.dtype == torch.float32 and {p.grad.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_loss_scale_goes_through_unchanged():
    model, (tokens, targets) = tiny(), batch()
    plain = gradients(model, next_token(model, tokens, targets)[0])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scaled = gradients(model, scaler.scale(next_token(model, tokens, targets)[0]))
    for a, b in zip(scaled, plain): assert torch.equal(a / 2**16, b)       # a power of two is exact


def test_no_gradient_memory_without_gradients():
    model, (tokens, targets) = tiny(), batch()
    with torch.no_grad(): loss = next_token(model, tokens, targets)[0]
    assert not loss.requires_grad
    with torch.inference_mode(): assert torch.equal(next_token(model, tokens, targets)[0], loss)
    loss = next_token(model, tokens, targets)[0]
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again"): loss.backward()


def test_bad_targets_are_an_error_not_a_number():
    h, w = torch.randn(2, 4), torch.randn(10, 4)
    for bad in (10, -1):
        with pytest.raises((RuntimeError, IndexError)): linear_cross_entropy(h, w, torch.tensor([0, bad]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(bad):
    h, w = torch.randn(3, 4), torch.randn(10, 4, requires_grad=True)
    h[1, 0] = bad
    loss = linear_cross_entropy(h, w, torch.tensor([1, 2, 3]))
    loss.backward()
    assert not loss.isfinite() and not w.grad.isfinite().all()


@pytest.mark.parametrize("options", [{}, LLAMA, dict(qk_norm=True, position="rotary"),
                                     dict(n_kv_head=1, head_dim=24)])
def test_any_cut_of_the_batch_gives_the_same_gradients(options):
    model, (tokens, targets) = tiny(**options), batch(B=6)
    targets[2, 5:] = IGNORE_INDEX
    step = TrainStep(model)
    whole = gradients(model, step(tokens, targets))
    for cuts in ([1] * 6, [2, 4], [0, 6], [5, 1]):
        parts = [step(a, b) for a, b in zip(tokens.split(cuts), targets.split(cuts))]
        for a, b in zip(gradients(model, sum(parts)), whole): assert far(a, b) < 1e-4


def test_attention_of_random_shapes():
    rng = torch.Generator().manual_seed(0)
    pick = lambda *values: values[torch.randint(len(values), (), generator=rng)]
    for _ in range(30):
        B, K, G, T, D = pick(1, 2, 3), pick(1, 2), pick(1, 3), pick(1, 2, 7, 33), pick(4, 8, 20)
        S = T + pick(0, 0, 1, 9)
        q, k, v = (torch.randn(B, H, n, D, generator=rng) for H, n in ((K * G, T), (K, S), (K, S)))
        for mask in (None, torch.rand(B, 1, T, S, generator=rng).bool() | True):
            assert far(attend_sdpa(q, k, v, mask), attend_explicit(q, k, v, mask)) < 1e-5


@pytest.mark.parametrize("options", [{}, LLAMA])
def test_a_cache_in_half_precision(options):
    model, (tokens, _) = tiny(**options).eval(), batch()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cache = model.new_cache(3)
        pieces = torch.cat([model(t, cache=cache) for t in tokens.split([5, 1, 10], dim=1)], 1)
        assert cache.keys.dtype == torch.bfloat16 and far(pieces.float(), model(tokens).float()) < 0.03


def test_weights_of_the_residual_stream_start_smaller():
    model = tiny(n_layer=8, d_model=128)
    std = {n: p.std().item() for n, p in model.named_parameters() if p.dim() == 2}
    for name in ("layers.3.mlp.up", "layers.3.attention.qkv", "tok_embed"):
        assert abs(std[f"{name}.weight"] - 0.02) < 1e-3
    for name in ("layers.3.mlp.down", "layers.3.attention.out"):
        assert abs(std[f"{name}.weight"] - 0.02 / 4) < 1e-3
    assert all((p == 0).all() for n, p in model.named_parameters() if n.endswith("bias"))


def second_half(model, tokens, targets):
    targets = targets.clone()
    targets[:, :targets.size(1) // 2] = IGNORE_INDEX
    return next_token(model, tokens, targets)

second_half.count = lambda tokens, targets: count_targets(targets[:, targets.size(1) // 2:])


def test_the_compiled_model_is_the_plain_one():
    "In a process of its own: torch._dynamo must not be loaded by the other tests"
    code = """if True:
        import torch
        from tests.test_model import *
        model, (tokens, targets) = tiny(), batch()
        targets[0, :4] = IGNORE_INDEX
        for objective in (next_token, second_half):
            want = objective(model, tokens, targets)[0]
            grads = gradients(model, want)
            loss = torch.compile(TrainStep(model, objective), backend="aot_eager")(tokens, targets)
            assert far(loss, want) < 1e-6
            for a, b in zip(gradients(model, loss), grads): assert far(a, b) < 1e-4
    """
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, env=env)


def test_an_objective_that_counts_less_than_all_targets():
    model, (tokens, targets) = tiny(), batch(B=6)
    targets[2, 10:] = IGNORE_INDEX
    step = TrainStep(model, second_half)
    count = step.count(tokens, targets)
    assert count == 6 * 8 - 6 and not step.counts_targets and TrainStep(model).counts_targets
    h, late = model.hidden(tokens)[:, 8:].flatten(0, 1), targets[:, 8:].flatten()
    want = gradients(model, torch.nn.functional.cross_entropy(h @ model.head_weight.T, late))
    cut = zip(tokens.split([1, 5, 0]), targets.split([1, 5, 0]))
    parts = [(step(*part), step.count(*part)) for part in cut]
    assert sum(n for _, n in parts) == count
    for a, e in zip(gradients(model, sum(loss for loss, _ in parts) / count), want): assert far(a, e) < 1e-4
    def lying(*batch): return second_half(*batch)
    with pytest.raises(ValueError, match="returned count 42, but its sum is divided by 90"):
        TrainStep(model, lying)(tokens, targets)


def rank_of_two(rank, port, folder):
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    model, (tokens, targets) = tiny(), batch(B=3)
    wrapped = torch.nn.parallel.DistributedDataParallel(TrainStep(model), gradient_as_bucket_view=True)
    for cut in (3, 2):                                         # rank 1 has nothing, then one sequence
        own = slice(0, cut) if rank == 0 else slice(cut, 3)
        model.zero_grad()
        (wrapped(tokens[own], targets[own]) * 2 / targets.numel()).backward()
        torch.save([p.grad for p in model.parameters()], f"{folder}/{rank}-{cut}.pt")
    torch.distributed.destroy_process_group()


def test_a_rank_without_sequences_takes_part(tmp_path):
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    torch.multiprocessing.spawn(rank_of_two, (port, str(tmp_path)), nprocs=2)
    model, (tokens, targets) = tiny(), batch(B=3)
    alone = gradients(model, next_token(model, tokens, targets)[0] / targets.numel())
    for cut in (3, 2):
        ranks = [torch.load(tmp_path / f"{rank}-{cut}.pt", weights_only=True) for rank in (0, 1)]
        for a, b, e in zip(*ranks, alone): assert torch.equal(a, b) and far(a, e) < 1e-4


def test_importing_the_model_loads_nothing_heavy():
    code = ("import sys, minigpt_wb.model.objectives; "
            "assert not {'torch._dynamo', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_dropout_keyed_by_a_seed_is_the_same_with_recomputation():
    tokens, targets = batch()
    results = []
    for again in (False, True):
        model = tiny(dropout=0.3, activation_checkpointing=again)
        torch.manual_seed(7)
        results.append(gradients(model, next_token(model, tokens, targets)[0]))
    for a, b in zip(*results): assert far(a, b) < 1e-5
