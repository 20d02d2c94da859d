"""Checkpoints that are restored only if every byte of them is as it was written.

Orbax writes the arrays (asynchronously, sharded or not, from one or many processes)
and renames a finished folder into place. It does not notice bytes that change later,
so a *seal* is added: ``seal.json`` in the folder of each step, with the sha256 digest
and the size of every other file, the shape and dtype of every leaf, and a digest of
itself. How it stays right when the process is killed at any moment:

1. ``save`` copies the state to the host, starts the writing and returns. One
   background thread waits for Orbax to rename the folder, reads the files back, and
   writes the seal last (temporary file, fsync, rename, fsync of the folder). A folder
   without a seal was never finished, whatever else it holds.
2. Only after the seal stands does the same thread delete older steps, all but the
   newest ``keep`` sealed ones; a deletion takes the seal away first. So the seal of a
   step exists before anything older goes, and with ``keep=2`` a step that is found
   damaged later has a sealed one before it.
3. ``restore`` walks from the newest step to older ones and takes the first whose
   files match their seal. What it passes over, and why, is logged and returned; an
   unfinished folder is deleted, a damaged one set aside under ``<step>.damaged``.

Several processes share one folder (a shared file system): each writes its shards,
process 0 seals, deletes and verifies, and tells the others which step to read. One
run owns a folder at a time.
"""

import hashlib
import json
import logging
import os
import pathlib
import shutil
import threading
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from jaxlab._checks import check_count, described, is_whole

__all__ = ["Checkpoints", "Restored"]

_SEAL = "seal.json"
_log = logging.getLogger(__name__)


class Restored(NamedTuple):
    """Holds what :meth:`Checkpoints.restore` found.

    Attributes:
      state: the restored tree, laid out as the template is.
      step: its step.
      rejected: one sentence for each newer step that was passed over, naming the step
        and the file; on process 0, empty elsewhere.

    Examples:
      >>> Restored({"w": 1}, 40, ()).step
      40
    """

    state: PyTree
    step: int
    rejected: tuple[str, ...]


