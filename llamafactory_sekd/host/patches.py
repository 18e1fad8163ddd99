"""The ledger: everything that we change in LLaMA-Factory, one record each. `llamafactory-cli env` prints it.

The records hold for the host versions in :data:`llamafactory_sekd.host.ledger.SUPPORTED`. The open requests upstream
for a distillation stage or a plug-in point: hiyouga/LLaMA-Factory issues 6927, 7365, 8313, 9142.
"""

from __future__ import annotations

from dataclasses import dataclass

from llamafactory_sekd.arguments import STAGE


STAGE_LABEL = "Self-Evolution KD"
_WHEN_STAGES_ARE_PLUGGABLE = "the host lets a package register a training stage"
_WHEN_THE_PAGE_IS_PLUGGABLE = "the host's web UI lets a package add fields"


@dataclass(frozen=True)
class Patch:
    """One change to the host.

    Attributes:
        name: the dotted name of what is replaced.
        replace: ``module:function`` of ours, from the host's value to ours; called once, right after the host's module
            was imported. A name and not the function itself, so that the ledger imports nothing of what it lists.
        what: what the replacement does.
        why: why it cannot be done without a patch.
        remove_when: what has to happen in the host for the patch to go.
    """

    name: str
    replace: str
    what: str
    why: str
    remove_when: str

    @property
    def module(self) -> str:
        """Return the host's module."""
        return self.name.rpartition(".")[0]

    @property
    def attribute(self) -> str:
        """Return the name that is replaced in it."""
        return self.name.rpartition(".")[2]


