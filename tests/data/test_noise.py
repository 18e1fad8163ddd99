"""Wrong references that are made: as many as asked for, of the kind asked for, and it is known which."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamafactory_sekd.data.noise import KINDS, spoil
from llamafactory_sekd.errors import DataError


PAIRS = [(f"source {n} of these", f"target {n} of those things here") for n in range(50)]
FOREIGN = {source: f"foreign {source}" for source, _ in PAIRS}


@settings(deadline=None)
@given(st.sampled_from(list(KINDS)), st.floats(0, 1), st.integers(0, 5))
def test_the_share_is_exact_and_just_those_that_are_named_are_wrong(kind, share, seed):
    spoiled, wrong = spoil(PAIRS, share, kind, seed, FOREIGN)
    assert sum(wrong) == round(share * len(PAIRS))
    assert [source for source, _ in spoiled] == [source for source, _ in PAIRS]
    differs = [now != before for now, before in zip(spoiled, PAIRS, strict=True)]
    if round(share * len(PAIRS)) != 1 or kind != "exchanged":  # one alone has nothing to exchange with
        assert differs == wrong
    assert spoil(PAIRS, share, kind, seed, FOREIGN) == (spoiled, wrong)


def test_each_kind_does_what_it_says():
    found = {kind: spoil(PAIRS, 0.4, kind, 1, FOREIGN) for kind in KINDS}
    wrong_ones = {
        kind: [(index, pair) for index, (pair, is_wrong) in enumerate(zip(spoiled, wrong, strict=True)) if is_wrong]
        for kind, (spoiled, wrong) in found.items()
    }
    assert sorted(target for _, target in found["exchanged"][0]) == sorted(target for _, target in PAIRS)
    assert all(target == PAIRS[(index + 1) % 50][1] for index, (_, target) in wrong_ones["shifted"])
    assert all(target == source for _, (source, target) in wrong_ones["copied"])
    assert all(target == " ".join(PAIRS[index][1].split()[:2]) for index, (_, target) in wrong_ones["cut"])
    assert all(target == FOREIGN[source] for _, (source, target) in wrong_ones["wrong_language"])


def test_another_seed_spoils_other_pairs():
    assert spoil(PAIRS, 0.4, "exchanged", 1)[1] != spoil(PAIRS, 0.4, "exchanged", 2)[1]


def test_what_cannot_be_spoiled_is_refused():
    with pytest.raises(DataError, match=r"^'random' is no kind of noise: use one of exchanged, shifted, copied, "):
        spoil(PAIRS, 0.4, "random", 1)
    with pytest.raises(DataError, match=r"^20 of 50 pairs cannot be wrong_language: only 0 can\.$"):
        spoil(PAIRS, 0.4, "wrong_language", 1)
