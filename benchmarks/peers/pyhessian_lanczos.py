"""PyHessian's Lanczos in torch, on the same net, parameters and data.

Its ``density`` ends with ``torch.eig``, which torch no longer has; for the time of the
call its successor stands there, for the symmetric T that it is given. Tensors on the
CPU; it draws its own start vector.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import numpy as np
import torch  # pyrefly: ignore[missing-import]
from pyhessian import hessian  # pyrefly: ignore[missing-import]

from benchmarks.curvature_sides import Net

VERSION = f"pyhessian {metadata.version('pyhessian')}, torch {torch.__version__}"


def lanczos(net: Net, order: int) -> Callable[[], np.ndarray]:
    """Gives a call that runs it and returns the Ritz values, ascending."""
    torch.set_num_threads(1)
    model = torch.nn.Sequential(*_layers(net))
    x, y = (torch.from_numpy(np.array(part)) for part in net.batch)
    criterion = torch.nn.CrossEntropyLoss()
    with warnings.catch_warnings():
        # torch warns of the graph that PyHessian keeps between parameter and gradient.
        warnings.filterwarnings("ignore", "Using backward", UserWarning)
        computer = hessian(model, criterion, (x, y.long()), cuda=False)

    def call():
        with _eig():
            values, _ = computer.density(iter=order, n_v=1)
        return np.sort(np.array(values[0]))

    return call


@contextlib.contextmanager
def _eig() -> Iterator[None]:
    def eig(matrix: Any, eigenvectors: bool) -> Any:
        values, vectors = torch.linalg.eigh(matrix)
        return torch.stack([values, torch.zeros_like(values)], dim=1), vectors

    old = getattr(torch, "eig", None)
    torch.eig = eig
    try:
        yield
    finally:
        if old is None:
            del torch.eig
        else:
            torch.eig = old


def _layers(net: Net) -> list[Any]:
    """Restates the net: fully connected, or convolutions of 3 x 3 and one layer."""
    tensor = lambda value: torch.nn.Parameter(torch.from_numpy(np.array(value)))
    params, layers = net.params, []
    if "convolutions" not in params:
        for index in sorted(params["layers"]):
            layers += [_dense(params["layers"][index], tensor), torch.nn.ReLU()]
        return layers[:-1]
    edge = round(net.batch[0].shape[1] ** 0.5)
    layers.append(torch.nn.Unflatten(1, (1, edge, edge)))
    strides = _strides(net, edge)
    for index, stride in zip(sorted(params["convolutions"]), strides, strict=True):
        values = params["convolutions"][index]
        kernel = np.array(values["kernel"]).transpose(3, 2, 0, 1)
        outputs, inputs = kernel.shape[:2]
        layer = torch.nn.Conv2d(inputs, outputs, 3, stride=stride)
        layer.weight, layer.bias = tensor(kernel), tensor(values["bias"])
        # What jax calls SAME: an even edge at stride 2 is padded at its end only.
        pads = (1, 1, 1, 1) if stride == 1 else (0, 1, 0, 1)
        layers += [torch.nn.ZeroPad2d(pads), layer, torch.nn.ReLU()]
    layers += [_ChannelsLast(), torch.nn.Flatten(), _dense(params["head"], tensor)]
    return layers


def _strides(net: Net, edge: int) -> list[int]:
    """Reads off the strides: all 1 but for the last, which the head tells."""
    kernels = net.params["convolutions"]
    last = kernels[max(kernels)]["kernel"].shape[-1]
    cells = net.params["head"]["kernel"].shape[0] // last
    return [1] * (len(kernels) - 1) + [round(edge / cells**0.5)]


class _ChannelsLast(torch.nn.Module):
    def forward(self, x: Any) -> Any:
        return x.permute(0, 2, 3, 1)


def _dense(values: Any, tensor: Callable[..., Any]) -> Any:
    kernel = np.array(values["kernel"])
    layer = torch.nn.Linear(*kernel.shape)
    layer.weight, layer.bias = tensor(kernel.T.copy()), tensor(values["bias"])
    return layer
