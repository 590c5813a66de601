"""Speed and peak memory of preparing a text file: bench_tokenise.py [--mb 1000] [--tokenizers bytes bpe:8192]

Makes the text in a temporary folder: lines of the standard library's source drawn at random, each with
a number of its own, so that no cache of words or lines is flattered. Each tokenizer prepares it in a fresh
process, whose own high-water mark (VmHWM) is the peak.
"""
import argparse, glob, json, os, platform, random, subprocess, sys, sysconfig, tempfile, time
from pathlib import Path

CHILD = """
import json, sys, time
from minigpt_wb.config import CorpusConfig
from minigpt_wb.data.prepare import prepare
def peak_mb():
    with open("/proc/self/status") as f: kib = next(line.split()[1] for line in f if line.startswith("VmHWM"))
    return int(kib) * 1024 / 1e6
cfg = CorpusConfig(data=sys.argv[2], tokenizer=sys.argv[3])
start, cpu = time.perf_counter(), time.process_time()
c = prepare(cfg, sys.argv[1], progress=False)
wall, cpu = time.perf_counter() - start, time.process_time() - cpu
start = time.perf_counter(); prepare(cfg, sys.argv[1], progress=False)
print(json.dumps({"wall_s": wall, "cpu_s": cpu, "again_s": time.perf_counter() - start, "peak_mb": peak_mb(),
                  "tokens": sum(c.meta["tokens"].values()), "bytes_per_token": c.meta["bytes_per_token"]}))
"""

def make_text(path: Path, mb: float, seed: int = 0) -> None:
    "A text file of `mb` million bytes"
    sources = sorted(glob.glob(sysconfig.get_path("stdlib") + "/*.py"))
    text = "\n".join(Path(p).read_text(encoding="utf-8", errors="ignore") for p in sources)
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    dice, size, count = random.Random(seed), 0, 0
    with open(path, "wb") as f:
        while size < mb * 1e6:
            drawn = dice.choices(lines, k=20_000)
            size += f.write("".join(f"{line}  # {count + i}\n" for i, line in enumerate(drawn)).encode())
            count += len(drawn)

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mb", type=float, default=1000, help="size of the text, million bytes")
    parser.add_argument("--tokenizers", nargs="+", default=["bytes", "bpe:8192"])
    parser.add_argument("--dir", help="where the temporary folder is made; needs 5 times the text")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as d:
        text = Path(d)/"text.txt"
        make_text(text, args.mb)
        mb = text.stat().st_size / 1e6
        print(f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {os.cpu_count()} cores, {mb:,.0f} MB")
        columns = ("MB/s", "MB/cpu s", "seconds", "again s", "peak MB", "tokens", "bytes/token")
        print(f"{'tokenizer':<12}" + "".join(f"{c:>15}" for c in columns), flush=True)
        for name in args.tokenizers:
            command = [sys.executable, "-c", CHILD, d, text, name]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            r = json.loads(done.stdout.splitlines()[-1])
            row = (f"{mb / r['wall_s']:.1f}", f"{mb / r['cpu_s']:.1f}", f"{r['wall_s']:.1f}",
                   f"{r['again_s']:.2f}", f"{r['peak_mb']:.0f}", f"{r['tokens']:,}",
                   f"{r['bytes_per_token']:.2f}")
            print(f"{name:<12}" + "".join(f"{x:>15}" for x in row), flush=True)

if __name__ == "__main__": main()