class Checkpoints:
    """Keeps sealed checkpoints of one run in one folder.

    A context manager: leaving it, an exception included, finishes the save that is
    under way. The methods must be called by every process, in the same order.

    Args:
      directory: folder of the run; made if missing. Every process sees the same.
      keep: number of newest sealed steps that are kept, at least 2.

    Raises:
      ValueError: if ``keep`` is below 2.

    Examples:
      >>> import tempfile
      >>> state = {"w": jnp.arange(3.0)}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     with Checkpoints(folder) as checkpoints:
      ...         checkpoints.save(40, state)
      ...         checkpoints.wait()
      ...         found = checkpoints.restore(state)
      >>> found.step, found.state["w"].tolist()
      (40, [0.0, 1.0, 2.0])
    """

    def __init__(self, directory: str | os.PathLike, *, keep: int = 2):
        if not is_whole(keep) or keep < 2:
            raise ValueError(
                f"keep must be an integer >= 2, got {keep!r}: where the newest "
                "checkpoint is damaged, the one before is needed."
            )
        self.directory = pathlib.Path(directory).absolute()
        self._keep = keep
        self._sealing: threading.Thread | None = None
        self._error: tuple[int, BaseException] | None = None
        self._leader = jax.process_index() == 0
        if self._leader:
            self.directory.mkdir(parents=True, exist_ok=True)
            for torn in self.directory.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(torn, ignore_errors=True)
        self._orbax = ocp.StandardCheckpointer()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def save(self, step: int, state: PyTree) -> None:
        """Starts to save a tree of arrays; waits for the save before, not for this.

        The arrays may be donated or overwritten as soon as the call returns.

        Args:
          step: names the checkpoint, at least 0.
          state: a pytree of arrays, typed keys among them.

        Raises:
          ValueError: if a sealed checkpoint of that step exists.
          RuntimeError: if the save before this one failed; its cause is chained.
        """
        self._join()
        check_count("Checkpoints.save", least=0, step=step)
        _check_leaves(state)
        step = int(step)
        folder = self._folder(step)
        if step in self._sealed():
            raise ValueError(
                f"A checkpoint of step {step} exists in {self.directory}: restore it, "
                "or choose another folder."
            )
        if self._leader and folder.exists():
            _delete(folder)
        try:
            self._orbax.save(folder, {"state": state})  # Orbax takes no bare array
        except OSError as error:
            raise self._failure(step, error) from error
        leaves = _describe(state)
        # Not a daemon: an interpreter that exits waits for the seal.
        self._sealing = threading.Thread(target=self._seal, args=(step, leaves))
        self._sealing.start()

    def restore(self, template: PyTree, *, must_exist: bool = False) -> Restored | None:
        """Restores the newest checkpoint whose files match their seal.

        Args:
          template: a tree like the saved one, of arrays or ``ShapeDtypeStruct``. Its
            shardings say where the result lives, whatever they were when saved; a leaf
            without one goes to the default device.
          must_exist: raises where there is nothing to restore.

        Returns:
          State, step and what was passed over, or ``None``.

        Raises:
          ValueError: if the checkpoint holds another tree than the template: names the
            first leaf that differs.
          FileNotFoundError: if ``must_exist`` and no sound checkpoint is there.
        """
        self._join()
        step, rejected = self._newest_sound() if self._leader else (-1, [])
        if jax.process_count() > 1:
            step = int(multihost_utils.broadcast_one_to_all(np.int32(step)))
        for sentence in rejected:
            _log.warning("%s", sentence)
        if step < 0:
            text = f"no sound checkpoint in {self.directory}"
            if must_exist:
                raise FileNotFoundError("; ".join([text, *rejected]) + ".")
            _log.info("%s: starting afresh.", text)
            if rejected:
                _log.warning("No checkpoint is left: starting afresh.")
            return None
        if rejected:
            _log.warning("Restoring step %d instead.", step)
        folder = self._folder(step)
        _check_template(step, _read_seal(folder)["leaves"], _describe(template))
        wanted = {"state": jax.tree.map(_abstract, template)}
        state = self._orbax.restore(folder, wanted)["state"]
        _log.info("Restored step %d from %s.", step, self.directory)
        return Restored(state, step, tuple(rejected))

    def steps(self) -> list[int]:
        """Lists the sealed steps, oldest first, without reading their files."""
        return sorted(self._sealed())

    def latest_step(self) -> int | None:
        """Gives the newest sealed step, or ``None``."""
        return max(self._sealed(), default=None)

    def wait(self) -> None:
        """Waits until the last save is sealed, on every process."""
        self._join()
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("jaxlab checkpoint sealed")

    def close(self) -> None:
        """Finishes the save under way and frees what Orbax holds."""
        try:
            self._join()
        finally:
            self._orbax.close()

    def _folder(self, step):
        return self.directory / str(step)

    def _sealed(self):
        seals = self.directory.glob(f"*/{_SEAL}")
        return {int(s.parent.name) for s in seals if s.parent.name.isdecimal()}

    def _join(self):
        if self._sealing is not None:
            self._sealing.join()
            self._sealing = None
        if self._error is not None:
            (step, error), self._error = self._error, None
            raise self._failure(step, error) from error

    def _failure(self, step, error):
        kind, text = type(error).__name__, " ".join(str(error).split())[:300]
        return RuntimeError(
            f"The checkpoint of step {step} could not be saved in {self.directory}: "
            f"{kind}: {text}. Free space there, or choose another folder; the sealed "
            f"steps {self.steps()} are whole."
        )

    def _seal(self, step, leaves):
        """Runs in the background from the start of a save to the end of pruning."""
        try:
            self._orbax.wait_until_finished()
            if self._leader:
                _write_seal(self._folder(step), step, leaves)
                self._prune()
        except BaseException as error:
            self._error = step, error  # raised by the next call in the main thread

    def _prune(self):
        kept = sorted(self._sealed())[-self._keep :]
        for folder in self.directory.iterdir():
            name = folder.name
            if name.isdecimal() and int(name) < kept[-1] and int(name) not in kept:
                _delete(folder)

    def _newest_sound(self):
        """Walks from the newest folder to the first whose files match their seal."""
        rejected = []
        names = [f.name for f in self.directory.iterdir() if f.name.isdecimal()]
        for step in sorted(map(int, names), reverse=True):
            fault = _fault(self._folder(step), step)
            if fault is None:
                return step, rejected
            rejected.append(f"The checkpoint of step {step} is not used: {fault}")
            self._set_aside(self._folder(step))
        return -1, rejected

    def _set_aside(self, folder):
        if not (folder / _SEAL).exists():
            return _delete(folder)
        damaged = folder.with_name(f"{folder.name}.damaged")
        if damaged.exists():
            _delete(damaged)
        os.replace(folder, damaged)