PATCHES: tuple[Patch, ...] = (
    Patch(
        name="llamafactory.extras.constants.TRAINING_STAGES",
        replace="llamafactory_sekd.host.host_arguments:with_our_stage",
        what=f"adds the stage {STAGE_LABEL!r}",
        why="the web UI's dropdown is built from this literal",
        remove_when=_WHEN_STAGES_ARE_PLUGGABLE,
    ),
    Patch(
        name="llamafactory.hparams.finetuning_args.FinetuningArguments",
        replace="llamafactory_sekd.host.host_arguments:extend_finetuning_arguments",
        what=f"adds our keys and the value `{STAGE}` of `stage`",
        why="`stage` is a closed Literal and unknown keys are refused",
        remove_when=_WHEN_STAGES_ARE_PLUGGABLE,
    ),
    Patch(
        name="llamafactory.hparams.parser._parse_train_args",
        replace="llamafactory_sekd.host.host_arguments:check_together",
        what=f"checks, for `stage: {STAGE}` only, keys of several argument classes against each other",
        why="the host's own checks run right after and would ask for packages that cannot help",
        remove_when=_WHEN_STAGES_ARE_PLUGGABLE,
    ),
    Patch(
        name="llamafactory.data.template.TEMPLATES",
        replace="llamafactory_sekd.host.templates:with_parrot",
        what="adds the template `parrot`",
        why="templates are registered by the host's own module",
        remove_when="the host ships the Parrot prompt, or lets a package register a template",
    ),
    Patch(
        name="llamafactory.data.loader.get_dataset_list",
        replace="llamafactory_sekd.host.run_arguments:explain_undefined",
        what="says which command makes one of our data sets where it is not declared",
        why="the host's error does not know the command",
        remove_when="never needed for function; remove it when it gets in the way",
    ),
    Patch(
        name="llamafactory.data.loader._load_single_dataset",
        replace="llamafactory_sekd.host.run_arguments:explain_missing_file",
        what="says which command makes one of our data sets where its file is missing",
        why="the host's error does not know the command",
        remove_when="never needed for function; remove it when it gets in the way",
    ),
    Patch(
        name="llamafactory.train.callbacks.LogCallback",
        replace="llamafactory_sekd.host.run_progress:extend_log_callback",
        what="writes the metrics named kd/… to trainer_log.jsonl as well",
        why="the host writes a fixed list of metrics",
        remove_when="the host's LogCallback writes every logged metric",
    ),
    Patch(
        name="llamafactory.train.sft.trainer.CustomSeq2SeqTrainer",
        replace="llamafactory_sekd.host.stage:refuse_our_stage",
        what=f"refuses to train a run of `stage: {STAGE}`, which must never reach the host's own trainer",
        why="a run that looks like distillation and is plain SFT is the worst fault there is",
        remove_when=_WHEN_STAGES_ARE_PLUGGABLE,
    ),
    Patch(
        name="llamafactory.train.sft.run_sft",
        replace="llamafactory_sekd.host.stage:dispatch",
        what=f"runs our trainer where the run was asked for with `stage: {STAGE}`",
        why="the tuner is an if/elif chain over the stage's name",
        remove_when=_WHEN_STAGES_ARE_PLUGGABLE,
    ),
    Patch(
        name="llamafactory.launcher.launch",
        replace="llamafactory_sekd.host.launcher:extend_launch",
        what="adds the command `eval`, its line in `help`, and our lines in `env`",
        why="the launcher is an if/elif chain and its `eval` only raises",
        remove_when="the host lets a package register a command",
    ),
    Patch(
        name="llamafactory.v1.launcher.launch",
        replace="llamafactory_sekd.host.launcher:refuse_v1",
        what=f"refuses `stage: {STAGE}` under USE_V1=1",
        why="that launcher has trainers of its own, which would ignore our keys",
        remove_when="the v1 trainers support a teacher",
    ),
    Patch(
        name="llamafactory.extras.ploting.gen_loss_plot",
        replace="llamafactory_sekd.host.webui:extend_loss_plot",
        what="draws hard share and difficulty below the web UI's loss curve where the log has them",
        why="the web UI draws the loss alone",
        remove_when="the host's web UI plots any logged metric",
    ),
    Patch(
        name="llamafactory.webui.locales.LOCALES",
        replace="llamafactory_sekd.host.webui:extend_locales",
        what="adds the labels of our fields in the host's five languages",
        why="the language switch reads this literal",
        remove_when=_WHEN_THE_PAGE_IS_PLUGGABLE,
    ),
    Patch(
        name="llamafactory.webui.runner.Runner",
        replace="llamafactory_sekd.host.webui_page:extend_runner",
        what=f"adds the panel's keys to runs of `stage: {STAGE}`, checks them, lets several pages watch such a run",
        why="the runner builds its arguments from a fixed list of fields",
        remove_when=_WHEN_THE_PAGE_IS_PLUGGABLE,
    ),
    Patch(
        name="llamafactory.webui.control.change_stage",
        replace="llamafactory_sekd.host.webui:extend_change_stage",
        what=f"keeps the chosen data sets when the stage becomes {STAGE_LABEL}",
        why="the host clears them after a loaded configuration has set them, for every stage but the first",
        remove_when="loading a configuration of another stage than SFT keeps its data sets",
    ),
    Patch(
        name="llamafactory.webui.components.train.create_train_tab",
        replace="llamafactory_sekd.host.webui:extend_create_train_tab",
        what=f"adds the panel of {STAGE_LABEL} to the training tab",
        why="the tab is built by one function",
        remove_when=_WHEN_THE_PAGE_IS_PLUGGABLE,
    ),
    Patch(
        name="llamafactory.webui.components.eval.create_eval_tab",
        replace="llamafactory_sekd.host.webui:extend_create_eval_tab",
        what="adds the tab that runs `llamafactory-cli eval`",
        why="the page's tabs are built by one function, which calls this one",
        remove_when=_WHEN_THE_PAGE_IS_PLUGGABLE,
    ),
    Patch(
        name="llamafactory.webui.components.infer.create_infer_tab",
        replace="llamafactory_sekd.host.webui:extend_create_infer_tab",
        what="adds the tab that shows the difficulty of every target token before and after training",
        why="the page's tabs are built by one function, which calls this one",
        remove_when=_WHEN_THE_PAGE_IS_PLUGGABLE,
    ),
)
