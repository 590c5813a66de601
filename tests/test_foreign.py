"""Checkpoints of other systems: the same logits in, the same weights out, and no line of theirs is run."""
import math, os, pickle, random, resource, struct, subprocess, sys, time, warnings, zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

from minigpt_wb.config import RunConfig, plain
from minigpt_wb.data.tokenizer import load_tokenizer, save_tokenizer
from minigpt_wb.model.gpt import GPT
from minigpt_wb.run import list_runs
from minigpt_wb.training.checkpoints import (CheckpointError, list_checkpoints, load_model, save_checkpoint,
                                             sha256)
from minigpt_wb.training.exports import export_checkpoint
from minigpt_wb.training.foreign import LAYOUTS, load_safely
from minigpt_wb.training.imports import check_logits, import_checkpoint, inspect_file, read_foreign
from minigpt_wb.training.optim import make_optimizer
from minigpt_wb.training.snapshot import fill_model

C, V, T, D, H, K, L = 32, 300, 16, 8, 4, 2, 2   # width, ids, context, head, heads, key heads, layers
IDS = (torch.arange(2 * T) * 7 % V).view(2, T)


# --- the systems: weights by their documented names, and what their models compute with them

def weights(seed: int = 0):
    "Random matrices, one after the other"
    g = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=g) * 0.3


