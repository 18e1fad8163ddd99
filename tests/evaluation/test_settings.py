"""Every wrong key of an evaluation is named in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llamafactory_sekd.errors import EvaluationError
from llamafactory_sekd.evaluation.evaluation_settings import Decoding, parse_settings


def valid() -> dict[str, Any]:
    return {
        "task": "wmt22",
        "directions": ["en-de", "de-en"],
        "systems": {"sekd": {"model_name_or_path": "saves/sekd"}, "online": {"hypotheses": "online"}},
        "save_dir": "results",
    }


def test_absent_and_null_keys_take_their_defaults() -> None:
    settings = parse_settings({**valid(), "baseline": None, "num_beams": None}, "x.yaml")
    assert settings.task_dir == Path("data/alma")
    assert settings.template == "parrot"
    assert settings.baseline is None
    assert settings.metrics == ("bleu", "chrf", "comet")
    assert settings.decoding == Decoding(backend="hf", num_beams=1, max_new_tokens=256)


def test_the_keys_of_a_system_reach_the_host_as_they_are() -> None:
    config = valid()
    config["systems"]["sekd"] |= {"adapter_name_or_path": "a,b", "quantization_bit": 4, "template": "alpaca"}
    system = parse_settings(config, "x.yaml").systems[0]
    assert system.model == {
        "model_name_or_path": "saves/sekd",
        "adapter_name_or_path": "a,b",
        "quantization_bit": 4,
        "template": "alpaca",
    }


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        (["comet", "bleu"], (("bleu", "comet"), set())),
        (["bleu", "comet?"], (("bleu", "comet"), {"comet"})),
        (["spbleu?", "ter", "chrf++"], (("chrf++", "spbleu", "ter"), {"spbleu"})),
        (["chrf"], (("chrf",), set())),
    ],
)
def test_a_question_mark_makes_comet_optional(metrics: list[str], expected: tuple[Any, bool]) -> None:
    settings = parse_settings({**valid(), "metrics": metrics}, "x.yaml")
    assert (settings.metrics, settings.optional) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_beam": 4}, "x.yaml: unknown key 'num_beam': did you mean 'num_beams'?"),
        ({"n_shot": 5}, "x.yaml: unknown key 'n_shot': use one of task, directions,"),
        ({"task": None}, "x.yaml: the key `task` is missing."),
        ({"save_dir": 3}, "`save_dir` must be text, not 3."),
        ({"directions": "en-de"}, "`directions` must be a list such as [en-de, de-en], not 'en-de'."),
        ({"directions": ["en-xx"]}, "`directions`: Unknown direction 'en-xx'"),
        ({"directions": ["ende"]}, "`directions`: Unknown direction 'ende'"),
        ({"directions": ["en-de", "en-de"]}, "`directions` names 'en-de' twice."),
        ({"metrics": ["bleu", "meteor"]}, "`metrics`: unknown metric 'meteor'"),
        ({"metrics": ["metricx"]}, "`metricx` must name its model, such as google/metricx-24"),
        ({"comet": ["a/x", "b/x"]}, "`comet`: a/x and b/x have the same name"),
        ({"comet": ["a/x"], "comet_model": "a/y"}, "`comet` and `comet_model` are the same"),
        ({"bleu_tokenizer": "words"}, "`bleu_tokenizer` must be one of none, zh, 13a,"),
        ({"significance": "t-test"}, "`significance` must be paired_bs or paired_ar, not 't-test'."),
        ({"prompt": "Translate"}, "`prompt`: The prompt 'Translate' needs {source} exactly once"),
        ({"prompt": "{source} {lang}"}, "`prompt`: Unknown field {lang}"),
        ({"document": "yes"}, "`document` must be true, false, or a number of sentences, not 'yes'."),
        ({"document": 1}, "`document` must be true, false, or a number of sentences, not 1."),
        ({"enable_thinking": "no"}, "`enable_thinking` must be true or false, not 'no'."),
        ({"examples": {"from": "x"}}, "`examples` must be like {from: FOLDER, number: 3, choose: nearest}"),
        ({"examples": {"from": "x", "number": 0}}, "`examples.number` must be an integer of at least 1, not 0."),
        ({"examples": {"from": "x", "numbers": 3}}, "`examples.numbers` is unknown: did you mean 'number'?"),
        ({"language_names": ["nds"]}, "`language_names` must map codes to names"),
        ({"metrics": ["comet", "comet?"]}, "`metrics` names comet twice."),
        ({"metrics": ["bleu?"]}, "`metrics`: unknown metric 'bleu?'"),
        ({"num_beams": 0}, "`num_beams` must be an integer of at least 1, not 0."),
        ({"num_beams": True}, "`num_beams` must be an integer of at least 1, not True."),
        ({"batch_size": "8"}, "`batch_size` must be an integer of at least 1, not '8'."),
        ({"length_penalty": "long"}, "`length_penalty` must be a number, not 'long'."),
        ({"repetition_penalty": 0}, "`repetition_penalty` must be a number above 0, not 0."),
        ({"backend": "sglang"}, "`backend` must be hf or vllm, not 'sglang'."),
        ({"backend": "vllm", "num_beams": 4}, "`num_beams` must be 1, not 4."),
        ({"baseline": "sft"}, "`baseline` is 'sft', which is not among the systems: sekd, online."),
        ({"teacher": "big"}, "`teacher` is 'big', which is not among the systems: sekd, online."),
        ({"systems": {}}, "`systems` must map at least one name to its model or its hypotheses, not {}."),
        ({"systems": {"a": None}}, "`systems.a` must hold `model_name_or_path` or `hypotheses`, not None."),
        (
            {"systems": {"a": {"modle_name_or_path": "m"}}},
            "`systems.a`: unknown key 'modle_name_or_path': did you mean 'model_name_or_path'?",
        ),
        ({"systems": {"a": {"hypothesis": "h"}}}, "`systems.a`: unknown key 'hypothesis': did you mean 'hypotheses'?"),
        ({"systems": {"a": {}}}, "`systems.a` needs either `model_name_or_path` or `hypotheses`."),
        ({"systems": {"a": {"model_name_or_path": "m", "hypotheses": "h"}}}, "`systems.a` needs either"),
        ({"systems": {"a": {"hypotheses": "h", "infer_dtype": "float32"}}}, "`infer_dtype` has no place next to"),
        ({"systems": {"a": {"model_name_or_path": "m", "num_beams": 4}}}, "`num_beams` applies to all systems"),
        ({"systems": {"../a": {"hypotheses": "h"}}}, "`systems`: '../a' cannot be a name"),
    ],
)
def test_a_key_that_cannot_work_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(EvaluationError) as caught:
        parse_settings({**valid(), **changes}, "x.yaml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_example_is_valid() -> None:
    from omegaconf import OmegaConf

    path = Path(__file__).parents[2] / "examples" / "yamls" / "eval_wmt22.yaml"
    config = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(config, dict)
    settings = parse_settings({str(key): value for key, value in config.items()}, path.name)
    assert [system.name for system in settings.systems] == ["student_sft", "forward_kl", "sekd", "teacher"]
    assert not settings.optional
