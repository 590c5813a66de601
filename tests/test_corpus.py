"Sources that a notebook cell cannot hold: data sets of the hub, no network, files larger than a block"
import os, subprocess, sys, textwrap

import pyarrow as pa
import pyarrow.parquet
import pytest

from minigpt_wb.config import CorpusConfig, RunConfig
from minigpt_wb.data.corpus import open_corpus, split_documents
from minigpt_wb.data.text import PIECE
from minigpt_wb.data.tokenizer import (bpe_tokenizer, decode, encode, load_tokenizer, save_tokenizer,
                                       tokenizer_hash)

NOTES = [f"Patient {i} was seen in the clinic; the dose of drug {i % 7} was kept." for i in range(100)]


def python(code: str, cwd, **env: str) -> subprocess.CompletedProcess:
    "Run `code` in a fresh Python, in the folder `cwd`"
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=cwd, timeout=120,
                          capture_output=True, text=True, env=os.environ | env)


@pytest.fixture
def medical(tmp_path, monkeypatch):
    "A local stand-in for the medical data set: the same name and column, in two parquet files"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hub", raising=False)
    folder = tmp_path / "TheBlueScrubs-v1-fixed"
    folder.mkdir()
    for i in range(2):
        half = NOTES[50 * i:50 * i + 50]
        table = pa.table({"text": [*half, None], "score": [1.0] * 51})
        pa.parquet.write_table(table, folder / f"train-{i}.parquet")
    return folder


def test_data_set_path_reads_a_local_parquet_folder(medical, tmp_path):
    cfg = RunConfig.preset("medical").override(data=f"hf:{medical}", corpus_documents=None).corpus
    corpus = open_corpus(cfg, tmp_path)
    assert list(corpus.documents()) == NOTES
    assert (corpus.skipped, corpus.size()[0]) == (2, 100)
    assert corpus.fingerprint() == open_corpus(cfg, tmp_path).fingerprint()
    splits = [split for split, _, begins in split_documents(corpus, 0.1) if begins]
    assert (splits.count("train"), splits.count("val")) == (90, 10)


def test_data_set_limit_and_bad_names(medical, tmp_path):
    few = open_corpus(CorpusConfig(data=f"hf:{medical}", corpus_documents=7), tmp_path)
    assert list(few.documents()) == NOTES[:7]
    with pytest.raises(ValueError, match="no column 'txet' .did you mean 'text'.*text, score"):
        open_corpus(CorpusConfig(data=f"hf:{medical}", text_column="txet"), tmp_path)
    with pytest.raises(ValueError, match="hf_split='nothing' could not be loaded"):
        open_corpus(CorpusConfig(data=f"hf:{medical}", hf_split="nothing"), tmp_path)


def test_the_same_folder_as_plain_files(medical, tmp_path):
    corpus = open_corpus(CorpusConfig(data=str(medical)), tmp_path)
    assert list(corpus.documents()) == NOTES


