"""Keys, shards and indices: what is written is read, once per key, and any change on disk is noticed."""

from __future__ import annotations

import pickle
import resource

import pytest
import torch

from llamafactory_sekd.errors import TeacherError
from llamafactory_sekd.teacher.cache.record_store import (
    ShardReader,
    ShardWriter,
    damaged_shards,
    drop_shards,
    listed_shards,
    read_json,
    write_json,
)
from llamafactory_sekd.teacher.cache.segments import segments


def example(ids, labels, **more):
    return {"input_ids": list(ids), "labels": list(labels), "attention_mask": [1] * len(ids), **more}


def keys(*examples):
    return [segment.key() for item in examples for segment in segments(item)]


FIRST = example([5, 6, 7, 8], [-100, -100, 7, 8])
SECOND = example([5, 9, 3], [-100, 9, 3])


def packed(*examples, pad=2, separate=True):
    together = {"input_ids": [], "labels": [], "attention_mask": [], "position_ids": []}
    for number, item in enumerate(examples, 1):
        together["input_ids"] += item["input_ids"]
        together["labels"] += item["labels"]
        together["attention_mask"] += [number if separate else 1] * len(item["input_ids"])
        together["position_ids"] += range(len(item["input_ids"]))
    together["input_ids"] += [0] * pad
    together["labels"] += [-100] * pad
    together["attention_mask"] += [0 if separate else 1] * pad
    together["position_ids"] += [0] * pad
    return together


def test_a_key_depends_on_ids_and_response_positions_and_on_nothing_else():
    assert keys(FIRST) == keys({**FIRST, "images": None})
    assert keys(FIRST) != keys(example([5, 6, 7, 9], [-100, -100, 7, 9]))
    assert keys(FIRST) != keys(example([5, 6, 7, 8], [-100, -100, -100, 8]))
    assert keys(FIRST) != keys(example([5, 6, 7, 8, 0], [-100, -100, 7, 8, -100]))


def test_examples_packed_apart_have_the_keys_of_unpacked_ones_and_packed_together_their_own():
    assert keys(packed(FIRST, SECOND)) == keys(FIRST, SECOND)
    assert keys(packed(SECOND, FIRST, pad=0)) == keys(SECOND, FIRST)
    (together,) = keys(packed(FIRST, SECOND, separate=False))
    (other_order,) = keys(packed(SECOND, FIRST, separate=False))
    assert len({together, other_order, *keys(FIRST, SECOND)}) == 4


def test_rows_of_the_segments_are_the_rows_of_the_sequence_in_order():
    with_prompt = [example(item["input_ids"], item["input_ids"]) for item in (FIRST, SECOND)]
    for item in (packed(FIRST, SECOND), packed(*with_prompt)):
        labels = torch.tensor(item["labels"])
        assert sum(part.tokens for part in segments(item)) == int((labels[1:] != -100).sum())


def test_examples_without_a_response_have_no_key_and_pictures_are_refused():
    assert segments(example([1, 2], [-100, -100])) == []
    assert segments(example([], [])) == []
    with pytest.raises(TeacherError, match=r"text alone.*images"):
        segments({**FIRST, "images": ["cat.png"]})


def record(tokens, value, dtype=torch.bfloat16):
    return {"hidden": torch.full((tokens, 3), value, dtype=dtype), "tail": torch.arange(tokens).float() + value}


def assert_record(found, tokens, value):
    expected = record(tokens, value)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == values.dtype
        torch.testing.assert_close(found[name], values, rtol=0, atol=0)


def test_what_two_ranks_wrote_in_several_shards_is_read_by_key(tmp_path):
    for rank in (0, 1):
        writer = ShardWriter(tmp_path, rank, shard_bytes=60)
        for number in range(7):
            writer.add((number - 3, rank), record(number + 1, float(number + 10 * rank)))
        writer.flush()

    reader = ShardReader(tmp_path)
    assert len(reader) == 14
    assert len(listed_shards(tmp_path)) > 4
    assert damaged_shards(tmp_path) == {}
    for reading in (reader, pickle.loads(pickle.dumps(reader))):
        for rank in (0, 1):
            for number in range(7):
                assert_record(reading.read((number - 3, rank)), number + 1, float(number + 10 * rank))

    assert reader.read((0, 7)) is None
    assert (99, 0) not in reader


def test_a_reader_sees_what_is_listed_later_and_nothing_before_it_is_listed(tmp_path):
    writer = ShardWriter(tmp_path, 0)
    writer.add((1, 1), record(2, 1.0))
    reader = ShardReader(tmp_path)
    assert (1, 1) not in reader
    assert (1, 1) in writer
    assert not reader.refresh()
    assert writer.flush()
    assert not writer.flush()
    assert reader.refresh()
    assert_record(reader.read((1, 1)), 2, 1.0)


def test_time_alone_makes_a_shard_due(tmp_path):
    writer = ShardWriter(tmp_path, 0, shard_seconds=0.0)
    writer.add((1, 1), record(2, 1.0))
    assert (1, 1) in ShardReader(tmp_path)


@pytest.fixture
def cache(tmp_path):
    writer = ShardWriter(tmp_path, 0, shard_bytes=1)
    for number in range(3):
        writer.add((number, 0), record(4, float(number)))
    return tmp_path


@pytest.mark.parametrize("where", [9, 150, -1])
def test_a_flipped_bit_anywhere_in_a_shard_is_found_and_the_shard_can_be_dropped(cache, where):
    path = cache / "shard-00000-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)
    assert damaged_shards(cache) == {path.name: f"{path} does not match its checksum"}

    drop_shards(cache, {path.name})
    reader = ShardReader(cache)
    assert ((0, 0) in reader, (1, 0) in reader, (2, 0) in reader) == (True, False, True)
    ShardWriter(cache, 0, shard_bytes=1).add((1, 0), record(4, 1.0))
    assert reader.refresh()
    assert_record(reader.read((1, 0)), 4, 1.0)
    assert damaged_shards(cache) == {}


def test_truncated_and_missing_shards_are_found(cache):
    first, second, _ = sorted(cache.glob("shard-*"))
    first.write_bytes(first.read_bytes()[:-1])
    second.unlink()
    found = damaged_shards(cache)
    assert f"bytes instead of {listed_shards(cache)[0]['bytes']:,}" in found[first.name]
    assert found[second.name].endswith("is missing")


@pytest.mark.parametrize("old", ['"tokens": 4', '"xxh3": "', "{"])
def test_a_changed_index_is_damaged_not_believed(cache, old):
    path = cache / "index-00000.json"
    path.write_text(path.read_text().replace(old, old[:-1] + "7", 1))
    with pytest.raises(TeacherError, match=r"index-00000.json is damaged: delete it and run `sekd cache` again"):
        listed_shards(cache)


def test_json_is_read_as_it_was_written(tmp_path):
    content = {"a": [1, 2.5, None], "ü": "ß"}
    write_json(tmp_path / "x.json", content)
    assert read_json(tmp_path / "x.json") == content


def test_a_full_disk_is_an_error_with_a_remedy_and_leaves_the_cache_complete(cache):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = ShardWriter(cache, 0, shard_bytes=1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(TeacherError, match=r"Cannot write .*: make room there and run the same command again"):
            writer.add((9, 9), record(4000, 1.0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    assert damaged_shards(cache) == {}
    assert (9, 9) not in ShardReader(cache)
    writer.flush()  # with room again, what waited is written
    assert_record(ShardReader(cache).read((9, 9)), 4000, 1.0)
