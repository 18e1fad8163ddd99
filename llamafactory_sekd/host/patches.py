"""The ledger: everything that we change in LLaMA-Factory, one record each. `llamafactory-cli env` prints it.

The records hold for the host versions in :data:`llamafactory_sekd.host.versions.SUPPORTED`. The open requests upstream
for a distillation stage or a plug-in point: hiyouga/LLaMA-Factory issues 6927, 7365, 8313, 9142.
"""

from __future__ import annotations

from typing import Any

from llamafactory_sekd.arguments import STAGE
from llamafactory_sekd.host.ledger import Patch


STAGE_LABEL = "Self-Evolution KD"
_WHEN_STAGES_ARE_PLUGGABLE = "the host lets a package register a training stage"
_WHEN_THE_PAGE_IS_PLUGGABLE = "the host's web UI lets a package add fields"


def _training_stages(stages: dict[str, str]) -> dict[str, str]:
    return {**stages, STAGE_LABEL: STAGE}


def _finetuning_arguments(host_class: type) -> type:
    from llamafactory_sekd.host.arguments import extend_finetuning_arguments

    return extend_finetuning_arguments(host_class)


def _parse_train_args(host_parse: Any) -> Any:
    from llamafactory_sekd.host.arguments import check_together

    return check_together(host_parse)


def _templates(templates: dict[str, Any]) -> dict[str, Any]:
    from llamafactory_sekd.host.template import with_parrot

    return with_parrot(templates)


def _get_dataset_list(host_look_up: Any) -> Any:
    from llamafactory_sekd.host.datasets import explain_undefined

    return explain_undefined(host_look_up)


def _load_single_dataset(host_load: Any) -> Any:
    from llamafactory_sekd.host.datasets import explain_missing_file

    return explain_missing_file(host_load)


def _log_callback(host_class: type) -> type:
    from llamafactory_sekd.host.logs import extend_log_callback

    return extend_log_callback(host_class)


def _run_sft(host_run_sft: Any) -> Any:
    from llamafactory_sekd.host.stage import dispatch

    return dispatch(host_run_sft)


def _launch(host_launch: Any) -> Any:
    from llamafactory_sekd.host.launcher import extend_launch

    return extend_launch(host_launch)


def _launch_v1(host_launch: Any) -> Any:
    from llamafactory_sekd.host.launcher import refuse_v1

    return refuse_v1(host_launch)


def _locales(host_locales: dict[str, Any]) -> dict[str, Any]:
    from llamafactory_sekd.host.webui import extend_locales

    return extend_locales(host_locales)


def _gen_loss_plot(host_plot: Any) -> Any:
    from llamafactory_sekd.host.webui import extend_loss_plot

    return extend_loss_plot(host_plot)


def _runner(host_class: type) -> type:
    from llamafactory_sekd.host.webui_runner import extend_runner

    return extend_runner(host_class)


def _change_stage(host_change: Any) -> Any:
    from llamafactory_sekd.host.webui import extend_change_stage

    return extend_change_stage(host_change)


def _create_train_tab(host_create: Any) -> Any:
    from llamafactory_sekd.host.webui import extend_create_train_tab

    return extend_create_train_tab(host_create)


def _create_eval_tab(host_create: Any) -> Any:
    from llamafactory_sekd.host.webui import extend_create_eval_tab

    return extend_create_eval_tab(host_create)


def _create_infer_tab(host_create: Any) -> Any:
    from llamafactory_sekd.host.webui import extend_create_infer_tab

    return extend_create_infer_tab(host_create)


