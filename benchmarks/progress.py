"""A progress bar on a terminal, plain lines elsewhere."""

import contextlib
import sys
from collections.abc import Callable, Iterator

from tqdm import tqdm

Tick = Callable[[str], None]  # called with what has just been finished


@contextlib.contextmanager
def progress(total: int, title: str) -> Iterator[Tick]:
    """Yields a function to call after each of ``total`` pieces of work.

    Both forms go to standard error, so tables on standard output stay clean.
    """
    if sys.stderr.isatty():
        with tqdm(total=total, desc=title, leave=False) as bar:

            def advance(done: str) -> None:
                bar.set_postfix_str(done)
                bar.update()

            yield advance
        return
    count = 0

    def line(done: str) -> None:
        nonlocal count
        count += 1
        print(f"{title} {count}/{total}: {done}", file=sys.stderr, flush=True)

    yield line