def _check_leaves(tree) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        numbers = not isinstance(leaf, np.ndarray) or leaf.dtype.kind not in "OSU"
        if not (hasattr(leaf, "dtype") and hasattr(leaf, "shape") and numbers):
            raise ValueError(
                "Checkpoints.save: state must be a tree of arrays of numbers, got "
                f"{described(leaf)} at state{jax.tree_util.keystr(path)}."
            )


def _describe(tree) -> dict[str, str]:
    """Names the leaves with dtype and shape, such as ``float32[64,10]``."""
    name = lambda x: f"{x.dtype}[{','.join(map(str, x.shape))}]"
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): name(leaf) for path, leaf in leaves}


def _abstract(leaf):
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _check_template(step, saved, wanted):
    if saved == wanted:
        return
    paths = list(dict.fromkeys([*wanted, *saved]))
    differ = [path for path in paths if saved.get(path) != wanted.get(path)]
    lines = [
        f"{path}: {saved.get(path, 'nothing')} in the checkpoint, "
        f"{wanted.get(path, 'nothing')} in the template"
        for path in differ[:3]
    ]
    more = f" ({len(differ)} leaves differ)" if len(differ) > 3 else ""
    raise ValueError(
        f"The checkpoint of step {step} holds another tree than the template: "
        + "; ".join(lines)
        + f"{more}. Build the state with the model and the optimizer of the run that "
        "saved it, or choose another folder."
    )


def _files(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    files = (path for path in sorted(folder.rglob("*")) if not path.is_dir())
    named = {path.relative_to(folder).as_posix(): path for path in files}
    return {name: path for name, path in named.items() if not name.startswith(_SEAL)}


def _digest(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _self_digest(content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _write_seal(folder: pathlib.Path, step: int, leaves: dict[str, str]) -> None:
    files = {n: [p.stat().st_size, _digest(p)] for n, p in _files(folder).items()}
    content = {"step": step, "leaves": leaves, "files": files}
    text = json.dumps({"sha256": _self_digest(content), "content": content}, indent=1)
    temporary = folder / f"{_SEAL}.tmp"
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / _SEAL)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_seal(folder: pathlib.Path):
    """Gives the seal's content, or ``None`` where it does not match its digest."""
    try:
        seal = json.loads((folder / _SEAL).read_bytes())
        content = seal["content"]
        return content if seal["sha256"] == _self_digest(content) else None
    except (ValueError, KeyError, TypeError):
        return None


def _fault(folder: pathlib.Path, step: int) -> str | None:
    """Says what is wrong with a checkpoint, naming the first file; else ``None``."""
    if not (folder / _SEAL).exists():
        return f"it has no {_SEAL}, so its writing was never finished."
    content = _read_seal(folder)
    if content is None:
        return f"the file {_SEAL} is damaged."
    if content["step"] != step:
        return f"the file {_SEAL} belongs to step {content['step']}."
    found, files = _files(folder), content["files"]
    for name in sorted(files.keys() | found.keys()):
        if name not in found:
            return f"the file {name} is missing."
        if name not in files:
            return f"the file {name} was added after it was sealed."
        size, digest = files[name]
        if found[name].stat().st_size != size:
            length = found[name].stat().st_size
            return f"the file {name} has {length} bytes instead of {size}."
        if _digest(found[name]) != digest:
            return f"the file {name} does not match its digest."
    return None


def _delete(folder: pathlib.Path) -> None:
    (folder / _SEAL).unlink(missing_ok=True)
    shutil.rmtree(folder)
