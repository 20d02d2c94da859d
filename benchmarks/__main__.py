"""Speed, claims, estimates, training runs and the demo of jaxlab.

Full presets of ``speed``, ``claim`` and ``estimate`` write to
``benchmarks/results/<device>/`` and print a verdict; small ones take seconds, write to
``out/benchmarks`` and print none.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Annotated, Literal

import tyro

from benchmarks import devices, environment

Preset = Literal["small", "full"]
Device = Literal["tpu-v5p", "h200"]
Name = tyro.conf.Positional[str]


@dataclasses.dataclass(frozen=True)
class List:
    """Lists the members of ``speed``, ``claim`` and ``estimate``."""


@dataclasses.dataclass(frozen=True)
class Speed:
    """Times one member on one core, against what a user would pick instead."""

    name: Name
    """The member; ``list`` shows them."""
    preset: Preset = "small"
    """``small`` takes seconds; ``full`` measures."""
    directory: pathlib.Path | None = None
    """Where the records go; by the preset if not given."""
    core: int | None = None
    """The CPU core to stay on; the last one if not given. Accelerators ignore it."""


@dataclasses.dataclass(frozen=True)
class Claim:
    """Tests one paper's claim: method and tuned baselines over seeds."""

    name: Name
    """The member; ``list`` shows them."""
    preset: Preset = "small"
    """``small`` takes seconds; ``full`` gives the verdict."""
    directory: pathlib.Path | None = None
    """Where the records go; by the preset if not given."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Compiles one member for accelerators that are not here; nothing is run.

    ``make devices`` makes an environment with their compilers, ``.venv-devices``.
    """

    name: Name
    """The member; ``list`` shows them."""
    preset: Preset = "small"
    """``small`` takes seconds; ``full`` gives the verdict."""
    directory: pathlib.Path | None = None
    """Where the records go; by the preset if not given."""
    device: Device | None = None
    """What to compile for; all whose compilers are installed if not given."""


@dataclasses.dataclass(frozen=True)
class Train:
    """Trains a GPT on text, by a named config or a JSON file; ``train --help``."""


@dataclasses.dataclass(frozen=True)
class TrainCompare:
    """Compares training runs at equal tokens and at equal wall-clock."""

    directories: tyro.conf.Positional[tuple[pathlib.Path, ...]]
    """Of the runs, finished or not."""
    picture: pathlib.Path = environment.ROOT / "out" / "train" / "comparison.png"
    """Where loss against tokens and against seconds is drawn."""


@dataclasses.dataclass(frozen=True)
class Demo:
    """Trains a small network on digits dense and with Monarch, and draws the result."""

    preset: Preset = "full"
    """``full`` takes a few minutes on two cores, ``small`` seconds."""
    directory: pathlib.Path = environment.ROOT / "out" / "demo"
    """Where table and picture go."""
    record: bool = False
    """Also keep a full run: records in ``benchmarks/results``, picture in ``docs``."""


@dataclasses.dataclass(frozen=True)
class Report:
    """Turns the result files into one Markdown page with pictures."""

    directory: pathlib.Path | None = None
    """The result files; ``benchmarks/results`` if not given. The page goes there."""


@dataclasses.dataclass(frozen=True)
class Readme:
    """Copies the measured figures from the result files into the README."""

    check: bool = False
    """Changes nothing; exits with 1 if the README is stale."""
    readme: pathlib.Path = environment.ROOT / "README.md"
    """The file with the ``<!-- figures -->`` markers."""
    directory: pathlib.Path | None = None
    """The result files; ``benchmarks/results`` if not given."""


Command = (
    Annotated[List, tyro.conf.subcommand("list")]
    | Annotated[Speed, tyro.conf.subcommand("speed")]
    | Annotated[Claim, tyro.conf.subcommand("claim")]
    | Annotated[Estimate, tyro.conf.subcommand("estimate")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[TrainCompare, tyro.conf.subcommand("train-compare")]
    | Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Readme, tyro.conf.subcommand("readme")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["train"]:
        # Its fields have the defaults of the config that is named among them.
        from benchmarks import train

        return train.main(arguments[1:])
    command = tyro.cli(
        Command, prog="python -m benchmarks", description=__doc__, args=arguments
    )
    # Imports stand in the branches: a process is pinned before they wake any threads.
    match command:
        case List():
            from benchmarks import members

            for kind in members.PLACES:
                for name in members.names(kind):
                    print(f"{kind} {name}\n    {members.member(kind, name).CLAIM}")
        case Speed() | Claim() | Estimate():
            return _measure(command, arguments)
        case TrainCompare():
            from benchmarks import training_comparison

            return training_comparison.compare(command.directories, command.picture)
        case Demo():
            if command.record and command.preset != "full":
                print("error: --record keeps full runs only.", file=sys.stderr)
                return 2
            from benchmarks import demo

            demo.main(
                preset=command.preset,
                directory=command.directory,
                record=command.record,
                arguments=arguments,
            )
        case Report():
            from benchmarks import report

            print(report.write(command.directory))
        case Readme():
            from benchmarks import readme

            return readme.main(
                command.readme, directory=command.directory, check=command.check
            )
    return 0


def _measure(command: Speed | Claim | Estimate, arguments: list[str]) -> int:
    kind = type(command).__name__.lower()
    targets = [None]
    try:
        if isinstance(command, Speed):
            environment.pin_to_one_core(command.core)
        if isinstance(command, Estimate):
            targets = _targets(command.device)
        from benchmarks import members, results

        directory = results.directory_for(command.preset, command.directory)
        module = members.member(kind, command.name)
        if isinstance(command, Estimate):
            targets = _fitting(targets, module)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for target in targets:
        records = members.run(
            module,
            kind=kind,
            name=command.name,
            preset=command.preset,
            arguments=arguments,
            target=target,
        )
        path = results.save_results(directory, records)
        members.show(module, records)
        print(f"Records: {path}")
    return 0


def _targets(device: Device | None) -> list[devices.Target]:
    """Chooses what to compile for, and names on standard error what is left out.

    Raises:
      ValueError: saying what to install, if nothing can be compiled for.
    """
    devices.prepare()
    wanted = [devices.TARGETS[device]] if device else [*devices.TARGETS.values()]
    lacking = list(filter(None, (target.missing() for target in wanted)))
    if len(lacking) == len(wanted):
        raise ValueError(" ".join(lacking))
    for line in lacking:
        print(f"left out: {line}", file=sys.stderr)
    return [target for target in wanted if not target.missing()]


def _fitting(found: list[devices.Target], module: ModuleType) -> list[devices.Target]:
    """Leaves the targets of the platforms that a member compiles for.

    Raises:
      ValueError: if none is left.
    """
    platforms = getattr(module, "PLATFORMS", ("tpu", "gpu"))
    if fitting := [target for target in found if target.platform in platforms]:
        return fitting
    raise ValueError(
        f"{module.__name__} compiles for {' and '.join(platforms)}; what is installed "
        f"or asked for is {', '.join(target.name for target in found)}."
    )


if __name__ == "__main__":
    sys.exit(main())
