"""Speed and memory of ``sekd data pairs`` at growing sizes, on one core: pairs per second and peak memory.

Each size is one run of the real command in a process of its own. The text is made: sentences of 4 to 28 words from a
fixed vocabulary, one pair in fifty with something to report. Seconds are those of the
processor, which other work on the machine does not lengthen.

    python benchmarks/data.py --pairs 1000000 10000000
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path


_VARIANTS: dict[str, list[str]] = {
    "plain text": [],
    "with --valid 2000 --test 2000": ["--valid", "2000", "--test", "2000"],
}


def main() -> None:
    """Print one row per size and variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--folder", type=Path, help="where the corpora go [default: a temporary folder]")
    options = parser.parse_args()

    print(f"| {'pairs':>12} | {'variant':<30} | pairs/s | seconds | peak memory |\n|---:|---|---:|---:|---:|")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for count in options.pairs:
            source, target = write_corpus(Path(folder), count)
            for variant, keys in _VARIANTS.items():
                rate, seconds, memory = measure(source, target, Path(folder) / "out", keys, count)
                print(f"| {count:>12,} | {variant:<30} | {rate:>7} | {seconds:>7} | {memory:>11} |", flush=True)


def write_corpus(folder: Path, count: int) -> tuple[Path, Path]:
    """Write two files of made-up sentences."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyzäöüß", k=draw.randint(2, 12))) for _ in range(20_000)]
    parts = [" ".join(draw.choices(words, k=draw.randint(2, 14))) for _ in range(400_000)]
    paths = folder / "corpus.en", folder / "corpus.de"
    with open(paths[0], "w", encoding="utf-8") as source, open(paths[1], "w", encoding="utf-8") as target:
        for number in range(count):
            first, second = draw.choices(parts, k=2)
            source.write(f"{first.capitalize()} {second}.{' ' * (number % 50 == 0)}\n")
            target.write(f"{second.capitalize()} {first}.\n")
    return paths


def measure(source: Path, target: Path, out: Path, keys: list[str], count: int) -> tuple[str, str, str]:
    """Run the command and return pairs per second, seconds, and the peak of its memory."""
    command = [sys.executable, "-m", "llamafactory_sekd.cli", "data", "pairs", "--src", str(source)]
    command += ["--tgt", str(target), "--from", "en", "--to", "de", "--name", "made", "--out", str(out), "--overwrite"]
    child = subprocess.Popen([*command, *keys], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    seconds = usage.ru_utime + usage.ru_stime
    if status:
        raise SystemExit(f"{' '.join(command)} has ended with {status}")
    return f"{count / seconds:,.0f}", f"{seconds:.1f}", f"{usage.ru_maxrss / 1000:,.0f} MB"


if __name__ == "__main__":
    main()
