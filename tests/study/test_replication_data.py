"""The replication's parts: near-duplicates stay together, nothing that is held out is trained on."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamafactory_sekd.demo.data import clusters


FILE = Path(__file__).parents[2] / "examples" / "studies" / "replication" / "prepare.py"


@pytest.fixture(scope="module")
def prepare():
    spec = importlib.util.spec_from_file_location("replication_prepare", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def similar(first: str, second: str) -> bool:
    a, b = set(first.split()), set(second.split())
    return 10 * len(a & b) >= 6 * len(a | b)


def naive_clusters(texts: list[str]) -> list[list[int]]:
    """Grow each group until nothing similar is left outside."""
    left, groups = set(range(len(texts))), []
    while left:
        group, front = set(), {min(left)}
        while front:
            group |= front
            front = {i for i in left - group if any(similar(texts[i], texts[j]) for j in front)}
        left -= group
        groups.append(sorted(group))
    return sorted(groups)


@settings(deadline=None)  # the first call imports networkx
@given(st.lists(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=7).map(" ".join), max_size=25))
def test_clusters_are_the_connected_groups_of_similar_strings(texts):
    assert clusters(texts) == naive_clusters(texts)


def test_parts_share_no_near_duplicates_and_only_large_clusters_lose_nothing(prepare, monkeypatch):
    monkeypatch.setattr(prepare, "TEST_SIZE", 20)
    monkeypatch.setattr(prepare, "VALID_SIZE", 10)
    words = [f"w{i}" for i in range(40)]
    pairs = [(" ".join(words[i : i + n]), f"{i} {n}") for i, n in itertools.product(range(0, 40, 5), (1, 2, 4, 5))]
    pairs += [(f"one{i} two{i} three{i} four{i}", f"x{i}") for i in range(60)]

    parts = prepare.split(pairs)

    assert {name: len(part) for name, part in parts.items() if name in ("test", "valid")} == {"test": 20, "valid": 10}
    assert all(parts.values())
    for first, second in itertools.combinations(parts, 2):
        assert not [(a, b) for a, _ in parts[first] for b, _ in parts[second] if similar(a, b)]
    assert not [(a, b) for (a, _), (b, _) in itertools.combinations(parts["test"], 2) if similar(a, b)]
    assert parts == prepare.split(pairs)
