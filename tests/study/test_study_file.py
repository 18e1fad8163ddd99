"""From a study file to its cells: what is refused, in one line, and what the matrix becomes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import hypothesis
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llamafactory_sekd.errors import StudyError
from llamafactory_sekd.study.jobs import difference, model_of, read_evaluation
from llamafactory_sekd.study.matrix import cell_id, check_keys, expand, has_effect, slug
from llamafactory_sekd.study.running import environments, parse_devices
from llamafactory_sekd.study.spec import parse_spec, read_spec


TRAIN = {
    "stage": "sekd",
    "do_train": True,
    "finetuning_type": "full",
    "model_name_or_path": "student",
    "teacher_model": "teacher",
    "kd_loss": "self_evolution",
    "learning_rate": 1e-3,
    "overwrite_output_dir": True,
    "report_to": "wandb",
}
EVALUATION = {"task": "wmt22", "directions": ["en-de"], "systems": {"a": {"model_name_or_path": "b"}}, "save_dir": "c"}


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("train.yaml").write_text(yaml.safe_dump(TRAIN))
    Path("sft.yaml").write_text(yaml.safe_dump({**TRAIN, "stage": "sft", "teacher_model": None, "kd_loss": None}))
    Path("eval.yaml").write_text(yaml.safe_dump(EVALUATION))


def study(**keys):
    base = {"output_dir": "out", "train": "train.yaml", "evaluation": "eval.yaml", "systems": {"A": {}}}
    return {key: value for key, value in {**base, **keys}.items() if value is not None}


def cells(**keys):
    return expand(parse_spec(study(**keys), Path("study.yaml")))


def test_the_seed_may_name_the_data_and_the_start_and_the_points_stay_the_same():
    found = cells(
        overrides={"model_name_or_path": "start_{seed}"},
        matrix={"dataset": ["clean", "noisy_{seed}"]},
        seeds=[1, 2],
    )
    assert [(cell.axes["dataset"], cell.config["dataset"]) for cell in found] == [
        ("clean", "clean"),
        ("clean", "clean"),
        ("noisy_{seed}", "noisy_1"),
        ("noisy_{seed}", "noisy_2"),
    ]
    assert [cell.config["model_name_or_path"] for cell in found] == ["start_1", "start_2"] * 2
    assert len({cell.id for cell in found}) == 4


def test_a_cell_is_a_system_at_a_point_with_a_seed_and_its_train_yaml_is_complete():
    found = cells(
        systems={"Forward KD": {"kd_loss": "forward_kl"}, "SKEW": {"kd_loss": "skew", "learning_rate": 0.5}},
        overrides={"max_steps": 7},
        matrix={"kd_lambda": [0.25, 1.0], "warmup_ratio": [None, 0.1]},
        seeds=[42, 1],
    )
    assert [cell.id for cell in found[:3]] == [
        "forward_kd-kd_lambda=0.25-warmup_ratio=none-seed=42",
        "forward_kd-kd_lambda=0.25-warmup_ratio=none-seed=1",
        "forward_kd-kd_lambda=0.25-warmup_ratio=0.1-seed=42",
    ]
    assert len(found) == 16
    last = found[-1]
    assert (last.system, last.axes, last.seed) == ("SKEW", {"kd_lambda": 1.0, "warmup_ratio": 0.1}, 1)
    assert last.folder == Path("out/cells/skew-kd_lambda=1.0-warmup_ratio=0.1-seed=1")
    assert last.config == {
        **TRAIN,
        **{"kd_loss": "skew", "learning_rate": 0.5, "max_steps": 7, "kd_lambda": 1.0, "warmup_ratio": 0.1, "seed": 1},
        **{"output_dir": f"{last.folder}/model", "overwrite_output_dir": False, "report_to": "none"},
    }
    assert "warmup_ratio" not in found[0].config  # null takes a key away


def test_a_key_of_the_matrix_without_effect_on_a_system_gives_it_one_point():
    found = cells(
        systems={"SFT": {"train": "sft.yaml"}, "Forward KD": {"kd_loss": "forward_kl"}, "Ours": {}},
        matrix={"kd_gamma": [0.1, 0.2, 0.3], "learning_rate": [0.1, 0.2]},
        overrides={"kd_lambda": 0.7},
    )
    by_system = {system: [cell for cell in found if cell.system == system] for system in ("SFT", "Forward KD", "Ours")}
    assert {system: len(group) for system, group in by_system.items()} == {"SFT": 2, "Forward KD": 2, "Ours": 6}
    assert by_system["SFT"][0].axes == {"learning_rate": 0.1}
    assert not [key for key in by_system["SFT"][0].config if key.startswith(("kd_", "teacher_"))]
    assert by_system["Forward KD"][0].config["kd_lambda"] == 0.7


def test_the_objective_may_be_a_key_of_the_matrix_and_decides_which_others_matter():
    found = cells(matrix={"kd_loss": ["forward_kl", "skew"], "kd_beta": [0.1, 0.9], "kd_beta_end": [None, 1.0]})
    assert [dict(cell.axes) for cell in found] == [
        {"kd_loss": "forward_kl"},
        *({"kd_loss": "skew", "kd_beta": beta, "kd_beta_end": end} for beta in (0.1, 0.9) for end in (None, 1.0)),
    ]


@pytest.mark.parametrize(
    ("key", "config", "effect"),
    [
        ("learning_rate", {"stage": "sft"}, True),
        ("kd_lambda", {"stage": "sft"}, False),
        ("kd_lambda", {}, False),
        ("kd_gamma", {"stage": "sekd"}, True),
        ("kd_gamma", {"stage": "sekd", "kd_loss": "skew"}, False),
        ("kd_temperature", {"stage": "sekd", "kd_loss": "skew"}, True),
        ("teacher_model", {"stage": "sekd", "kd_loss": "reverse_kl"}, True),
        ("kd_gamma", {"stage": "sekd", "kd_loss": "mistyped"}, True),
    ],
)
def test_which_keys_say_anything_to_a_run(key, config, effect):
    assert has_effect(key, config) is effect


VALUES = st.lists(st.integers(0, 9) | st.sampled_from(["a", "b/c", "d e"]), min_size=1, max_size=3, unique=True)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.sampled_from(["alpha", "beta", "gamma"]), VALUES), st.sets(st.integers(0, 99), min_size=1))
def test_the_matrix_is_the_cartesian_product_and_every_cell_has_a_folder_of_its_own(matrix, seeds):
    found = cells(matrix=matrix, seeds=sorted(seeds), systems={"A": {}, "B": {"delta": 1}})
    expected = 2 * len(seeds)
    for values in matrix.values():
        expected *= len(values)
    assert len({cell.id for cell in found}) == len(found) == expected
    points = {(cell.system, *cell.axes.items(), cell.seed) for cell in found}
    assert points == {
        (system, *zip(matrix, values, strict=True), seed)
        for system in ("A", "B")
        for values in itertools.product(*matrix.values())
        for seed in seeds
    }
    for cell in found:
        assert "/" not in cell.id
        assert " " not in cell.id
        assert all(cell.config[key] == value for key, value in cell.axes.items())


@settings(max_examples=100, deadline=None)
@given(st.text(min_size=1, max_size=300), st.floats(allow_nan=False), st.booleans())
def test_an_id_is_a_name_that_a_file_system_takes_and_stays_the_same(name, number, flag):
    try:
        first = cell_id(name, {"x": number, "y": flag, "z": name}, 3)
    except StudyError:
        assert not any(character.isalnum() for character in name)
        return
    assert first == cell_id(name, {"x": number, "y": flag, "z": name}, 3)
    assert len(first.encode()) <= 200
    assert not {"/", "\0", "\n", " "} & set(first)
    assert first.endswith("-seed=3")
    assert not first.startswith((".", "-"))


def test_long_ids_are_cut_and_stay_apart():
    one, two = (cell_id("a", {"key": "x" * 300 + end}, 1) for end in "12")
    assert one != two


def test_names_that_would_share_a_folder_are_refused():
    with pytest.raises(StudyError, match="Two cells would share the folder out/cells/a_b-seed=42"):
        cells(systems={"A b": {}, "a/B": {}})


def test_a_teachers_cache_takes_the_teachers_place_in_what_is_trained():
    (cell,) = cells(teacher_cache="cache", overrides={"teacher_model_adapters": "adapter"})
    assert cell.config["teacher_cache"] == "cache"
    assert not {"teacher_model", "teacher_model_adapters"} & set(cell.config)
    assert cell.source["teacher_model"] == "teacher"
    (sft,) = cells(teacher_cache="cache", systems={"SFT": {"train": "sft.yaml"}})
    assert "teacher_cache" not in sft.config
    (own,) = cells(teacher_cache="cache", systems={"Own text": {"kd_on_policy": 0.5}})
    assert "teacher_cache" not in own.config
    assert own.config["teacher_model"] == own.source["teacher_model"]
    assert [each.reads_cache for each in (cell, sft, own)] == [True, False, False]


def test_adapters_are_evaluated_on_their_base():
    (cell,) = cells(overrides={"finetuning_type": "lora", "template": "parrot"})
    assert model_of(cell) == {
        "model_name_or_path": "student",
        "adapter_name_or_path": str(cell.model),
        "template": "parrot",
    }
    (full,) = cells()
    assert model_of(full) == {"model_name_or_path": str(full.model)}


def test_bases_come_first_and_the_command_line_last():
    Path("a.yaml").write_text(yaml.safe_dump(study(seeds=[1], systems={"A": {"x": 1}, "B": {}}, matrix={"y": [1]})))
    Path("b.yaml").write_text(yaml.safe_dump({"seeds": [2, 3], "systems": {"A": {"z": 2}}}))
    child = {"base": ["a.yaml", "b.yaml"], "systems": {"B": None}, "output_dir": "other"}
    Path("c.yaml").write_text(yaml.safe_dump(child))
    spec = read_spec(Path("c.yaml"), ["matrix.y=[4,5]", "systems.A.w=6"])
    assert spec.systems == {"A": {"x": 1, "z": 2, "w": 6}}
    assert (spec.seeds, spec.matrix, spec.output_dir) == ((2, 3), {"y": [4, 5]}, Path("other"))
    assert spec.name == "c"
    assert spec.effective["output_dir"] == "other"
    assert "base" not in spec.effective


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"sytems": {}}, "unknown key 'sytems': did you mean 'systems'?"),
        ({"train": None}, "the key `train` is missing."),
        ({"systems": {}}, "`systems` must name at least one system."),
        ({"systems": {"A": 3}}, "`systems.A` must hold keys and values ({} for none), not 3."),
        ({"systems": {"A": {"seed": 1}}}, "`systems.A.seed` cannot be set: use `seeds`."),
        (
            {"overrides": {"output_dir": "x"}},
            "`overrides.output_dir` cannot be set: the study sets it for every cell.",
        ),
        ({"models": {"A": {"model_name_or_path": "x"}}}, "`models.A` has the name of a system"),
        ({"models": {"T": {}}}, "`models.T` needs `model_name_or_path`"),
        ({"matrix": {"x": 3}}, "`matrix.x` must be a list of values, not 3."),
        ({"matrix": {"x": []}}, "`matrix.x` must be a list of values, not []."),
        ({"matrix": {"x": [1, 2, 1]}}, "`matrix.x` names 1 twice."),
        ({"matrix": {"seed": [1]}}, "`matrix.seed` cannot be set: use `seeds`."),
        ({"matrix": {"train": ["x"]}}, "`matrix.train` cannot be varied"),
        ({"seeds": 3}, "`seeds` must be a list of integers such as [42, 1, 2], not 3."),
        ({"seeds": [1, 1]}, "`seeds` names a seed twice: [1, 1]."),
        ({"seeds": [True]}, "`seeds` must be a list of integers"),
        ({"baseline": "B"}, "`baseline` is 'B', which is not among `systems` and `models`: A."),
        ({"teacher": "A"}, "`teacher` is 'A', which is not among `models`: there are none."),
        ({"select": {"key": "x"}}, "`select.key` is 'x', which is not a key of `matrix`."),
        ({"select": {"metric": "x"}}, "`select` must be {key: …, metric: nll, mode: min}"),
        (
            {"matrix": {"x": [1]}, "select": {"key": "x", "mode": "low"}},
            "`select.mode` must be min or max, not 'low'.",
        ),
        (
            {"matrix": {"x": [1]}, "select": {"key": "x", "metric": "bleu"}},
            "`select.metric: bleu` needs `select.evaluation`, the evaluation YAML of a validation set",
        ),
        (
            {"matrix": {"x": [1]}, "select": {"key": "x", "evaluation": "v.yaml"}},
            "`select.evaluation` has no effect on `metric: nll`: use bleu, chrf, chrf++, spbleu, ter, comet, metricx.",
        ),
        ({"teacher_cache": {"folder": "x", "kind": 1}}, "`teacher_cache.kind` is unknown"),
        (
            {"teacher_cache": {"folder": "x", "formats": 1}},
            "`teacher_cache.formats` is unknown: did you mean 'format'?",
        ),
        ({"teacher_cache": {"folder": "x", "k": 0}}, "`teacher_cache.k` must be an integer of at least 1, not 0."),
        ({"teacher_cache": 3}, "`teacher_cache` must be a folder"),
        ({"prepare": "sekd demo"}, "`prepare` must be a list of commands"),
        ({"output_dir": 3}, "`output_dir` must be text, not 3."),
        ({"train": "nowhere.yaml"}, "nowhere.yaml cannot be read: No such file or directory"),
        ({"systems": {"A": {"kd_loss": "best"}}}, "a-seed=42: `kd_loss: best` is unknown: use one of"),
        ({"matrix": {"kd_lambda": [2]}}, "a-kd_lambda=2-seed=42: `kd_lambda: 2` cannot be used"),
        ({"overrides": {"do_train": False}}, "a-seed=42: `do_train: true` is missing"),
        ({"matrix": {"kd_gama": [1]}}, "a-kd_gama=1-seed=42: unknown key 'kd_gama': did you mean 'kd_gamma'?"),
        ({"overrides": {"teacher_modle": "x"}}, "unknown key 'teacher_modle': did you mean 'teacher_model'?"),
        ({"systems": {"!": {}}}, "`!` has no letter or digit"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(keys, message):
    with pytest.raises(StudyError) as caught:
        cells(**keys)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = [
    "prepare",
    "teacher_cache",
    "overrides",
    "systems",
    "models",
    "matrix",
    "seeds",
    "baseline",
    "teacher",
    "select",
]


@settings(max_examples=300, deadline=None)
@example("systems", {"0\n": False})
@given(st.sampled_from(KEYS), ANYTHING)
def test_any_value_of_any_key_is_taken_or_refused_in_one_line(key, value):
    said = ""
    try:
        cells(**{key: value})
    except StudyError as error:
        said = str(error)
    assert "\n" not in said


PLAIN = st.recursive(  # null and absent are the same to a training YAML
    st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(PLAIN, PLAIN)
def test_ingredients_differ_when_and_only_when_they_are_not_the_same(one, two):
    """Also after they were written down and read again."""
    hypothesis.assume("unknown" not in (one, two))
    assert difference(json.loads(json.dumps(one)), one) is None
    assert (difference({"a": {"b": one}}, {"a": {"b": two}}) is None) == (one == two)
    assert difference({"a": {"b": "unknown"}}, {"a": {"b": two}}) is None


def test_a_key_that_came_or_went_is_a_difference():
    assert difference({}, {"a": "new"}) == 'a was null, now "new"'
    assert difference({"a": {"b": 1, "c": 2}}, {"a": {"b": 1}}) == "a.c was 2, now null"


def test_files_that_are_no_study_are_refused_in_one_line(tmp_path):
    for name, text in {"list.yaml": "[1]", "broken.yaml": "a: [", "self.yaml": "base: self.yaml"}.items():
        Path(name).write_text(text)
        with pytest.raises(StudyError, match=name) as caught:
            read_spec(Path(name))
        assert "\n" not in str(caught.value)
    Path("study.yaml").write_text(yaml.safe_dump(study()))
    with pytest.raises(StudyError, match="'x' is not an override: write key=value"):
        read_spec(Path("study.yaml"), ["x"])
    with pytest.raises(StudyError, match=r"the override 'seeds=\[a_\{seed\}\]' cannot be read") as caught:
        read_spec(Path("study.yaml"), ["seeds=[a_{seed}]"])
    assert "\n" not in str(caught.value)


def test_an_evaluation_keeps_what_all_models_share():
    Path("eval.yaml").write_text(yaml.safe_dump({**EVALUATION, "baseline": "a", "num_beams": 2}))
    assert read_evaluation(Path("eval.yaml")) == {"task": "wmt22", "directions": ["en-de"], "num_beams": 2}


def test_every_key_of_every_cell_is_one_that_the_host_reads():
    check_keys(cells(), TRAIN | {"output_dir": "", "seed": 0})
    for keys, message in (
        (
            {"systems": {"A": {"learning_rat": 1}}},
            "a-seed=42: unknown key 'learning_rat': did you mean 'learning_rate'?",
        ),
        ({"matrix": {"xyzzy": [1]}}, "a-xyzzy=1-seed=42: unknown key 'xyzzy'"),
    ):
        with pytest.raises(StudyError) as caught:
            check_keys(cells(**keys), TRAIN | {"output_dir": "", "seed": 0})
        assert str(caught.value).startswith(message)


def test_slugs():
    assert slug("Self-Evolution KD w/ topK") == "self_evolution_kd_w_topk"
    assert slug("SKEW KD (Teacher)") == "skew_kd_teacher"


def test_devices_are_shared_out_and_cores_too(monkeypatch):
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(6)))

    def visible(jobs, text):
        return [each.get("CUDA_VISIBLE_DEVICES") for each in environments(jobs, parse_devices(text))]

    assert visible(2, "0,1,2,3") == ["0,1", "2,3"]
    assert visible(1, "0,1") == ["0,1"]
    assert visible(3, "0,1") == ["0", "1", "0"]
    assert visible(3, "0,1,2,3,4,5,6") == ["0,1", "2,3", "4,5,6"]
    assert visible(2, None) == [None, None]
    assert [each["OMP_NUM_THREADS"] for each in environments(3, ())] == ["2", "2", "2"]
    assert environments(1, ())[0]["OMP_NUM_THREADS"] == "4"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert "OMP_NUM_THREADS" not in environments(1, ())[0]
    with pytest.raises(StudyError, match="`--devices 0,,1` cannot be used"):
        parse_devices("0,,1")
