"""What a run writes down: every step's metrics, one JSON line an epoch, a bar.

Steps and epochs are counted from 1 here: step s is the one after which the state's
``step`` is s.
"""

import json
import os
import pathlib
import time
from typing import Any

import numpy as np
from tqdm import tqdm

__all__ = ["MetricLines", "Recorder"]


class MetricLines:
    """Appends JSON objects to a file, one a line, each flushed.

    Args:
      path: of the file; its folder is made if missing.
      after_step: lines of later steps that are there already are cut, torn ones too:
        a run that starts again at this step writes them anew.

    Examples:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     for step in (0, 1):
      ...         lines = MetricLines(f"{folder}/log.jsonl", after_step=1)
      ...         lines.write({"step": 1 + step, "loss": 0.5})
      ...         lines.close()
      ...     print(pathlib.Path(folder, "log.jsonl").read_text(), end="")
      {"step": 1, "loss": 0.5}
      {"step": 2, "loss": 0.5}
    """

    def __init__(self, path: str | os.PathLike, *, after_step: int):
        path = pathlib.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            temporary = path.with_name(path.name + ".tmp")
            lines = path.read_text().splitlines()
            kept = [line for line in lines if _step_of(line) <= after_step]
            temporary.write_text("".join(line + "\n" for line in kept))
            os.replace(temporary, path)
        self._file = path.open("a")

    def write(self, record: dict[str, Any]) -> None:
        """Appends one object."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class Recorder:
    """Collects the metrics of steps, stops at a loss that is not finite.

    Args:
      steps_per_epoch: number of steps after which an epoch ends.
      first_step: number of steps done before.
      last_step: number of steps when all is done.
      progress: shows a bar where standard error is a terminal.

    Examples:
      >>> recorder = Recorder(steps_per_epoch=2, first_step=0, last_step=2)
      >>> found = {"weight": np.array([3.0, 1.0]), "loss": np.array([1.0, 2.0])}
      >>> record = recorder.add(0, found)
      >>> record["step"], record["epoch"], record["loss"]
      (2, 1, 1.25)
      >>> recorder.history()["loss"].tolist()
      [1.0, 2.0]
    """

    def __init__(
        self,
        *,
        steps_per_epoch: int,
        first_step: int,
        last_step: int,
        progress: bool = False,
    ):
        self._steps_per_epoch = steps_per_epoch
        self._first_step = first_step
        self._found: list[dict[str, np.ndarray]] = []
        self._epoch_start = 0  # index into _found
        self._clock = time.perf_counter()
        self._bar = tqdm(
            total=last_step,
            initial=first_step,
            unit="step",
            disable=None if progress else True,  # None: unless it is a terminal
        )

    def add(self, step: int, found: dict[str, np.ndarray]) -> dict[str, Any] | None:
        """Adds the metrics of the steps after ``step``, all of one epoch.

        Args:
          step: number of steps done before them.
          found: metrics by name, one entry a step; "loss" and "weight" (the sum of the
            rows' weights) among them.

        Returns:
          The epoch's means where these steps end one, else ``None``.

        Raises:
          FloatingPointError: if a loss is not finite; the message names its step.
        """
        losses = found["loss"]
        finite = np.isfinite(losses)
        if not finite.all():
            at = int(np.argmin(finite))
            bad = step + at + 1
            epoch, within = divmod(bad - 1, self._steps_per_epoch)
            raise FloatingPointError(
                f"The loss is {losses[at]} at step {bad} (step {within + 1} of epoch "
                f"{epoch + 1}); no state from there on was saved."
            )
        self._found.append(found)
        self._bar.set_postfix_str(f"loss {losses[-1]:.4g}", refresh=False)
        self._bar.update(len(losses))
        done = step + len(losses)
        return None if done % self._steps_per_epoch else self._close_epoch(done)

    def restart_clock(self) -> None:
        """Takes what came since the last epoch out of the next epoch's time."""
        self._clock = time.perf_counter()

    def history(self) -> dict[str, np.ndarray]:
        """Gives the metrics by name, one entry a step, and ``step`` itself."""
        columns = _joined(self._found)
        steps = len(columns["loss"])
        return {"step": self._first_step + 1 + np.arange(steps)} | columns

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()

    def _close_epoch(self, done):
        columns = _joined(self._found[self._epoch_start :])
        self._epoch_start = len(self._found)
        seconds = max(time.perf_counter() - self._clock, 1e-9)
        self.restart_clock()
        weights = columns.pop("weight").astype(np.float64)
        means = {name: float(values.mean()) for name, values in columns.items()}
        # The last batch may be smaller: the epoch's loss is the mean over its rows.
        if weights.sum() > 0:
            means["loss"] = float(np.average(columns["loss"], weights=weights))
        return {
            "step": done,
            "epoch": done // self._steps_per_epoch,
            **means,
            "examples_per_second": round(float(weights.sum()) / seconds, 1),
            "time": round(time.time(), 3),
        }


def _joined(found):
    if not found:
        return {"loss": np.zeros(0, np.float32), "weight": np.zeros(0, np.float32)}
    return {name: np.concatenate([f[name] for f in found]) for name in found[0]}


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # torn by a kill
