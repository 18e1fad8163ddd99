"""Filling a cache through a server, with several requests in flight."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from llamafactory_sekd.teacher.cache import Format, Plan, ShardWriter
from llamafactory_sekd.teacher.cache.build import fetch, write
from llamafactory_sekd.teacher.cache.record_store import Key, Record
from llamafactory_sekd.teacher.cache.segments import Segment
from llamafactory_sekd.teacher.served.live_teacher import Answering


def fill_from_server(
    plan: Plan,
    datasets: Sequence[Any],
    *,
    server: Answering,
    kept: Format,
    writer: ShardWriter,
    batch_size: int,
    in_flight: int,
    rank: int = 0,
    ranks: int = 1,
    progress: Callable[[int], None] = lambda _: None,
    informed: Sequence[Any] | None = None,
) -> None:
    """Let a server compute the plan's segments and write them; see :func:`llamafactory_sekd.teacher.cache.fill`.

    A request is a batch of the local build, so a server on the same kind of machine gives its answers to the bit.
    Where a request fails in the end, what has arrived before it is written first.

    Args:
        plan, datasets, kept, writer, batch_size, rank, ranks, progress, informed: as for a local teacher.
        server: the teacher.
        in_flight: requests at a time.

    Raises:
        TeacherError: the server refuses or stays away, or a shard cannot be written.
    """
    starts = list(range(0, plan.missing, batch_size))[rank::ranks]
    waiting: deque[tuple[int, list[tuple[Key, Segment]], Future[Record]]] = deque()
    with ThreadPoolExecutor(in_flight, thread_name_prefix="teacher") as pool:

        def take() -> None:
            start, asked, future = waiting.popleft()
            write(asked, future.result(), writer)
            progress(sum(plan.lengths[start : start + batch_size]))

        try:
            for start in starts:
                asked = [fetch(place, datasets, informed) for place in plan.places[start : start + batch_size]]
                parts = [segment for _, segment in asked]
                waiting.append((start, asked, pool.submit(server.ask, parts, kept, together=False)))
                if len(waiting) > in_flight:
                    take()
            while waiting:
                take()
        except BaseException:
            for _, _, future in waiting:
                future.cancel()
            server.close()
            raise
        finally:
            writer.flush()