PATCHES: tuple[Patch, ...] = (
    Patch(
        module="llamafactory.extras.constants",
        attribute="TRAINING_STAGES",
        replace=_training_stages,
        what=f"adds the stage {STAGE_LABEL!r}",
        why="the web UI's dropdown is built from this literal",
        remove_when=_WHEN_STAGES_ARE_PLUGGABLE,
    ),
    Patch(
        module="llamafactory.hparams.finetuning_args",
        attribute="FinetuningArguments",
        replace=_finetuning_arguments,
        what=f"adds our keys and the value `{STAGE}` of `stage`",
        why="`stage` is a closed Literal and unknown keys are refused",
        remove_when=_WHEN_STAGES_ARE_PLUGGABLE,
    ),
    Patch(
        module="llamafactory.hparams.parser",
        attribute="_parse_train_args",
        replace=_parse_train_args,
        what=f"checks, for `stage: {STAGE}` only, keys of several argument classes against each other",
        why="the host's own checks run right after and would ask for packages that cannot help",
        remove_when=_WHEN_STAGES_ARE_PLUGGABLE,
    ),
    Patch(
        module="llamafactory.data.template",
        attribute="TEMPLATES",
        replace=_templates,
        what="adds the template `parrot`",
        why="templates are registered by the host's own module",
        remove_when="the host ships the Parrot prompt, or lets a package register a template",
    ),
    Patch(
        module="llamafactory.data.loader",
        attribute="get_dataset_list",
        replace=_get_dataset_list,
        what="says which command makes one of our data sets where it is not declared",
        why="the host's error does not know the command",
        remove_when="never needed for function; remove it when it gets in the way",
    ),
    Patch(
        module="llamafactory.data.loader",
        attribute="_load_single_dataset",
        replace=_load_single_dataset,
        what="says which command makes one of our data sets where its file is missing",
        why="the host's error does not know the command",
        remove_when="never needed for function; remove it when it gets in the way",
    ),
    Patch(
        module="llamafactory.train.callbacks",
        attribute="LogCallback",
        replace=_log_callback,
        what="writes the metrics named kd/… to trainer_log.jsonl as well",
        why="the host writes a fixed list of metrics",
        remove_when="the host's LogCallback writes every logged metric",
    ),
    Patch(
        module="llamafactory.train.sft",
        attribute="run_sft",
        replace=_run_sft,
        what=f"runs our trainer where the run was asked for with `stage: {STAGE}`",
        why="the tuner is an if/elif chain over the stage's name",
        remove_when=_WHEN_STAGES_ARE_PLUGGABLE,
    ),
    Patch(
        module="llamafactory.launcher",
        attribute="launch",
        replace=_launch,
        what="adds the command `eval`, its line in `help`, and our lines in `env`",
        why="the launcher is an if/elif chain and its `eval` only raises",
        remove_when="the host lets a package register a command",
    ),
    Patch(
        module="llamafactory.v1.launcher",
        attribute="launch",
        replace=_launch_v1,
        what=f"refuses `stage: {STAGE}` under USE_V1=1",
        why="that launcher has trainers of its own, which would ignore our keys",
        remove_when="the v1 trainers support a teacher",
    ),
    Patch(
        module="llamafactory.extras.ploting",
        attribute="gen_loss_plot",
        replace=_gen_loss_plot,
        what="draws hard share and difficulty below the web UI's loss curve where the log has them",
        why="the web UI draws the loss alone",
        remove_when="the host's web UI plots any logged metric",
    ),
    Patch(
        module="llamafactory.webui.locales",
        attribute="LOCALES",
        replace=_locales,
        what="adds the labels of our fields in the host's five languages",
        why="the language switch reads this literal",
        remove_when=_WHEN_THE_PAGE_IS_PLUGGABLE,
    ),
    Patch(
        module="llamafactory.webui.runner",
        attribute="Runner",
        replace=_runner,
        what=f"adds the panel's keys to runs of `stage: {STAGE}`, checks them, lets several pages watch such a run",
        why="the runner builds its arguments from a fixed list of fields",
        remove_when=_WHEN_THE_PAGE_IS_PLUGGABLE,
    ),
    Patch(
        module="llamafactory.webui.control",
        attribute="change_stage",
        replace=_change_stage,
        what=f"keeps the chosen data sets when the stage becomes {STAGE_LABEL}",
        why="the host clears them after a loaded configuration has set them, for every stage but the first",
        remove_when="loading a configuration of another stage than SFT keeps its data sets",
    ),
    Patch(
        module="llamafactory.webui.components.train",
        attribute="create_train_tab",
        replace=_create_train_tab,
        what=f"adds the panel of {STAGE_LABEL} to the training tab",
        why="the tab is built by one function",
        remove_when=_WHEN_THE_PAGE_IS_PLUGGABLE,
    ),
    Patch(
        module="llamafactory.webui.components.eval",
        attribute="create_eval_tab",
        replace=_create_eval_tab,
        what="adds the section that runs `llamafactory-cli eval`",
        why="the tab is built by one function",
        remove_when=_WHEN_THE_PAGE_IS_PLUGGABLE,
    ),
    Patch(
        module="llamafactory.webui.components.infer",
        attribute="create_infer_tab",
        replace=_create_infer_tab,
        what="adds the tab that shows the difficulty of every target token before and after training",
        why="the page's tabs are built by one function, which calls this one",
        remove_when=_WHEN_THE_PAGE_IS_PLUGGABLE,
    ),
)