def test_name_without_network_says_how_to_use_a_local_copy(tmp_path):
    code = """
        from minigpt_wb.config import RunConfig
        from minigpt_wb.data.corpus import open_corpus
        try: open_corpus(RunConfig.preset("medical").corpus, ".")
        except ValueError as e: print(e)
    """
    done = python(code, tmp_path, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    name = "hf:openmed-community/TheBlueScrubs-v1-fixed"
    assert f"{name} with hf_split='train' could not be loaded" in done.stdout, done.stderr
    assert done.stdout.strip().endswith("copy its parquet files to a folder, and give data=FOLDER")


def test_large_file_is_read_in_bounded_pieces(tmp_path):
    line = "the quick brown fox – jumps over the lazy dog, 0123456789 times\n"
    file = tmp_path / "large.txt"
    file.write_text(line * 100_000, encoding="utf-8")
    corpus = open_corpus(CorpusConfig(data=str(file)), tmp_path)
    n, total, sizes = 0, {"train": 0, "val": 0}, set()
    for split, text, begins in split_documents(corpus, 0.1):
        n += begins; total[split] += len(text); sizes.add(len(text))
    assert (n, max(sizes) <= 2 * PIECE) == (2, True)
    first = int(len(line) * 100_000 * 0.9)
    assert total == {"train": first, "val": len(line) * 100_000 - first}
    assert corpus.total_bytes == file.stat().st_size


def test_pieces_keep_the_ids_of_a_trained_tokenizer(tmp_path):
    line = "def area(width, height):\n    # the product, in square metres\n\n    return width * height   \n"
    file = tmp_path / "code.py"
    file.write_text(line * 5000, encoding="utf-8")
    bpe = bpe_tokenizer([line], 300)
    corpus = open_corpus(CorpusConfig(data=str(file)), tmp_path)
    pieces = [text for text, _ in corpus.pieces()]
    assert len(pieces) > 3
    ids = [i for piece in encode(bpe, pieces) for i in piece.tolist()]
    assert ids == encode(bpe, [line * 5000])[0].tolist()


def test_memory_stays_bounded(tmp_path):
    "200 MB of text, read, counted and encoded as bytes, take less than 100 MB more than the imports"
    file = tmp_path / "large.txt"
    block = ("the quick brown fox jumps over the lazy dog " * 24_000).encode()
    with open(file, "wb") as f:
        for _ in range(200): f.write(block)
    code = f"""
        import resource
        from minigpt_wb.config import CorpusConfig
        from minigpt_wb.data.corpus import open_corpus, split_documents
        from minigpt_wb.data.tokenizer import encode, load_tokenizer
        tokenizer = load_tokenizer("bytes")
        encode(tokenizer, ["warm"])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        corpus = open_corpus(CorpusConfig(data={str(file)!r}), ".")
        corpus.fingerprint()
        n = sum(len(encode(tokenizer, [text])[0]) for _, text, _ in split_documents(corpus, 0.1))
        print(n, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
    """
    done = python(code, tmp_path)
    tokens, more = map(int, done.stdout.split())
    assert tokens == 200 * len(block)
    assert more < 100, f"{more} MB"


def test_own_function_by_name(tmp_path):
    (tmp_path / "mine.py").write_text("def documents():\n    yield from ('one', 'two', 'three')\n")
    code = """
        from minigpt_wb.config import CorpusConfig
        from minigpt_wb.data.corpus import open_corpus
        print(list(open_corpus(CorpusConfig(data="mine:documents"), ".").documents()))
    """
    assert python(code, tmp_path).stdout.strip() == "['one', 'two', 'three']"


def test_tokenizers_are_the_same_in_another_process(tmp_path):
    texts = ["naïve café\r\n\t€ <|endoftext|>", *NOTES]
    for name in ("bytes", "chars", "bpe:300"):
        tokenizer = load_tokenizer(name, texts)
        folder = save_tokenizer(tokenizer, tmp_path / name.replace(":", ""))
        code = f"""
            from minigpt_wb.data.tokenizer import encode, load_tokenizer, tokenizer_hash
            t = load_tokenizer({str(folder)!r})
            print(tokenizer_hash(t)); print(encode(t, [{texts[0]!r}])[0].tolist())
        """
        ids = encode(tokenizer, texts[:1])[0]
        assert decode(tokenizer, ids) == texts[0]
        assert python(code, tmp_path).stdout.split("\n")[:2] == [tokenizer_hash(tokenizer), str(ids.tolist())]
        assert tokenizer_hash(load_tokenizer(name, texts)) == tokenizer_hash(tokenizer)


def test_hash_seed_does_not_enter_a_trained_tokenizer(tmp_path):
    code = """
        from minigpt_wb.data.tokenizer import load_tokenizer, tokenizer_hash
        texts = [f"word{i} of many words, the {i}th of them" for i in range(500)]
        print(*(tokenizer_hash(load_tokenizer(name, texts)) for name in ("bpe:400", "chars")))
    """
    one, two = (python(code, tmp_path, PYTHONHASHSEED=seed).stdout for seed in "12")
    assert one == two and len(one.split()) == 2
