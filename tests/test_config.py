"""Settings that make no sense: a ValueError that names the setting, whichever door they came in by."""
import time

import pytest

from minigpt_wb.config import RunConfig, read_config, resolve, take
from minigpt_wb.flags import from_flags, split_flags

TINY = RunConfig.preset("tiny")

@pytest.mark.parametrize("settings, said", [
    (dict(train_split=None), "train_split=None is not valid"),
    (dict(train_split="train"), "train_split='train' is not valid"),
    (dict(adam_beta1=None), "adam_beta1=None is not valid"),
    (dict(min_lr=None, lr=1e-3), "min_lr=None is not valid"),
    (dict(min_lr=1e-5, learning_rate=0), "min_lr=1e-05 is not valid: min_lr is a share of learning_rate"),
    (dict(min_lr=10**400, lr=1), "min_lr=1000"),
    (dict(use_amp="maybe"), "use_amp='maybe' is not valid: expected true or false"),
    (dict(eval_every="9" * 400 + " epoch"), "eval_every='999"),
    (dict(betas=[0.9]), r"betas=\[0.9\] is not valid: expected two values"),
    (dict(seed=2**63), "seed=9223372036854775808 is not valid"),
    (dict(timeout_s=1e8), "timeout_s=100000000.0 is not valid"),
    (dict(epochs=1e7), "epochs=10000000.0 is not valid"),
    (dict(batch_size=10**16), "batch_size=10000000000000000 is not valid"),
    (dict(max_steps=10**16), "max_steps=10000000000000000 is not valid"),
    (dict(tokenizer=" "), "tokenizer is empty: give bytes"),
    (dict(n_layer=2, n_layers=3), "n_layer and n_layers are both n_layer, and differ"),
])
def test_value_errors_name_the_setting(settings, said):
    with pytest.raises(ValueError, match=said) as e: TINY.override(**settings)
    assert "pydantic" not in str(e.value)

def test_two_spellings_that_agree():
    cfg = TINY.override(n_layer=2, n_layers=2, adam_beta1=0.8, adam_beta2=0.9, use_amp=True, dtype="bfloat16")
    assert (cfg["n_layer"], cfg["betas"], cfg["dtype"]) == (2, (0.8, 0.9), "bfloat16")

@pytest.mark.parametrize("preset", [5, ["a"], "tinny"])
def test_preset_that_is_none(preset):
    with pytest.raises(ValueError, match="preset .* is not known"): resolve(preset)

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i-1}, *a{i-1}]\n" for i in range(1, 60))
TREES = BOMB.replace("[x, x]", "{x: 1}").replace("[", "{l: ").replace(", ", ", r: ").replace("]", "}")

@pytest.mark.parametrize("name, text, said", [
    ("c.yaml", BOMB + "data: *a59", "an alias .* may stand for one value"),
    ("c.yaml", TREES, "an alias .* may stand for one value"),
    ("c.yaml", "model: &m {inner: *m}", "an alias .* may stand for one value"),
    ("c.yaml", "lr: 1\nlr: 1", "it names 'lr' twice"),
    ("c.json", '{"lr": 1, "lr": 1}', "it names 'lr' twice"),
    ("c.yaml", "model: {n_layer: 2}\nold: {n_layer: 2}", "it names 'n_layer' twice"),
    ("c.yaml", "n_layer: 2\nn_layers: 3", "n_layer and n_layers are both n_layer"),
    ("c.yaml", "n_layer: -2", "n_layer=-2 is not valid"),
    ("c.yaml", "preset: [a]", r"preset \['a'\] is not known"),
    ("c.json", "[" * 100_000, "is not valid JSON"),
])
def test_an_error_in_a_file_names_the_file(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    start = time.monotonic()
    with pytest.raises(ValueError, match=f"config file .*{name}.*{said}"): resolve(config=tmp_path / name)
    assert time.monotonic() - start < 2

def test_what_a_file_may_hold(tmp_path):
    file = tmp_path / "c.json"
    file.write_bytes(b'\xef\xbb\xbf{"n_layer": 3, "device_id": 1}')
    assert read_config(file) == ({"n_layer": 3}, {"gpus": "1,"})
    file = tmp_path / "c.yaml"
    file.write_text("model:\ntraining: {seed: &s 3, eval_every: *s}\n")
    assert read_config(file)[0] == {"seed": 3, "eval_every": 3}

def test_device_id_is_gpus_at_every_door():
    assert take({"device_id": 2, "out_dir": "d", "seed": 1}, ("gpus", "runs_dir")) == (
        {"gpus": "2,", "runs_dir": "d"}, {"seed": 1})
    assert split_flags(["--device-id=2", "x"], {"gpus": ""}) == ({"gpus": "2,"}, ["x"])
    with pytest.raises(ValueError, match="device_id='a' is not valid"): take({"device_id": "a"}, ("gpus",))

@pytest.mark.parametrize("words, name, value", [
    ("--use-amp False", "dtype", "float32"), ("--no-fp16 --n-layer 2", "n_layer", 2),
    ("--use-wandb --n-layer 2", "n_layer", 2), ("--pin-memory --num-workers 4 --n-layer 2", "n_layer", 2),
    ("--pin-memory --num-workers", "n_layer", 4), ("--sample-prompt=--n-head", "sample_prompt", "--n-head"),
])
def test_flags_of_other_systems(words, name, value):
    assert from_flags(words.split(), TINY)[name] == value

@pytest.mark.parametrize("words, said", [
    ("--train-split", "--train-split needs a value"), ("--min-lr --n-layer 2", "--min-lr needs a value"),
    ("--n-layer 2 --n-layers 3", "n_layer and n_layers are both n_layer"),
    ("--train-split train", "train_split='train' is not valid"),
])
def test_flags_that_make_no_sense(words, said):
    with pytest.raises(ValueError, match=said): from_flags(words.split(), TINY)

def test_a_flag_is_no_value():
    with pytest.raises(ValueError, match="--run-name needs a value"):
        split_flags("--run-name --n-layer 2".split(), {"run_name": "its name"})
