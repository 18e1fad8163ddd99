"""Translate what is not translated yet."""

from __future__ import annotations

import time
from collections.abc import Sequence

from tqdm import tqdm

from llamafactory_sekd.evaluation.evaluation_settings import Settings
from llamafactory_sekd.evaluation.translation_store import Record, Store
from llamafactory_sekd.evaluation.translator import BatchLimits, Request, Translator
from llamafactory_sekd.ranks import Ranks


def translate_pending(
    translator: Translator,
    requests: Sequence[Request],
    pending: Sequence[int],
    store: Store,
    fingerprint: str,
    settings: Settings,
    ranks: Ranks,
    label: str,
) -> None:
    """Translate ``requests[i]`` for this rank's share of the indices ``pending``; what is finished is kept at once.

    Shares are dealt out by length, so that all ranks get like work. ``label`` comes before the progress bar, which
    counts the sentences of this rank. The seconds that are recorded hold everything from here on, writing included.
    """
    mark = time.perf_counter()
    prompts = {index: translator.encode(requests[index]) for index in pending}
    mine = ranks.share(sorted(pending, key=lambda index: (-len(prompts[index]), index)))
    part = store.open_part(fingerprint, ranks.rank)
    limits = BatchLimits(settings.batch_tokens, settings.batch_size)
    note = f" (rank 1 of {ranks.world})" if ranks.world > 1 else ""
    with tqdm(total=len(mine), desc=f"{label}{note}", unit=" sentences", disable=not ranks.is_first) as progress:
        for group in translator.translate([prompts[index] for index in mine], limits):
            mark, started = time.perf_counter(), mark
            seconds = (mark - started) / len(group)
            part.append(Record(mine[place], translation, seconds) for place, translation in group)
            progress.update(len(group))
