"""Work done in threads ahead of its use, in order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(
    items: Iterable[Item], prepare: Callable[[Item], Result], *, threads: int = 1, depth: int = 2
) -> Iterator[Result]:
    """Yield `prepare(item)` for every item, in the items' order.

    While one result is in use, the next `depth` are being prepared by `threads` threads; no more than that are held.
    Items are drawn in the caller's thread. What `prepare` raises is raised at that item's turn. Leaving the loop
    early, or closing the iterator, drops what has not begun.
    """
    with ThreadPoolExecutor(threads, thread_name_prefix="ahead") as pool:
        coming: deque[Future[Result]] = deque()
        try:
            for item in items:
                coming.append(pool.submit(prepare, item))
                if len(coming) > depth:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:
            for future in coming:
                future.cancel()
