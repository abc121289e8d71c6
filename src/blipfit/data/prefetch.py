"""Prepare items in background threads before they are used."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch(
    items: Iterable[Item], prepare: Callable[[Item], Result], *, threads: int = 1, depth: int = 2
) -> Iterator[Result]:
    """Yield `prepare(item)` for every item, in the order of the items.

    While the caller uses one result, `threads` threads prepare the next `depth` results; no more than these are in
    memory. `items` is iterated in the caller's thread. An exception of `prepare` is raised when its item's turn comes.
    Leaving the loop early, or closing the iterator, cancels what has not started.
    """
    with ThreadPoolExecutor(threads, thread_name_prefix="prefetch") as pool:
        pending: deque[Future[Result]] = deque()
        try:
            for item in items:
                pending.append(pool.submit(prepare, item))
                if len(pending) > depth:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
