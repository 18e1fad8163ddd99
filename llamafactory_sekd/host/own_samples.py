"""On-policy training on the host's side: its decoding keys, its template's stop tokens, and what cannot go with it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llamafactory_sekd.argument_checks import refuse_keys
from llamafactory_sekd.arguments import STAGE
from llamafactory_sekd.errors import ArgumentError
from llamafactory_sekd.host.run_arguments import HostArguments


if TYPE_CHECKING:
    from llamafactory_sekd.trainer.on_policy import OwnSamples, Search
    from llamafactory_sekd.trainer.sampling import RowDraws, Sampling


# The distribution that the loss is an expectation over. The host's own defaults (0.95, 0.7, 50) are for chatting.
_DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}


def set_sampling_defaults(args: Any, generating_args: Any) -> None:
    """Replace the host's defaults of temperature, top_p and top_k by those of training; a key that is given stays.

    Args:
        args: what the host's parser was called with: a mapping, a list of flags, or None for the command line.
        generating_args: the parsed arguments, changed in place.
    """
    if isinstance(args, Mapping):
        given = set(args)
    else:
        words = sys.argv[1:] if args is None else args
        given = {word.lstrip("-").split("=")[0] for word in words if word.startswith("--")}
    for key, value in _DEFAULTS.items():
        if key not in given:
            setattr(generating_args, key, value)


def check_own_samples(data_args: Any, generating_args: Any) -> None:
    """Check what ``kd_on_policy`` cannot go with.

    Raises:
        ArgumentError: a key that it cannot go with.
    """
    reasons = {
        "packing": "own samples have lengths of their own, and packed texts have no prompt each",
        "neat_packing": "own samples have lengths of their own, and packed texts have no prompt each",
        "train_on_prompt": "a sample continues a prompt, so the prompt has no label",
    }
    refuse_keys(
        data_args,
        reasons,
        "`{key}: true` cannot be used with `kd_on_policy` ({reason}): set it to false, or `kd_on_policy: 0`.",
    )
    if generating_args.num_beams != 1:
        raise ArgumentError(
            f"`num_beams: {generating_args.num_beams}` cannot be used with `kd_on_policy`, which samples: remove it."
        )
    if generating_args.do_sample and generating_args.temperature <= 0:
        raise ArgumentError(
            f"`temperature: {generating_args.temperature}` cannot be sampled with: use a number above 0, or "
            "`do_sample: false` for greedy decoding."
        )
    if generating_args.repetition_penalty != 1.0:
        raise ArgumentError(
            f"`repetition_penalty: {generating_args.repetition_penalty}` cannot be used with `kd_on_policy` of "
            f"`stage: {STAGE}`: the loss assumes samples of the student itself; remove it."
        )


def own_samples_of(run: HostArguments, template: Any, tokenizer: Any) -> Callable[[Any], OwnSamples] | None:
    """Return what makes the own samples of a run from the trainer's accelerator, or None where there are none."""
    if not run.finetuning.kd_on_policy:
        return None

    from llamafactory_sekd.data.languages import differs_in_language
    from llamafactory_sekd.evaluation.guards import has_loop
    from llamafactory_sekd.trainer.on_policy import Look, OwnSamples
    from llamafactory_sekd.trainer.sampling import Sampling

    def look(sample: list[int], reference: list[int]) -> Look:
        text, expected = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (sample, reference))
        return Look(has_loop(text), differs_in_language(text, expected))

    sampling = Sampling(
        do_sample=run.generating.do_sample,
        temperature=run.generating.temperature,
        top_p=run.generating.top_p,
        top_k=run.generating.top_k,
        max_new_tokens=run.generating.max_new_tokens,
        stop_ids=tuple(template.get_stop_token_ids(tokenizer)),
        pad_id=tokenizer.pad_token_id,
    )
    return lambda accelerator: OwnSamples(
        share=run.finetuning.kd_on_policy,
        every=run.finetuning.kd_on_policy_every,
        drop_truncated=run.finetuning.kd_on_policy_truncated == "drop",
        sampling=sampling,
        cutoff_len=run.data.cutoff_len,
        seed=run.training.seed,
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=False),
        accelerator=accelerator,
        output_dir=run.training.output_dir,
        look=look,
        search=_search(sampling),
    )


def _search(sampling: Sampling) -> Search:
    """Return the evaluation's decoder, for students that agree with it; they are asked once up to a length."""
    from llamafactory_sekd.evaluation.decoding import WayToDecode
    from llamafactory_sekd.evaluation.greedy import greedy_search
    from llamafactory_sekd.evaluation.systems import BatchLimits
    from llamafactory_sekd.trainer.on_policy import TOKENS_AT_A_TIME

    ways: list[WayToDecode] = []

    def search(
        model: Any, prompts: Sequence[list[int]], draws: RowDraws | None, longest: int
    ) -> tuple[Iterator[list[tuple[int, list[int]]]] | None, bool]:
        if not ways:
            ways.append(WayToDecode(model, sampling.pad_id, sampling.max_new_tokens, greedy=True))
        ways[0].ask(prompts)
        if not ways[0].fast:
            return None, ways[0].padded
        limits = BatchLimits(TOKENS_AT_A_TIME)
        return greedy_search(model, prompts, sampling.stop_ids, sampling.pad_id, longest, limits, draws), True

    return search