def attend(q, k, v):
    "Causal attention of (B, H, T, D), by its definition"
    k, v = (t.repeat_interleave(q.size(1) // t.size(1), 1) for t in (k, v))
    past = torch.ones(q.size(2), q.size(2)).tril().bool()
    scores = (q @ k.mT / math.sqrt(q.size(3))).masked_fill(~past, -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def heads(x): return x.unflatten(2, (-1, D)).transpose(1, 2)
def rms(x, w, eps): return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w
def layer_norm(x, s, name): return F.layer_norm(x, x.shape[-1:], s[name + ".weight"], s.get(name + ".bias"))
def linear(x, s, name): return F.linear(x, s[name + ".weight"], s.get(name + ".bias"))


def turned_halves(x, theta=10000.0):
    "Rotary: dimension i is turned with i + D/2"
    angle = torch.outer(torch.arange(x.size(2)), theta ** -(torch.arange(0, D, 2) / D)).repeat(1, 2)
    a, b = x.chunk(2, -1)
    return x * angle.cos() + torch.cat((-b, a), -1) * angle.sin()


def turned_pairs(x, theta):
    "Rotary: neighbours as complex numbers"
    angle = torch.outer(torch.arange(x.size(2)), theta ** -(torch.arange(0, D, 2) / D))
    z = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(z * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


def s0_state():
    w, s = weights(), {}
    s["token_embedding.weight"] = w(V, C)
    for i in range(L):
        b = f"transformer_blocks.{i}."
        s |= {b + "attention.qkv.weight": w(3 * C, C), b + "attention.w_o.weight": w(C, C),
              b + "feed_forward.linear1.weight": w(64, C), b + "feed_forward.linear2.weight": w(C, 64),
              b + "norm1.weight": 1 + w(C), b + "norm2.weight": 1 + w(C)}
    return s | {"norm.weight": 1 + w(C), "lm_head.weight": s["token_embedding.weight"]}


def s0_logits(s, ids):
    eps = torch.finfo(torch.float32).eps
    def rotary(x):   # as its code does it: the table's row is the head, not the position
        freq = torch.cat((1e-4 ** torch.linspace(0, 1, D // 4), torch.zeros(D // 4)))
        angle = torch.outer(torch.arange(T), freq)[:x.size(1), None]
        a, b = x.chunk(2, -1)
        return torch.cat((a * angle.cos() + b * angle.sin(), b * angle.cos() - a * angle.sin()), -1)
    x = s["token_embedding.weight"][ids] * math.sqrt(C)
    for i in range(L):
        b = f"transformer_blocks.{i}."
        q, k, v = map(heads, linear(rms(x, s[b + "norm1.weight"], eps), s, b + "attention.qkv").chunk(3, -1))
        x = x + linear(attend(rotary(q), rotary(k), v), s, b + "attention.w_o")
        y = linear(rms(x, s[b + "norm2.weight"], eps), s, b + "feed_forward.linear1")
        x = x + linear(F.silu(y), s, b + "feed_forward.linear2")
    return linear(rms(x, s["norm.weight"], eps), s, "lm_head")


def s1_state(rotary=True):
    w, s = weights(1), {}
    s["token_emb.weight"] = w(V, C)
    if not rotary: s["pos_emb.weight"] = w(T, C)
    for i in range(L):
        b = f"blocks.{i}."
        s |= {b + "attn.to_qkv.weight": w(3 * C, C), b + "attn.to_out.weight": w(C, C)}
        if rotary: s[b + "attn.rotary_emb.inv_freq"] = 1e4 ** -(torch.arange(0, D, 2) / D)
        s |= {b + "ff.net.0.weight": w(64, C), b + "ff.net.0.bias": w(64), b + "ff.net.3.weight": w(C, 64),
              b + "ff.net.3.bias": w(C), b + "norm1.weight": 1 + w(C), b + "norm1.bias": w(C),
              b + "norm2.weight": 1 + w(C), b + "norm2.bias": w(C)}
    return s | {"norm.weight": 1 + w(C), "norm.bias": w(C), "to_logits.weight": s["token_emb.weight"]}


def s1_logits(s, ids):
    x = s["token_emb.weight"][ids]
    if "pos_emb.weight" in s: x = x + s["pos_emb.weight"][:ids.size(1)]
    turn = (lambda t: t) if "pos_emb.weight" in s else turned_halves
    for i in range(L):
        b = f"blocks.{i}."
        q, k, v = map(heads, linear(layer_norm(x, s, b + "norm1"), s, b + "attn.to_qkv").chunk(3, -1))
        x = x + linear(attend(turn(q), turn(k), v), s, b + "attn.to_out")
        x = x + linear(F.gelu(linear(layer_norm(x, s, b + "norm2"), s, b + "ff.net.0")), s, b + "ff.net.3")
    return linear(layer_norm(x, s, "norm"), s, "to_logits")


def nanogpt_state(bias=True):
    w, s = weights(2), {}
    s |= {"transformer.wte.weight": w(V, C), "transformer.wpe.weight": w(T, C)}
    for i in range(L):
        b = f"transformer.h.{i}."
        sizes = {"ln_1": (C,), "attn.c_attn": (3 * C, C), "attn.c_proj": (C, C), "ln_2": (C,),
                 "mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}
        for name, size in sizes.items():
            s[b + name + ".weight"] = w(*size) + (len(size) == 1)
            if bias: s[b + name + ".bias"] = w(size[0])
        s[b + "attn.bias"] = torch.ones(T, T).tril().view(1, 1, T, T)   # a mask, saved with it
    s["transformer.ln_f.weight"] = 1 + w(C)
    if bias: s["transformer.ln_f.bias"] = w(C)
    return s | {"lm_head.weight": s["transformer.wte.weight"]}


def nanogpt_logits(s, ids):
    x = s["transformer.wte.weight"][ids] + s["transformer.wpe.weight"][:ids.size(1)]
    for i in range(L):
        b = f"transformer.h.{i}."
        q, k, v = map(heads, linear(layer_norm(x, s, b + "ln_1"), s, b + "attn.c_attn").chunk(3, -1))
        x = x + linear(attend(q, k, v), s, b + "attn.c_proj")
        x = x + linear(F.gelu(linear(layer_norm(x, s, b + "ln_2"), s, b + "mlp.c_fc")), s, b + "mlp.c_proj")
    return linear(layer_norm(x, s, "transformer.ln_f"), s, "lm_head")


def s3_state():
    w, s = weights(3), {}
    angle = torch.outer(torch.arange(64.0), 5e5 ** -(torch.arange(0, D, 2) / D))
    s |= {"freqs_cis": torch.polar(torch.ones_like(angle), angle), "tok_embed.weight": w(V, C) * 4}
    for i in range(L):
        b = f"layers.{i}."
        s |= {b + "attention.wq.weight": w(C, C), b + "attention.wk.weight": w(K * D, C),
              b + "attention.wv.weight": w(K * D, C), b + "attention.wo.weight": w(C, C),
              b + "mlp.w1.weight": w(64, C), b + "mlp.w2.weight": w(C, 64), b + "mlp.w3.weight": w(64, C),
              b + "attention_norm.weight": 1 + w(C), b + "mlp_norm.weight": 1 + w(C)}
    return s | {"norm.weight": 1 + w(C), "output.weight": w(V, C) / 4}


def s3_logits(s, ids):
    x = s["tok_embed.weight"][ids]
    for i in range(L):
        b = f"layers.{i}."
        y = rms(x, s[b + "attention_norm.weight"], 1e-5)
        q, k, v = (heads(linear(y, s, b + f"attention.w{n}")) for n in "qkv")
        x = x + linear(attend(turned_pairs(q, 5e5), turned_pairs(k, 5e5), v), s, b + "attention.wo")
        y = rms(x, s[b + "mlp_norm.weight"], 1e-5)
        x = x + linear(F.silu(linear(y, s, b + "mlp.w1")) * linear(y, s, b + "mlp.w3"), s, b + "mlp.w2")
    return linear(rms(x, s["norm.weight"], 1.2e-7), s, "output")


def llama(kv=K):
    "Hugging Face's own Llama"
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(4)
    cfg = LlamaConfig(vocab_size=V, hidden_size=C, intermediate_size=64, num_hidden_layers=L,
                      rms_norm_eps=1e-5,
                      num_attention_heads=H, num_key_value_heads=kv, max_position_embeddings=64,
                      rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    return LlamaForCausalLM(cfg).eval()


LLADA = {"model.embed_tokens": "model.transformer.wte", "model.norm": "model.transformer.ln_f",
         "lm_head": "model.transformer.ff_out", "model.layers": "model.transformer.blocks",
         "self_attn.o_proj": "attn_out", "self_attn.": "", "mlp.gate_proj": "ff_proj",
         "mlp.up_proj": "up_proj",
         "mlp.down_proj": "ff_out", "input_layernorm": "attn_norm", "post_attention_layernorm": "ff_norm"}


def llada_state():
    out = {}
    for name, t in llama(H).state_dict().items():
        for a, b in LLADA.items(): name = name.replace(a, b)
        out[name] = t
    return out


def llada_logits(s, ids):
    "As Llama, which it is apart from the mask"
    return llama(H)(ids).logits


def adamw(state, names, groups=1):
    "An optimizer's state as AdamW saves it: numbered"
    moments = {i: {"step": torch.tensor(7.0), "exp_avg": state[n] * 0.1 + i, "exp_avg_sq": state[n] ** 2 + i}
               for i, n in enumerate(names)}
    return {"state": moments, "param_groups": [{"lr": 1e-3, "params": list(range(len(names)))}]}


S1_CONFIG = {"model": dict(vocab_size=V, max_seq_len=T, dim=C, depth=L, heads=H, dim_head=D, mlp_dim=64,
                           dropout=0.1,
                           use_rotary_emb=True),
             "training": dict(batch_size=32, num_epochs=100, learning_rate=3e-4, use_amp=True,
                              amp_dtype="bfloat16",
                              adam_beta1=0.9, adam_beta2=0.95, warmup_steps=500)}
S3_CONFIG = {"model": dict(num_layers=L, hidden_size=C, num_attention_heads=H, num_key_value_heads=K,
                           vocab_size=V,
                           intermediate_size=64, max_position_embeddings=131072, rope_theta=5e5),
             "training": dict(batch_size=2, grad_accum_nums=4, context_length=T, amp_dtype=torch.bfloat16),
             "hf_token": "hf_secret"}
NANO = dict(n_layer=L, n_head=H, n_embd=C, block_size=T, bias=True, vocab_size=V, dropout=0.0)


def s1_tree(state):
    names = [n for n in state if "inv_freq" not in n and n != "to_logits.weight"]
    return dict(epoch=4, global_step=123, model_state_dict=state, optimizer_state_dict=adamw(state, names),
                scheduler_state_dict={"last_epoch": 123}, best_val_loss=1.5, config=S1_CONFIG,
                scaler_state_dict={"scale": 65536.0})


def nanogpt_tree(state):
    names = [n for n in state if not n.endswith((".attn.bias", "lm_head.weight"))]
    names = [n for n in names if state[n].dim() > 1] + [n for n in names if state[n].dim() < 2]
    config = NANO | dict(batch_size=12, max_iters=5000, learning_rate=1e-3, min_lr=1e-4, beta2=0.99,
                         device="cuda",
                         out_dir="out", dataset="shakespeare_char", compile=True, decay_lr=True)
    return dict(model=state, optimizer=adamw(state, names), model_args=NANO, iter_num=250, config=config,
                best_val_loss=torch.tensor(1.48))


def s2_tree(state):
    return dict(model=state, optimizer=adamw(state, []), step=1000, loss=2.5,
                config=dict(vocab_size=V, d_model=C, n_layer=L, n_head=H, block_size=T, learning_rate=6e-4))


def s3_tree(state):
    return dict(global_step=100, epoch=0, model_state_dict=state, scheduler_state_dict={}, best_loss=3.25,
                optimizer_state_dict=adamw(state, [n for n in state if n != "freqs_cis"]), config=S3_CONFIG)


def s4_tree(state):
    return dict(epoch=5, model_state_dict=state, optimizer_state_dict=adamw(state, list(state)), vocab_size=V,
                scheduler_state_dict={"last_epoch": 7}, train_losses=[3.0, 2.5], val_losses=[2.9, 2.75],
                mask_token=1)


def s0_tree(state):
    return dict(step=500, epoch=2, model_state_dict=state, loss=2.3456, config=plain_config(),
                optimizer_states=[adamw(state, []), adamw(state, [])])


def plain_config(): return dict(d_model=C, n_heads=H, n_layers=L, d_ff=64, max_seq_len=T, batch_size=48,
                                max_steps=100, muon_lr=0.01, max_tokens=200000, dropout=0.1,
                                gradient_accumulation_steps=4)


SYSTEMS = {"s0": (s0_state, s0_logits, s0_tree, {}), "s1": (s1_state, s1_logits, s1_tree, {}),
           "s2": (lambda: nanogpt_state(False), nanogpt_logits, s2_tree, {}),
           "s3": (s3_state, s3_logits, s3_tree, {}),
           "s4": (llada_state, llada_logits, s4_tree, dict(n_head=H)),
           "nanogpt": (nanogpt_state, nanogpt_logits, nanogpt_tree, {})}
each = pytest.mark.parametrize("system", SYSTEMS)


def sample(system: str, folder: Path, prefix: str = "", **more) -> Path:
    "A checkpoint file of a system"
    state, _, tree, _ = SYSTEMS[system]
    path, state = folder / "given.pt", state()
    torch.save(tree({prefix + n: t for n, t in state.items()} if prefix else state), path, **more)
    return path


@torch.no_grad()
def our_logits(foreign, ids=IDS):
    model = GPT(foreign.model).eval()
    fill_model(model, foreign.weights)
    return model(ids)


# --- reading

@each
def test_logits_are_theirs(system, tmp_path):
    state, logits, _, settings = SYSTEMS[system]
    foreign = read_foreign(sample(system, tmp_path), **settings)
    with torch.no_grad(): expected = logits(state(), IDS)
    assert torch.allclose(our_logits(foreign), expected, atol=1e-5, rtol=1e-5)
    assert check_logits(foreign).shape == (2, T, V) and "finite" in foreign.notes[-1]
    assert foreign.layout == system


def test_what_is_carried_over(tmp_path):
    read = {s: read_foreign(sample(s, tmp_path), **SYSTEMS[s][3]) for s in SYSTEMS}
    assert {s: (f.step, f.epoch, round(f.loss, 4)) for s, f in read.items()} == {
        "s0": (500, 2, 2.3456), "s1": (123, 4, 1.5), "s2": (1000, 0, 2.5), "s3": (100, 0, 3.25),
        "s4": (7, 5, 2.75), "nanogpt": (250, 0, 1.48)}
    assert read["s0"].settings == dict(batch_size=48, max_steps=100, grad_accum_steps=4)
    assert read["s1"].settings == dict(batch_size=32, epochs=100.0, learning_rate=3e-4, dtype="bfloat16",
                                       betas=(0.9, 0.95), warmup_steps=500)
    nano = read["nanogpt"].settings
    assert (nano["betas"], nano["min_lr_ratio"], nano["compile"]) == ((0.9, 0.99), 0.1, "model")
    assert not {"device", "data", "runs_dir"} & nano.keys()
    assert read["s3"].model.context_length == T and read["s3"].model.rope_theta == 5e5
    assert "secret" not in str(vars(read["s3"]))
    assert [s for s, f in read.items() if f.moments] == ["s1", "s3", "s4", "nanogpt"]
    assert all("| note |" in f._repr_markdown_() for f in read.values())


@each
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrappers_are_taken_off(system, prefix, tmp_path):
    bare = read_foreign(sample(system, tmp_path), **SYSTEMS[system][3])
    wrapped = read_foreign(sample(system, tmp_path, prefix), **SYSTEMS[system][3])
    assert all(torch.equal(t, wrapped.weights[n]) for n, t in bare.weights.items())


def test_moments_follow_their_weights(tmp_path):
    "A moment that was made from a weight is still that weight's, whatever was joined and reordered"
    for system in ("s1", "s3", "s4", "nanogpt"):
        f = read_foreign(sample(system, tmp_path), **SYSTEMS[system][3])
        assert f.moments["exp_avg"].keys() == f.moments["exp_avg_sq"].keys() == f.weights.keys()
        for name, w in f.weights.items():
            if not w.any(): continue   # a bias that it does not have
            number = f.moments["exp_avg"][name] - 0.1 * w
            assert torch.allclose(number, number.round(), atol=1e-4)
            assert torch.allclose(f.moments["exp_avg_sq"][name], w ** 2 + number.round(), atol=1e-4)
    tree = s1_tree(s1_state())
    tree["optimizer_state_dict"]["state"][3]["exp_avg"] = torch.ones(2)
    torch.save(tree, tmp_path / "given.pt")
    f = read_foreign(tmp_path / "given.pt")
    assert f.moments is None and any("exp_avg 3 is not" in n for n in f.notes)


def test_learned_positions_of_s1(tmp_path):
    tree = s1_tree(s1_state(rotary=False))
    tree["config"] = {"model": S1_CONFIG["model"] | {"use_rotary_emb": False}}
    torch.save(tree, tmp_path / "given.pt")
    f = read_foreign(tmp_path / "given.pt")
    assert torch.allclose(our_logits(f), s1_logits(s1_state(rotary=False), IDS), atol=1e-5)


def test_hugging_face_weights(tmp_path):
    "Llama and GPT-2 (whose matrices are transposed), as safetensors beside their config.json, and as .pt"
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(5)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_positions=T, n_embd=C, n_layer=L, n_head=H)).eval()
    for p in gpt2.parameters(): torch.nn.init.normal_(p, std=0.3)
    for model in (llama(), gpt2):
        folder = tmp_path / type(model).__name__
        model.save_pretrained(folder)
        f = read_foreign(folder / "model.safetensors")
        with torch.no_grad(): expected = model(IDS).logits
        assert f.layout == "weights" and torch.allclose(our_logits(f), expected, atol=1e-5, rtol=1e-4)
        torch.save(model.state_dict(), folder / "w.pt")
        with pytest.raises(ValueError, match="n_head is not in the file: give n_head="):
            read_foreign(folder / "w.pt")
    settings = dict(n_head=H, rope_theta=5e5, context_length=64)
    assert torch.allclose(our_logits(read_foreign(tmp_path / "LlamaForCausalLM/w.pt", **settings)),
                          llama()(IDS).logits, atol=1e-5, rtol=1e-4)


def test_meta_names(tmp_path):
    names = {"tok_embed.": "tok_embeddings.", ".mlp.": ".feed_forward.", "mlp_norm": "ffn_norm"}
    state = {}
    for name, t in s3_state().items():
        for a, b in names.items(): name = name.replace(a, b)
        state[name] = t
    torch.save(state, tmp_path / "consolidated.00.pth")
    f = read_foreign(tmp_path / "consolidated.00.pth")   # freqs_cis says head_dim and theta
    assert f.family == "meta" and torch.allclose(our_logits(f), s3_logits(s3_state(), IDS), atol=1e-5,
                                                 rtol=1e-5)


@pytest.mark.parametrize("change, says", [
    (lambda s: s | {"lm_head.bias": torch.ones(V)}, "head.bias has no place"),
    (lambda s: s | {"embed_norm.weight": torch.ones(C)}, "no place for embed_norm.weight"),
    (lambda s: s | {"transformer.h.3.ln_1.weight": torch.ones(C)},
     "no place for transformer.h.3.ln_1.weight"),
    (lambda s: {n: t for n, t in s.items() if "h.1.ln_2.weight" not in n},
     "layers.1.norm2.weight is missing"),
    (lambda s: s | {"transformer.h.0.mlp.c_fc.weight": torch.ones(4 * C, C + 1)}, "expected"),
    (lambda s: s | {"transformer.h.0.ln_1.weight": torch.ones(C, dtype=torch.int64)},
     "no place for layers.0.norm1"),
    (lambda s: s | {"module.lm_head.weight": s["lm_head.weight"]}, "twice"),
    (lambda s: {"conv.weight": torch.ones(3, 3)}, r"conv.weight: float32 \(3, 3\)"),
    (lambda s: s | {"transformer.wte.weight": torch.ones(1, C).expand(2**33, C)}, "claims more"),
])
def test_what_our_gpt_cannot_be(change, says, tmp_path):
    torch.save(nanogpt_tree(nanogpt_state()) | {"model": change(nanogpt_state())}, tmp_path / "given.pt")
    with pytest.raises(ValueError, match=says): read_foreign(tmp_path / "given.pt")


def test_simple_encoder_of_s4(tmp_path):
    "S4's first generation normalises its embeddings, which ours cannot"
    w = weights()
    state = {"token_embedding.weight": w(V, C), "pos_encoding": w(1, T, C), "embed_norm.weight": w(C)}
    torch.save(s4_tree(state), tmp_path / "given.pt")
    with pytest.raises(ValueError, match="embed_norm.weight: float32"): read_foreign(tmp_path / "given.pt")


def test_settings_that_do_not_fit(tmp_path):
    path = sample("s4", tmp_path)
    with pytest.raises(ValueError, match="n_head=5 does not fit"): read_foreign(path, n_head=5)
    with pytest.raises(ValueError, match="did you mean 'n_head'"): read_foreign(path, n_haed=4)
    torch.save({"optimizer_states": [], "step": 1, "net": {}, 3: [1, 2]}, path)
    with pytest.raises(ValueError, match="optimizer_states: list of 0, step: int, net: dict of 0, 3: list"):
        read_foreign(path)


# --- reading safely

CANARY = "canary"

class Run:
    "Unpickles by calling a function"
    def __init__(self, function, *args): self.function, self.args = function, args
    def __reduce__(self): return self.function, self.args


class Raw(bytes):
    "Pickle opcodes as they are, in the place of an object"


class RawPickler(pickle._Pickler):
    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Raw): self.write(bytes(obj))
        else: super().save(obj, save_persistent_id)


def config_object(path: Path, tree: dict, **more) -> Path:
    "Save `tree` with a dataclass of a module `llm` as its config, in a process that ends"
    torch.save(tree, path.with_suffix(".plain"))
    code = f'''
import sys, torch, dataclasses
llm = sys.modules["llm"] = type(sys)("llm")
exec("""from dataclasses import dataclass
@dataclass
class ModelConfig:
    d_model: int = {C}
    n_heads: int = {H}
    n_layers: int = {L}
    d_ff: int = 64
    batch_size: int = 48
    max_steps: int = 100
    gradient_accumulation_steps: int = 4
    muon_lr: float = 0.01
    max_seq_len: int = {T}
    max_tokens: int = 200000
    vocab_size: int = None
    wandb_project: str = "llm-med"
    def __post_init__(self): self.d_k = self.d_model // self.n_heads
    def __setstate__(self, state): open({str(path.parent / CANARY)!r}, "w")
""", vars(llm)); llm.ModelConfig.__module__ = "llm"
tree = torch.load({str(path.with_suffix(".plain"))!r})
torch.save(tree | {{"config": llm.ModelConfig()}}, {str(path)!r}, **{more!r})'''
    subprocess.run([sys.executable, "-c", code], check=True)
    return path


@pytest.mark.parametrize("more", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "legacy"])
def test_s0_with_its_pickled_dataclass(more, tmp_path):
    "S0 writes the older format, and an object of a class that is not here when it is read"
    state = s0_state()
    path = config_object(tmp_path / "checkpoint_step_500.pt", s0_tree(state), **more)
    with pytest.raises(pickle.UnpicklingError): torch.load(path)   # what S0's users meet
    f = read_foreign(path)
    assert torch.allclose(our_logits(f), s0_logits(state, IDS), atol=1e-5, rtol=1e-5)
    assert f.settings == dict(batch_size=48, max_steps=100,
                              grad_accum_steps=4) and f.model.context_length == T
    assert "config: llm.ModelConfig" in inspect_file(path).facts["keys"]
    assert "llm" not in sys.modules and not (tmp_path / CANARY).exists()


def hostile(canary: str) -> dict:
    "Objects that run code when they are unpickled, and some that only try"
    import importlib, runpy, shutil
    def glob(module, name): return b"c" + module.encode() + b"\n" + name.encode() + b"\n"
    def text(s): return b"X" + struct.pack("<I", len(s)) + s.encode()
    make = f"open({canary!r}, 'w')"
    return {
        "os.system": Run(os.system, f"touch {canary}"), "exec": Run(exec, make), "eval": Run(eval, make),
        "open": Run(open, canary, "w"), "Popen": Run(subprocess.Popen, ["touch", canary]),
        "getattr": Run(getattr, Run(importlib.import_module, "os"), "system"),
            "runpy": Run(runpy.run_path, "x.py"),
        "torch.load": Run(torch.load, "x.pt"), "torch.hub": Run(torch.hub.load, "a", "b"),
        "rmtree": Run(shutil.rmtree, canary), "bytearray": Run(bytearray, 2**40),
            "import": Run(__import__, "os"),
        # an unknown class: called, given arguments, filled with what is no dict; an unknown function
        "called": Raw(glob("llm", "ModelConfig") + b")R"),
            "arguments": Raw(glob("llm", "ModelConfig") + b"K\x01\x85\x81"),
        "setstate": Raw(glob("llm", "ModelConfig") + b")\x81(K\x01K\x02tb"),
        "function": Raw(glob("llm", "run") + text(canary) + b"\x85R"),
        "of a stand-in": Raw(glob("llm", "ModelConfig") + b")\x81" + text("x") + b"\x85R"),
        # names that torch maps from Python 2, and operators that it does not know
        "python 2": Raw(glob("__builtin__", "eval") + text(make) + b"\x85R"),
        "inst": Raw(b"(" + text(f"touch {canary}") + b"ios\nsystem\n"),
        "stack global": Raw(text("os") + text("system") + b"\x93" + text(f"touch {canary}") + b"\x85R"),
        "extension": Raw(b"\x82\x01"),
        "object": Raw(b"(" + glob("os", "system") + text(f"touch {canary}") + b"o"),
        "dotted": Raw(glob("llm", "os.system") + text(f"touch {canary}") + b"\x85R"),
    }


def write_raw(path: Path, tree, legacy: bool) -> None:
    "torch.save with `Raw` opcodes let through"
    module = type(sys)("raw"); module.Pickler = RawPickler
    module.dump = lambda obj, f, protocol=2: RawPickler(f, protocol).dump(obj)
    torch.save(tree, path, pickle_module=module, _use_new_zipfile_serialization=not legacy)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", hostile(""))
def test_no_code_runs(kind, legacy, tmp_path):
    "In the config, among the weights, in the optimizer, as a key, as the whole file"
    canary = tmp_path / CANARY
    evil = hostile(str(canary))[kind]
    state = {"transformer.wte.weight": torch.ones(2, 2)}
    places = [evil, {"iter_num": 1, "model": state, "config": evil},
              {"iter_num": 1, "model": state | {"x": evil}},
              {"optimizer_states": [{"state": {0: evil}}], "model_state_dict": state},
              {"model_state_dict": state, "best_loss": evil, "config": {"model": {"a": [evil]}}}]
    before = torch.serialization.get_safe_globals()
    for i, tree in enumerate(places):
        write_raw(tmp_path / f"{i}.pt", tree, legacy)
        with pytest.raises(ValueError, match=f"{i}.pt"): read_foreign(tmp_path / f"{i}.pt")
        assert not inspect_file(tmp_path / f"{i}.pt").loads
    assert not canary.exists() and set(torch.serialization.get_safe_globals()) == set(before)


def test_refusals_name_what_was_asked_for(tmp_path):
    for kind, name in (("os.system", "posix.system"), ("exec", "builtins.exec"),
                       ("Popen", "subprocess.Popen"),
                       ("called", "it calls llm.ModelConfig"), ("function", "it calls llm.run"),
                       ("arguments", "it makes a llm.ModelConfig from arguments")):
        write_raw(tmp_path / "x.pt", {"config": hostile(str(tmp_path / CANARY))[kind]}, False)
        with pytest.raises(ValueError, match=name): load_safely(tmp_path / "x.pt")


def test_hostile_entries_of_a_zip(tmp_path):
    "A second pickle, compressed entries, names that lead out of the archive, a TorchScript's code"
    good = sample("nanogpt", tmp_path)
    evil = pickle.dumps(Run(os.system, f"touch {tmp_path / CANARY}"), 2)
    for name in ("given/other/data.pkl", "data.pkl", "evil/data.pkl"):
        bad = tmp_path / "bad.pt"; bad.write_bytes(good.read_bytes())
        with zipfile.ZipFile(bad, "a") as z: z.writestr(name, evil)
        try: read_foreign(bad)
        except ValueError: pass
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("a/data.pkl", b"\x80\x02}."); z.writestr("a/data/0", bytes(2**28))
    with pytest.raises(ValueError, match="compressed"): read_foreign(tmp_path / "bomb.pt")
    with zipfile.ZipFile(tmp_path / "escape.pt", "w") as z: z.writestr("../../x/data.pkl", evil)
    with pytest.raises(ValueError, match="posix.system"): read_foreign(tmp_path / "escape.pt")
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "script.pt")
    with pytest.raises(ValueError, match="script.pt"): read_foreign(tmp_path / "script.pt")
    assert not (tmp_path / CANARY).exists()


def test_what_is_no_checkpoint(tmp_path):
    "One line, soon, whatever it is"
    torch.manual_seed(0)
    good = sample("nanogpt", tmp_path).read_bytes()
    legacy = sample("nanogpt", tmp_path, _use_new_zipfile_serialization=False).read_bytes()
    files = {"empty": b"", "text": b"hello\n" * 100, "random": os.urandom(5000),
             "pickle": pickle.dumps([1, 2]),
             "proto": b"\x80\x02" + os.urandom(5000), "zeros": bytes(5000), "json": b'{"a": 1}',
             "zip": b"PK\x03\x04",
             "png": b"\x89PNG\r\n\x1a\n" + bytes(100), "memo": b"\x80\x02" + b"r\xff\xff\xff\x7f" * 3 + b"."}
    files |= {f"cut{n}": good[:n] for n in (3, 100, len(good) // 2, len(good) - 10)}
    files |= {f"old{n}": legacy[:n] for n in (3, 30, 200, len(legacy) // 2, len(legacy) - 100)}
    deep = b"\x80\x02" + b"(" * 10**5 + b"."
    files |= {"deep": deep, "list": b"\x80\x02" + b"]" * 10**5 + b"0" * (10**5 - 1) + b"."}
    (tmp_path / "folder").mkdir(); (tmp_path / "link").symlink_to(tmp_path / "folder")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop"); (tmp_path / "gone").symlink_to(tmp_path / "nothing")
    for name, data in files.items():
        for suffix in (".pt", ".safetensors"): (tmp_path / f"{name}{suffix}").write_bytes(data)
    names = [f"{n}{s}" for n in files for s in (".pt", ".safetensors")]
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in [*names, "folder", "link", "fifo", "loop", "gone", "none\0", "none"]:
        with pytest.raises(ValueError) as e: read_foreign(tmp_path / name)
        assert "\n" not in str(e.value)
        assert inspect_file(tmp_path / name).problems, name
    with pytest.raises(ValueError): read_foreign("/dev/zero")
    assert time.monotonic() - started < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000   # kB


def test_damaged_bits_do_no_harm(tmp_path):
    "Any bit of the pickle turned: an answer or a ValueError, never another exception"
    rng = random.Random(0)
    for more in ({}, {"_use_new_zipfile_serialization": False}):
        path = tmp_path / f"{len(more)}.pt"
        torch.save(s0_tree({"token_embedding.weight": torch.ones(2, 2)}), path, **more)
        data = bytearray(path.read_bytes())
        for _ in range(150):
            hurt = bytearray(data); hurt[rng.randrange(len(hurt) * 2 // 3)] ^= 1 << rng.randrange(8)
            path.write_bytes(hurt)
            with pytest.raises(ValueError), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read_foreign(path)


def test_config_without_an_end(tmp_path):
    "A pickle of 2 kB whose config has 99**20 leaves"
    tree, config = s0_tree(s0_state()), {}
    for _ in range(20): config = {str(i): config for i in range(99)}
    torch.save(tree | {"config": {"a": config, "n_heads": H, "max_seq_len": T}}, tmp_path / "x.pt")
    started = time.monotonic()
    assert read_foreign(tmp_path / "x.pt").model.n_head == H
    assert time.monotonic() - started < 10


# --- importing and exporting

def tokenizer_of(folder: Path, n: int = V) -> str:
    "The folder of a character tokenizer with `n` ids"
    from minigpt_wb.data.tokenizer import char_tokenizer
    return str(save_tokenizer(char_tokenizer([chr(0x4e00 + i) for i in range(n - 1)]),
                              folder / f"tokenizer{n}"))


def imported(system: str, folder: Path, **more):
    return import_checkpoint(sample(system, folder), folder / "runs", f"from_{system}",
                             tokenizer_of(folder), **SYSTEMS[system][3], **more)


@each
def test_import_export_and_back(system, tmp_path):
    "Imported, exported under the names of its system, read again: not a bit has changed"
    state, logits, _, settings = SYSTEMS[system]
    run = imported(system, tmp_path)
    model, cfg, tokenizer = load_model(run.name, runs_dir=tmp_path / "runs")
    with torch.no_grad(): expected = logits(state(), IDS)
    assert torch.allclose(model(IDS), expected, atol=1e-5, rtol=1e-5) and len(tokenizer) == V
    out = export_checkpoint(run, tmp_path, system)
    tree = torch.load(out)   # weights_only, torch's default
    theirs = tree[LAYOUTS[system].weights]
    assert theirs.keys() == {n for n in state() if not n.endswith(".attn.bias")}  # as it loads
    assert all(torch.equal(t, state()[n]) for n, t in theirs.items() if n != "freqs_cis")
    again = read_foreign(out)
    assert again.model == cfg.model and again.layout == system and again.step == list_checkpoints(run)[0].step
    assert all(torch.equal(t, again.weights[n]) for n, t in list_checkpoints(run)[0].load_model().items())
    assert export_checkpoint(run, tmp_path / "ours.pt", system, names="ours").is_file()
    bare = read_foreign(tmp_path / "ours.pt")
    assert bare.family == "ours" and all(torch.equal(t, bare.weights[n]) for n, t in again.weights.items())
    if again.moments:
        for key, moments in read_foreign(tmp_path / "given.pt", **settings).moments.items():
            assert all(torch.equal(t, again.moments[key][n]) for n, t in moments.items())


@each
def test_exported_files_are_plain(system, tmp_path):
    "Keys and file names of the system; dicts, lists, text, numbers and tensors alone; a hash that is checked"
    out = export_checkpoint(imported(system, tmp_path), tmp_path, system)
    assert out.name == {"s0": "checkpoint_step_500.pt", "s1": "checkpoint_epoch_4.pt",
                        "s2": "ckpt_step_1000.pt",
                        "s3": "checkpoint_step_100.pt", "s4": "checkpoint_epoch_5.pt",
                        "nanogpt": "ckpt.pt"}[system]
    def kinds(v):
        if isinstance(v, dict): return set().union({type(v)}, *map(kinds, v), *map(kinds, v.values()))
        if isinstance(v, (list, tuple)): return set().union({type(v)}, *map(kinds, v))
        return {type(v)}
    tree = torch.load(out)
    plain_types = {dict, list, tuple, str, int, float, bool, type(None), torch.Tensor}
    assert kinds(tree) <= plain_types and tree["format"] == "minigpt_wb/1"
    given = torch.load(tmp_path / "given.pt")
    assert given.keys() - {"scaler_state_dict"} <= tree.keys()
    digest = sha256(out)
    assert (tmp_path / f"{out.name}.sha256").read_text() == f"{digest}  {out.name}\n"
    subprocess.run(["sha256sum", "-c", f"{out.name}.sha256"], cwd=tmp_path, check=True, capture_output=True)
    data = bytearray(out.read_bytes()); data[-1] ^= 1; out.write_bytes(data)
    with pytest.raises(ValueError, match="is not what .* was written for"): read_foreign(out)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    "A checkpoint of a GPT-2 of ours, trained for a step"
    folder = tmp_path_factory.mktemp("own")
    cfg = RunConfig().override(n_layer=L, n_head=H, d_model=C, context_length=T, vocab_size=V, max_steps=7)
    model = GPT(cfg.model); optimizer = make_optimizer(model, cfg.optim)
    model(IDS).square().mean().backward(); optimizer.step()
    return save_checkpoint(folder / "checkpoints", 7, model.state_dict(), optimizer,
                           {"config": plain(cfg.tree())},
                           save_tokenizer(load_tokenizer("bytes"), folder / "tokenizer"))


def test_what_fits_no_system(own, tmp_path):
    for layout, says in {"s0": "norm=layernorm .there rmsnorm", "s1": "attention.qkv.bias",
                         "s3": "position=learned .there rotary"}.items():
        with pytest.raises(ValueError, match=f"the model is none that {layout} has: .*{says}.*names='ours'"):
            export_checkpoint(own, tmp_path, layout)
    for change, says in ((dict(activation="gelu_tanh"), "activation=gelu_tanh .there gelu."),
                         (dict(norm_eps=1e-6), "norm_eps"),
                         (dict(position="rotary"), "position"), (dict(qk_norm=True), "q_norm.weight")):
        model = GPT((cfg := RunConfig().override(n_layer=1, n_head=H, d_model=C, vocab_size=V,
                                                 **change)).model)
        saved = save_checkpoint(tmp_path / "checkpoints", 1, model.state_dict(), None,
                                {"config": plain(cfg.tree())})
        with pytest.raises(ValueError, match=says): export_checkpoint(saved, tmp_path, "nanogpt")
    for wrong, says in ((dict(layout="s9"), "pick one of s0"), (dict(names="x"), "pick theirs or ours")):
        with pytest.raises(ValueError, match=says): export_checkpoint(own, tmp_path, **wrong)
    assert not list(tmp_path.glob("*.p*")) and not list(tmp_path.glob(".*.part"))


def test_presets_without_biases_fit(tmp_path):
    "S1 has biases in its MLP alone: a model without any gets zeros there, and is itself again when read"
    cfg = RunConfig.preset("small").override(n_layer=L, n_head=H, d_model=C, vocab_size=V, context_length=T,
                                             bias=False)
    model = GPT(cfg.model)
    saved = save_checkpoint(tmp_path / "checkpoints", 3, model.state_dict(), None,
                            {"config": plain(cfg.tree())})
    out = export_checkpoint(saved, tmp_path, "s1")
    assert torch.allclose(s1_logits(torch.load(out)["model_state_dict"], IDS), model(IDS), atol=1e-5)
    assert read_foreign(out).model == cfg.model


def test_export_that_fails(own, tmp_path):
    "No room: the older file and its hash stay, nothing lies about; a taken name is left alone"
    out = export_checkpoint(own, tmp_path, "nanogpt")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="exists: give another, or overwrite=True"):
        export_checkpoint(own, tmp_path, "nanogpt")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="could not be written"):
            export_checkpoint(own, out, "nanogpt", overwrite=True)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert before == {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="is not a folder"): export_checkpoint(own, tmp_path / "a/b.pt")
    export_checkpoint(own, out, "s2", overwrite=True)
    assert read_foreign(out).layout == "s2"


def test_import_makes_a_run(tmp_path):
    run = imported("nanogpt", tmp_path, batch_size=4)
    [c] = list_checkpoints(run)
    assert (run.state, run.status["step"], c.step, c.verify()) == ("stopped", 250, 250, [])
    assert c.state["lineage"] == [{"kind": "import", "file": "given.pt", "layout": "nanogpt", "step": 250,
                                   "sha256": sha256(tmp_path / "given.pt")}]
    s = c.state
    assert (s["samples"], s["tokens"], round(s["val_loss"], 2), bool(s["notes"])) == (0, 0, 1.48, True)
    cfg = run.config
    assert [cfg[n] for n in ("batch_size", "max_steps", "learning_rate", "vocab_size")] == [4, 5000, 1e-3, V]
    assert cfg == c.config
    model = GPT(cfg.model); optimizer = make_optimizer(model, cfg.optim)
    c.restore(model, optimizer)
    assert optimizer.state[model.tok_embed.weight]["step"].item() == 250


def test_import_that_fails_leaves_no_run(tmp_path, monkeypatch):
    path, runs = sample("nanogpt", tmp_path), tmp_path / "runs"
    tokenizer = tokenizer_of(tmp_path)
    for more, says in (({}, f"holds no tokenizer: give tokenizer=... with at most {V}"),
                       (dict(tokenizer="chars"), "give data=TEXT"),
                       (dict(tokenizer=tokenizer_of(tmp_path, V + 1)), f"has {V + 1} ids, the model {V}"),
                       (dict(tokenizer="bpe:300"), "made from text"),
                       (dict(tokenizer="none/at/all"), "does not exist"),
                       (dict(tokenizer=tokenizer, vocab_size=20), "vocab_size=20 is less"),
                       (dict(tokenizer=tokenizer, learning_rate=-1), "learning_rate"),
                       (dict(tokenizer=tokenizer, run_name="../x"), "cannot name a run")):
        with pytest.raises(ValueError, match=says): import_checkpoint(path, runs, **more)
    def full(*args, **more): raise CheckpointError(28, "no room")
    monkeypatch.setattr("minigpt_wb.training.imports.save_checkpoint", full)
    with pytest.raises(CheckpointError): import_checkpoint(path, runs, tokenizer=tokenizer)
    torch.save(nanogpt_tree(nanogpt_state() | {"transformer.wpe.weight": torch.full((T, C), math.nan)}), path)
    with pytest.raises(ValueError, match="1 weights are not finite: pos_embed"):
        import_checkpoint(path, runs, tokenizer=tokenizer)
    assert list_runs(runs) == []


def test_tokenizers_of_imports(tmp_path):
    "meta.pkl beside the file, read without running it; the characters of a text; a row for end-of-text"
    chars = [chr(0x4e00 + i) for i in range(V)]
    meta = {"vocab_size": V, "itos": dict(enumerate(chars)), "stoi": {c: i for i, c in enumerate(chars)}}
    path = sample("nanogpt", tmp_path)
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    model, cfg, tokenizer = load_model(import_checkpoint(path, tmp_path / "runs", "meta", vocab_size=V))
    assert tokenizer.encode("\u4e03\u4e01") == [3, 1] and cfg["vocab_size"] == V
    model, cfg, tokenizer = load_model(import_checkpoint(path, tmp_path / "runs", "grown"))
    logits = model(IDS)
    assert cfg["vocab_size"] == V + 1
    assert torch.allclose(logits[..., :V], nanogpt_logits(nanogpt_state(), IDS), atol=1e-5)
    assert torch.allclose(logits[..., V], logits[..., :V].mean(-1), atol=1e-4)
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"itos": Run(os.system, f"touch {tmp_path / CANARY}")}))
    with pytest.raises(ValueError, match="not a character vocabulary"):
        import_checkpoint(path, tmp_path / "runs", "evil")
    assert not (tmp_path / CANARY).exists() and len(list_runs(tmp_path / "runs")) == 2
    (tmp_path / "meta.pkl").unlink(); (tmp_path / "text.txt").write_text("hello " * 50)
    text = str(tmp_path / "text.txt")
    run = import_checkpoint(sample("s1", tmp_path), tmp_path / "runs", "chars", tokenizer="chars", data=text)
    model, cfg, tokenizer = load_model(run)
    assert tokenizer.encode("hello") == [2, 1, 3, 3, 4]


# --- inspecting

def test_inspect(own, tmp_path):
    run = imported("s3", tmp_path)
    seen = inspect_file(tmp_path / "given.pt")
    assert seen.loads and seen.kind == "foreign" and "layout: s3" in str(seen) and "secret" not in str(seen)
    assert (inspect_file(own).kind, inspect_file(own).loads,
            inspect_file(run.path).facts["step 100"]) == ("checkpoint", True, "intact")
    weights = list_checkpoints(run)[0].path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert "its hash is another" in str(inspect_file(list_checkpoints(run)[0].path))
    assert not inspect_file(run.path).loads and "it does not load" in inspect_file(run.path)._repr_markdown_()
    assert inspect_file(tmp_path).problems and inspect_file(ROOT / "README.md").kind == "unknown"
    torch.save({"net": {"w": torch.ones(2)}, "step": 1}, tmp_path / "odd.pt")
    assert inspect_file(tmp_path / "odd.pt").facts["keys"] == "net: dict of 1, step: int"
