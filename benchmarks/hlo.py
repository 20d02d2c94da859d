r"""Reads compiled programs in HLO text: loops, messages, expected cycles.

XLA's cost analysis counts the body of a loop once, whatever the trip count. Here every
line of a program is weighed by how often it runs: a loop over layers by its trip count,
which its condition compares with; a loop whose count only the run knows by what the
caller says; of the branches of a conditional the dearest counts.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2}
WIDTHS |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
MESSAGE = re.compile(rf"= (\(.*?\)|\S+) ({'|'.join(KINDS)})(-start)?\(")

_CALL = re.compile(r" call\(.*to_apply=%([\w.\-]+)")
_CALL_OR_FUSION = re.compile(r"(?: call\(.*to_apply|\bcalls)=%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Message:
    """What every chip of a group sends and receives in one operation.

    Attributes:
      kind: one of ``KINDS``.
      size: bytes of the whole array: of what comes out of an all-gather, of what goes
        into a reduce-scatter, of either for the others.
      chips: of a group.
      times: how often it runs in a step.
    """

    kind: str
    size: int
    chips: int
    times: int

    @property
    def sent(self) -> float:
        """Bytes that a chip sends, in all, by the best ring algorithm.

        Examples:
          >>> Message("all-reduce", 800, chips=4, times=1).sent
          1200.0
        """
        if self.kind == "collective-permute":
            return float(self.size * self.times)
        share = (self.chips - 1) / self.chips
        passes = 2 if self.kind == "all-reduce" else 1
        return passes * share * self.size * self.times


def computations(text: str) -> dict[str, list[str]]:
    r"""Cuts a program into its computations; the entry is called "ENTRY".

    Examples:
      >>> computations("%f (p: f32[]) -> f32[] {\n  a\n}\nENTRY %m () -> s32[] {\n}")
      {'f': ['  a'], 'ENTRY': []}
    """
    found, name = {}, None
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%([\w.\-]+) \(.*\{$", line)
        if head:
            name = "ENTRY" if head[1] else head[2]
            found[name] = []
        elif line.startswith("}"):
            name = None
        elif name is not None:
            found[name].append(line)
    return found


class Program:
    """A compiled program; ``open_loops`` is the trip count of loops that tell none.

    Examples:
      >>> text = '''
      ... %less (p: s32[]) -> pred[] {
      ...   %n = s32[] constant(3)
      ...   ROOT %c = pred[] compare(%p, %n), direction=LT
      ... }
      ... %body (p: s32[]) -> s32[] {
      ...   ROOT %a = s32[] add(%p, %p), x={"estimated_cycles":"7"}
      ... }
      ... ENTRY %main (x: s32[]) -> s32[] {
      ...   ROOT %w = s32[] while(%x), condition=%less, body=%body
      ... }
      ... '''
      >>> Program(text).cycles()
      21
    """

    def __init__(self, text: str):
        self._computations = computations(text)

    def cycles(self, *, open_loops: int = 1) -> int:
        """Adds up the cycles that a TPU's scheduler expects of the operations."""
        visits = self._visits("ENTRY", 1, open_loops, fusions=False)
        return sum(times * self._cycles[name] for name, times in visits)

    def messages(self, *, open_loops: int = 1) -> list[Message]:
        """Lists the messages between chips, each with how often it runs."""
        found = (
            _message(line, name, times)
            for name, times in self._visits("ENTRY", 1, open_loops, fusions=True)
            for line in self._computations[name]
        )
        return [message for message in found if message]

    @functools.cached_property
    def _cycles(self) -> dict[str, int]:
        """The cycles of each computation's own lines."""
        number = re.compile(r'"estimated_cycles":"(\d+)"')
        # An unknown cost is written as the largest integer.
        known = lambda n: n if n < 2**40 else 0
        return {
            name: sum(known(int(n)) for line in lines for n in number.findall(line))
            for name, lines in self._computations.items()
        }

    def _visits(
        self, name: str, times: int, open_loops: int, *, fusions: bool
    ) -> Iterator[tuple[str, int]]:
        """Yields computations and how often they run, with or without fusions."""
        if not times:
            return
        yield name, times
        visit = functools.partial(self._visits, open_loops=open_loops, fusions=fusions)
        called_by = _CALL_OR_FUSION if fusions else _CALL
        for line in self._computations[name]:
            if loop := re.search(r"condition=%([\w.\-]+), body=%([\w.\-]+)", line):
                trips = self._trips(line, loop[1])
                yield from visit(
                    loop[2], times * (open_loops if trips is None else trips)
                )
            elif branches := _branches(line):
                cost = lambda branch: sum(
                    times * self._cycles[name] for name, times in visit(branch, 1)
                )
                yield from visit(max(branches, key=cost), times)
            elif called := called_by.search(line):
                yield from visit(called[1], times)

    @functools.cache  # noqa: B019
    def _trips(self, line: str, condition: str) -> int | None:
        """Reads a trip count, from the loop or from its comparison with a constant."""
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', line):
            return int(known[1])
        lines = self._computations[condition]
        constants = {}
        for row in lines:
            if found := re.search(r"%([\w.\-]+) = s32\[\]\S* constant\((\d+)\)", row):
                constants[found[1]] = int(found[2])
        if any("compare(" in row and "direction=LT" in row for row in lines):
            used = [n for name, n in constants.items()]
            return used[0] if len(used) == 1 else None
        fused = [re.search(r"calls=%([\w.\-]+)", row) for row in lines]
        inner = any(
            "direction=LT" in row
            for call in fused
            if call
            for row in self._computations[call[1]]
        )
        return next(iter(constants.values())) if inner and len(constants) == 1 else None


