"""Finds the members, runs one, shows what it measured."""

import importlib
import pkgutil
import shlex
from types import ModuleType

from benchmarks.devices import Target
from benchmarks.environment import ROOT, describe
from benchmarks.progress import progress
from benchmarks.results import Record, complete
from benchmarks.tables import Verdict

NO_VERDICT = "A small run shows that the code works; it gives no verdict."
PLACES = {
    "speed": "benchmarks.speed",
    "claim": "benchmarks.claims",
    "estimate": "benchmarks.estimates",
}


def names(kind: str) -> list[str]:
    """Lists the members of a kind, a key of ``PLACES``, without importing them."""
    folder = ROOT.joinpath(*PLACES[kind].split("."))
    return sorted(module.name for module in pkgutil.iter_modules([str(folder)]))


def member(kind: str, name: str) -> ModuleType:
    """Imports a member.

    Raises:
      ValueError: if there is none of that name.
    """
    if name not in names(kind):
        raise ValueError(f"{kind} NAME must be one of {names(kind)}, got {name!r}.")
    return importlib.import_module(f"{PLACES[kind]}.{name}")


def run(
    module: ModuleType,
    *,
    kind: str,
    name: str,
    preset: str,
    arguments: list[str],
    target: Target | None = None,
) -> list[Record]:
    """Runs one preset of a member and returns its complete records.

    Args:
      module: the member.
      kind: a key of ``PLACES``.
      name: the member's name.
      preset: "small" or "full".
      arguments: what was typed after ``python -m benchmarks``.
      target: what an estimate compiles for.
    """
    environment = describe(*((target.head(), target.packages) if target else ()))
    more = (target,) if target else ()
    command = shlex.join(["python", "-m", "benchmarks", *arguments])
    return [
        complete(
            own,
            kind=kind,
            name=name,
            preset=preset,
            command=command,
            environment=environment,
        )
        for own in module.run(module.PRESETS[preset], progress, *more)
    ]


def verdict(module: ModuleType, records: list[Record]) -> Verdict | None:
    """Computes the verdict of a full run; a small one has none."""
    full = all(record["preset"] == "full" for record in records)
    return module.verdict(records) if full else None


def show(module: ModuleType, records: list[Record]) -> None:
    """Prints a run's tables and, if it was a full one, its verdict."""
    print(*module.tables(records), sep="\n\n", end="\n\n")
    print(f"{module.CLAIM}\n{verdict(module, records) or NO_VERDICT}\n")
