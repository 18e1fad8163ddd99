"""An evaluation that generates has no loss: said, and refused where the best model is chosen by it."""

from __future__ import annotations

import pytest
from helpers.runs import base_config, logged, train
from llamafactory.hparams import get_train_args

from llamafactory_sekd.errors import ArgumentError


EVALUATION = {
    "do_eval": True,
    "eval_dataset": "tiny_valid",
    "eval_strategy": "steps",
    "eval_steps": 2,
    "max_steps": 2,
    "max_new_tokens": 4,
}


def test_metrics_that_a_generating_evaluation_lacks_are_told(tiny_root, tmp_path, said):
    pytest.importorskip("jieba")
    train(base_config(tiny_root, output_dir=str(tmp_path / "out"), predict_with_generate=True, **EVALUATION))
    assert not logged(tmp_path / "out", "eval_kd/ce")
    assert "There is no `eval_loss` and no `eval_kd/…`" in said.text


@pytest.mark.parametrize("metric", [None, "eval_loss", "kd/ce", "eval_kd/ce"])
def test_choosing_the_best_model_by_them_is_refused(tiny_root, tmp_path, metric):
    keys = {**EVALUATION, "save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True}
    keys["metric_for_best_model"] = metric
    config = base_config(tiny_root, output_dir=str(tmp_path / "out"), predict_with_generate=True, **keys)
    with pytest.raises(ArgumentError, match=r"`metric_for_best_model: .*` does not exist with `predict_with_generate"):
        get_train_args(config)


def test_the_best_model_can_be_chosen_by_the_teachers_metrics(tiny_root, tmp_path):
    keys = {**EVALUATION, "save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True}
    train(base_config(tiny_root, output_dir=str(tmp_path / "out"), metric_for_best_model="kd/ce", **keys))
    assert logged(tmp_path / "out", "eval_kd/ce")
