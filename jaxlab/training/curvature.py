"""Watching the curvature while a model trains: sharpness, trace, gradient norm.

The sharpness is the top eigenvalue of the Hessian of the loss on fixed data, with the
model in evaluation mode. Eigenvectors change little from one record to the next, so the
last ones start the next search.
Reference: Cohen, Kaur, Li, Kolter, Talwalkar, "Gradient Descent on Neural Networks
Typically Occurs at the Edge of Stability", ICLR 2021.
"""

import io
import json
import math
import os
import pathlib
import tempfile
import time
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

from jaxlab._checks import check_count
from jaxlab.curvature.report import SpectrumReport, spectrum_report
from jaxlab.objective import Objective
from jaxlab.training.fit import EpochInfo
from jaxlab.training.record import MetricLines

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["CurvatureMonitor"]

_KEPT = 4096  # records in memory; above, every second one is dropped


class CurvatureMonitor:
    """Records sharpness, trace and gradient norm while a model trains.

    Give it to ``fit(callbacks=[monitor])``, or call :meth:`record` in your own loop. A
    record is a dict, and a line of the file:

    - ``step``, and ``epoch`` where :func:`fit` knows it; ``time``, in seconds;
    - ``loss`` and ``grad_norm`` of ``data`` in evaluation mode;
    - ``sharpness``, the top eigenvalue of the Hessian; ``eigenvalues`` and their
      ``residuals``, all that were asked for;
    - ``trace`` and ``trace_standard_error``;
    - ``num_products``, spent on the record; ``warm``, whether earlier vectors helped.

    What is not finite is written as ``null``. Nothing of a state is kept or copied: a
    monitor holds the data, ``k`` vectors like the parameters in float32 at least, and
    some thousand records, of which it drops every second one when there are more (the
    file keeps all). While it works it needs the memory of :func:`top_eigenpairs`.

    Under several processes all must call it, and the first one writes.

    Args:
      objective: model and likelihood.
      data: as in :func:`spectrum_report`: a batch, a list of batches, or a callable
        that gives them anew for each product. Keep it fixed, and as small as the noise
        allows: each product is a pass over it.
      key: of the random vectors. Those of a record depend on this key and the step
        alone.
      every: steps between records. :func:`fit` calls at the ends of epochs, so a record
        is made at the first one at or after each multiple of ``every`` steps.
      path: of the file, one JSON object a line, to which lines are appended; ``None``
        writes none. At the first call, and whenever steps go back, lines later than the
        step where the run starts are cut.
      picture: of a PNG file, drawn anew with each record and replaced in one step, so
        that a viewer may reload it; ``None`` draws none. It takes tenths of a second.
      k: eigenpairs. With one, an eigenvalue that overtakes the tracked one is seen
        late, see :func:`top_eigenpairs`.
      which: "largest", or "both" for the ends of the spectrum in turn.
      num_matvecs: products for the trace.
      tol: of the eigenpairs, as in :func:`top_eigenpairs`; values are right to about
        its square.
      max_products: for the eigenpairs; ``None`` allows 100 k.
      refresh: the first of every so many records starts without earlier vectors, so
        that nothing is overlooked for long; ``None`` always starts with them.
      microbatch: rows that are differentiated at once.
      memory_limit: bytes of the basis, as in :func:`top_eigenpairs`.

    Attributes:
      records: the records so far, those that the file held before included.

    Raises:
      ValueError: if ``every``, ``refresh`` or ``which`` is out of range.
      ImportError: if a picture is asked for and matplotlib is missing.

    Examples:
      >>> from jaxlab.likelihoods import Gaussian
      >>> from jaxlab.objective import Objective, plain
      >>> objective = Objective(plain(lambda w, x: x @ w), Gaussian())
      >>> data = (2 * jnp.diag(jnp.array([2.0, 1.0])), jnp.ones((2, 1)))
      >>> monitor = CurvatureMonitor(objective, data, key=jax.random.key(0))
      >>> record = monitor.record(1, jnp.ones((2, 1)))
      >>> round(record["sharpness"], 4), round(record["trace"], 4)
      (8.0, 10.0)
    """

    def __init__(
        self,
        objective: Objective,
        data: Any,
        *,
        key: Key[Array, ""],
        every: int = 1,
        path: str | os.PathLike | None = None,
        picture: str | os.PathLike | None = None,
        k: int = 2,
        which: Literal["largest", "both"] = "largest",
        num_matvecs: int = 8,
        tol: float = 1e-2,
        max_products: int | None = None,
        refresh: int | None = 10,
        microbatch: int | None = None,
        memory_limit: float | None = None,
    ):
        check_count("CurvatureMonitor", optional=True, every=every, refresh=refresh)
        if which not in ("largest", "both"):
            raise ValueError(
                'CurvatureMonitor: which must be "largest" or "both", which has the '
                f"smallest too; got {which!r}."
            )
        if picture is not None:
            _figure_class()
        self._objective = objective
        put = lambda x: jnp.asarray(x) if hasattr(x, "__array__") else x
        self._data = data if callable(data) else jax.tree.map(put, data)
        self._key = key
        self._every = every
        self._path = None if path is None else pathlib.Path(path)
        self._picture = None if picture is None else pathlib.Path(picture)
        self._refresh = refresh
        self._options = {
            "k": k,
            "which": which,
            "num_probes": num_matvecs,
            "tol": tol,
            "max_products": max_products,
            "microbatch": microbatch,
            "memory_limit": memory_limit,
        }
        self.records: list[dict[str, Any]] = []
        self._vectors: PyTree = None
        self._age = 0  # records since the vectors were last looked for afresh
        self._last: float | None = None  # the step reached

    def __call__(self, info: EpochInfo) -> None:
        """Makes a record where one is due; :func:`fit` calls it after every epoch."""
        before = info.step - info.step // max(info.epoch, 1)
        self._resume(info.step, before)
        if info.step // self._every > before // self._every:
            state = info.state
            self._record(info.step, info.epoch, state.params, state.model_state)

    def record(self, step: int, params: PyTree, state: PyTree = ()) -> dict[str, Any]:
        """Makes a record now.

        Args:
          step: number of steps done. A step that is not later than the last one takes
            the place of what was recorded from there on.
          params: the parameters; of the shapes they had before, or nothing compiles
            anew.
          state: what the model keeps besides (BatchNorm statistics).

        Returns:
          The record.

        Raises:
          ValueError: as :func:`spectrum_report` does.
        """
        step = int(step)
        self._resume(step, step - 1)
        return self._record(step, None, params, state)

    def figure(self) -> "Figure":
        """Draws the records so far: three panels over the steps.

        Returns:
          A matplotlib figure, which pyplot does not know of.

        Raises:
          ImportError: if matplotlib is missing.
        """
        figure = _figure_class()(figsize=(6.4, 6.4), layout="constrained")
        axes = figure.subplots(3, 1, sharex=True)
        steps = [record["step"] for record in self.records]
        column = lambda name: [_or_nan(record.get(name)) for record in self.records]
        style = {"marker": "o", "markersize": 3, "linewidth": 1.2}
        values = [record.get("eigenvalues") or [] for record in self.records]
        for place in range(1, max(map(len, values), default=0)):
            others = [_or_nan(v[place]) if place < len(v) else math.nan for v in values]
            label = "others" if place == 1 else None
            axes[0].plot(steps, others, color="0.7", linewidth=1, label=label)
        axes[0].plot(steps, column("sharpness"), color="C0", label="largest", **style)
        axes[0].set_ylabel("eigenvalue of the Hessian")
        above = {"loc": "lower right", "bbox_to_anchor": (1, 1), "frameon": False}
        axes[0].legend(ncols=2, **above)
        trace, error = column("trace"), column("trace_standard_error")
        pairs = list(zip(trace, error, strict=True))
        low, high = [t - 2 * e for t, e in pairs], [t + 2 * e for t, e in pairs]
        axes[1].fill_between(steps, low, high, color="C1", alpha=0.25, linewidth=0)
        axes[1].plot(steps, trace, color="C1", **style)
        axes[1].set_ylabel("trace, 2 standard errors")
        loss, norm = column("loss"), column("grad_norm")
        axes[2].plot(steps, loss, color="C2", label="loss", **style)
        axes[2].plot(steps, norm, color="C3", label="gradient norm", **style)
        known = [y for y in loss + norm if not math.isnan(y)]
        if known and min(known) > 0:
            axes[2].set_yscale("log")
        axes[2].legend(ncols=2, **above)
        axes[2].set_xlabel("step")
        return figure

    def _record(self, step, epoch, params, state) -> dict[str, Any]:
        due = self._refresh is not None and self._age >= self._refresh
        start = None if due or not self._fits(params) else self._vectors
        report = spectrum_report(
            jax.random.fold_in(self._key, step),
            self._objective,
            params,
            self._data,
            state=state,
            start=start,
            order=1,
            damping=None,
            **self._options,
        )
        record = {"step": step} | ({} if epoch is None else {"epoch": epoch})
        record |= _numbers(report) | {"warm": start is not None}
        record["time"] = round(time.time(), 3)
        good = None not in record["residuals"]
        self._vectors = report.eigenpairs.vectors if good else None
        self._age = 1 if start is None else self._age + 1
        self._last = step
        self._keep([record])
        if jax.process_index() == 0:
            if self._path is not None:
                with self._path.open("a") as file:
                    file.write(json.dumps(record, allow_nan=False) + "\n")
            if self._picture is not None:
                self._draw()
        return record

    def _resume(self, step: int, before: int) -> None:
        """Cuts what is later than ``before`` where the run (re)starts."""
        if self._last is None or step <= self._last:
            self.records = [r for r in self.records if r["step"] <= before]
            self._vectors = None
            if self._path is not None and jax.process_index() == 0:
                MetricLines(self._path, after_step=before).close()
                if self._last is None:
                    lines = self._path.read_text().splitlines()
                    self._keep([json.loads(line) for line in lines])
        self._last = step

    def _keep(self, records: list[dict[str, Any]]) -> None:
        self.records += records
        while len(self.records) > _KEPT:
            self.records = self.records[::-2][::-1]

    def _fits(self, params: PyTree) -> bool:
        """Tells whether the vectors are of the space of these parameters."""
        trees = params, self._vectors
        new, old = (jax.tree.structure(tree) for tree in trees)
        wanted, found = (map(jnp.shape, jax.tree.leaves(tree)) for tree in trees)
        return new == old and list(wanted) == [shape[1:] for shape in found]

    def _draw(self) -> None:
        content = io.BytesIO()
        self.figure().savefig(content, format="png", dpi=120)
        path = self._picture
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content.getvalue())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise


def _numbers(report: SpectrumReport) -> dict[str, Any]:
    """Reads the report; what is not finite becomes ``None``."""
    pairs = report.eigenpairs
    arrays = {
        "loss": report.loss,
        "grad_norm": report.gradient_norm,
        "sharpness": pairs.values[0],
        "eigenvalues": pairs.values,
        "residuals": pairs.residuals,
        "trace": report.trace,
        "trace_standard_error": report.trace_error,
    }
    found = {name: _finite(x) for name, x in jax.device_get(arrays).items()}
    return found | {"num_products": int(report.num_products)}


def _finite(x: Any) -> Any:
    if x.ndim:
        return [_finite(entry) for entry in x]
    return float(x) if math.isfinite(x) else None


def _or_nan(x: float | None) -> float:
    return math.nan if x is None else x


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'CurvatureMonitor needs matplotlib for its picture: pip install "jaxlab'
            '[train]".'
        ) from error
    return Figure
