"""Whatever text the records hold, a run trains on it with finite numbers, or names the data set that holds nothing."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.runs import base_config, logged, train, weights
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from llamafactory_sekd.errors import DataError


TEXT = st.one_of(
    st.text(max_size=40),  # any Unicode but lone surrogates, which JSON files in UTF-8 cannot hold
    st.sampled_from(
        ["", " ", "\n", "</s>", "<s><pad></s>", "### Response:", "\x00", "e\u0301", "🙂" * 60, "a " * 400]
    ),
)
RECORD = st.fixed_dictionaries({"instruction": TEXT, "input": TEXT, "output": TEXT})
RECORDS = st.lists(RECORD, min_size=1, max_size=14)


@settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@example(records=[], batch_size=1, packing=False)
@example(records=[{"instruction": "a", "input": "b", "output": " \n"}] * 3, batch_size=2, packing=True)
@given(records=RECORDS, batch_size=st.integers(1, 4), packing=st.booleans())
def test_any_text_trains_or_is_named(tiny_root, tmp_path_factory, records, batch_size, packing):
    directory = tmp_path_factory.mktemp("records")
    (directory / "fuzz.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    (directory / "dataset_info.json").write_text(json.dumps({"fuzz": {"file_name": "fuzz.json"}}))
    config = base_config(
        tiny_root,
        output_dir=str(directory / "out"),
        dataset="fuzz",
        dataset_dir=str(directory),
        per_device_train_batch_size=batch_size,
        neat_packing=packing,
        max_steps=6,  # as many records as there may be, in most cases
        kd_max_cut=1.0,  # 60 emojis are 420 tokens
    )
    if not records:
        with pytest.raises(DataError, match="fuzz"):
            train(config)
        return
    if not any(record["output"].strip() for record in records):
        with pytest.raises(DataError, match=rf"None of the {len(records)} examples has text in its response"):
            train(config)
        return

    train(config)
    assert all(loss == loss for loss in logged(directory / "out", "loss"))
    assert all(value.isfinite().all() for value in weights(directory / "out").values())
    assert torch.isfinite(torch.tensor(logged(directory / "out", "grad_norm"))).all()