def size_of(shapes: str) -> int:
    """Adds up the bytes of the arrays of a type in HLO text.

    Examples:
      >>> size_of("(f32[2,3]{1,0:T(8,128)}, bf16[5]{0})")
      34
    """
    total = 0
    for dtype, sizes in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shapes):
        if dtype in WIDTHS:
            total += WIDTHS[dtype] * math.prod(int(n) for n in sizes.split(",") if n)
    return total


def group_size(line: str) -> int:
    """Reads how many chips exchange with each other, from any of XLA's notations.

    Examples:
      >>> group_size("replica_groups={{0,1,2,3},{4,5,6,7}}")
      4
      >>> group_size("replica_groups=[8,64]<=[512]")
      64
      >>> group_size("replica_groups=mesh['a'=8,'b'=4] {'b'}, use")
      4
      >>> group_size("source_target_pairs={{0,1},{1,0}}")
      2
    """
    if axes := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line):
        sizes = {n: int(k) for n, k in re.findall(r"'(\w+)'=(\d+)", axes[1])}
        return math.prod(sizes[name] for name in re.findall(r"'(\w+)'", axes[2]))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
        return int(iota[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(listed[1].split(","))
    return 2


def _branches(line: str) -> list[str]:
    if listed := re.search(r"branch_computations=\{([^}]*)\}", line):
        return re.findall(r"%([\w.\-]+)", listed[1])
    pair = re.search(
        r"true_computation=%([\w.\-]+), false_computation=%([\w.\-]+)", line
    )
    return [pair[1], pair[2]] if pair else []


def _message(line: str, computation: str, times: int) -> Message | None:
    found = MESSAGE.search(line)
    if not found:
        return None
    kind, size, chips = found[2], size_of(found[1]), group_size(line)
    if found[3] and found[1].startswith("("):
        # The result of a start holds its operands too.
        size -= size * (1 / (1 + chips) if kind == "all-gather" else 1 / 2)
    if computation.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"  # a TPU's fusion of both
    elif kind == "reduce-scatter":
        size *= chips
    return Message(kind, int(size), chips, times)
