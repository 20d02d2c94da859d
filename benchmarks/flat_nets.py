"""Optimizers of the claim on the gradient-norm penalty, tuned and run on noisy digits.

A method is an optimizer with numbers to choose. They are chosen from their full grid by
the mean accuracy on the validation rows, over seeds that take no part in the judgement.
"""

import functools
import itertools
import statistics
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax

from benchmarks import noisy_digits
from benchmarks.noisy_digits import Make, Net, Splits, momentum_sgd
from jaxlab.sharpness import gnp_gradient_exact, gradient_norm_penalty

FIRST_TUNING_SEED = 1_000

Numbers = dict[str, float]
Samples = dict[str, list[Any]]


@functools.cache
def plain(steps: int) -> Make:
    """Gives the maker of momentum SGD with weight decay in the gradient."""

    def make(rate, decay):
        return optax.chain(optax.add_decayed_weights(decay), momentum_sgd(rate, steps))

    return make


@functools.cache
def penalised(steps: int) -> Make:
    """Gives the maker of the same behind the penalty; ``penalty`` is alpha x radius."""

    def make(rate, decay, alpha, penalty):
        link = gradient_norm_penalty(alpha, penalty / alpha)
        return optax.chain(link, plain(steps)(rate, decay))

    return make


def exact_penalty(penalty: Any) -> optax.GradientTransformationExtraArgs:
    """Makes the link that differentiates the norm of the gradient itself."""

    def update(updates, state, params=None, *, value_fn, **extra_args):
        return gnp_gradient_exact(value_fn, params, penalty=penalty), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


@functools.cache
def exact(steps: int) -> Make:
    """Gives the maker of momentum SGD behind the exact penalty."""

    def make(rate, penalty):
        return optax.chain(exact_penalty(penalty), momentum_sgd(rate, steps))

    return make


class Method(NamedTuple):
    """An optimizer, the values of its numbers to choose from, and the weights taken."""

    make: Callable[[int], Make]
    grid: Mapping[str, tuple[float, ...]]
    early_stopping: bool = False

    def choices(self) -> list[Numbers]:
        """Lists every point of the grid."""
        points = itertools.product(*self.grid.values())
        return [dict(zip(self.grid, point, strict=True)) for point in points]


class Place(NamedTuple):
    """Where methods are run: a net and the length of training."""

    net: Net
    steps: int
    batch_size: int

    def trained(
        self, method: Method, numbers: Numbers, seed: int
    ) -> tuple[Any, Splits]:
        """Trains once; gives the weights and the rows."""
        data = noisy_digits.splits(seed)
        found = noisy_digits.train(
            self.net,
            method.make(self.steps),
            numbers,
            jax.random.key(seed),
            data,
            steps=self.steps,
            batch_size=self.batch_size,
        )
        return (found.best if method.early_stopping else found.params), data

    def tuned(self, method: Method, seeds: int) -> tuple[Numbers, list[Any]]:
        """Chooses the numbers; gives them and ``[numbers, accuracies]`` of all."""
        tried = []
        for numbers in method.choices():
            accuracies = []
            for seed in range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + seeds):
                params, data = self.trained(method, numbers, seed)
                measured = noisy_digits.quality(self.net, params, data)
                accuracies.append(measured["validation accuracy"])
            tried.append([numbers, accuracies])
        # Of equals the first: grids begin with the least change.
        best, _ = max(tried, key=lambda pair: statistics.mean(pair[1]))
        return best, tried

    def judged(self, method: Method, numbers: Numbers, seeds: int) -> Samples:
        """Runs on the seeds that are judged and measures."""
        samples: Samples = {}
        for seed in range(seeds):
            params, data = self.trained(method, numbers, seed)
            measured = noisy_digits.quality(self.net, params, data)
            top = noisy_digits.top_eigenvalue(self.net, params, data.train)
            for name, value in (measured | {"top eigenvalue": top}).items():
                samples.setdefault(name, []).append(value)
        return samples
