"""Every public Monarch function compiles for a TPU and a GPU that are not here."""

import functools
import inspect

import jax
import jax.numpy as jnp
import pytest

from jaxlab import structured
from jaxlab.structured import FoldedLayer, MMStarFactors, MonarchFactors

N, BLOCKS, TOKENS = 64, 4, 16
P = N // BLOCKS


def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


PAIR = MonarchFactors(array(BLOCKS, P, P), array(BLOCKS, P, P))
LAYER = FoldedLayer(
    array(BLOCKS, BLOCKS, P // BLOCKS, P),
    array(BLOCKS, P, BLOCKS, P // BLOCKS),
    array(BLOCKS, P),
)
MMSTAR = MMStarFactors(*(array(8, 8, 8),) * 3, residual=array())
ROWS, COLUMNS = array(TOKENS, N), array(N, TOKENS)
MATRIX = array(N, N, dtype=jnp.float32)
CUT = {"nblocks_in": BLOCKS, "nblocks_out": BLOCKS, "rank": 2}


def folded(pairs, *, order):
    """Folds a chain with biases, as a function of arrays alone."""
    biases = [jnp.zeros(N, pair[0].dtype) for pair in pairs]
    return structured.fold_monarch_stack(pairs, biases=biases, order=order)


def keyed(function):
    """Makes the key inside: shapes say nothing about it."""
    return lambda seed, *rest, **options: function(jax.random.key(0), *rest, **options)


# name: (arguments, keyword arguments of each variant)
DIFFERENTIABLE = {
    "circulant_factors": ((array(N, dtype=jnp.float32),), [{}]),
    "fold_monarch_stack": (
        ([PAIR, PAIR],),
        [{"order": "interleaved"}, {"order": "block_major"}],
    ),
    "kronecker_factors": ((array(4, 4), array(8, 8)), [{}]),
    "mmstar_matmul": ((ROWS, MMSTAR), [{}]),
    "mmstar_to_dense": ((MMSTAR,), [{}]),
    "monarch_chain_matmul": ((ROWS, [*PAIR]), [{}]),
    "monarch_chain_to_dense": (([*PAIR],), [{}]),
    "monarch_matmul": (
        (ROWS, *PAIR),
        [{"output_layout": "interleaved"}, {"output_layout": "block_major"}],
    ),
    "monarch_matmul_features": (
        (COLUMNS, *PAIR),
        [{"output_layout": "interleaved"}, {"output_layout": "block_major"}],
    ),
    "monarch_project_error": ((MATRIX,), [CUT]),
    "monarch_stack_matmul": (
        (COLUMNS, [LAYER, LAYER]),
        [
            {"order": "interleaved", "activation": jax.nn.relu},
            {"order": "block_major", "activation": jax.nn.relu},
            {"order": "interleaved", "output_layout": "block_major"},
        ],
    ),
    "monarch_to_dense": (tuple(PAIR), [{}]),
    "unfold_monarch_stack": (([LAYER, LAYER],), [{"order": "interleaved"}]),
}
CONSTANT = {
    "dft_chain_factors": ((), [{"radices": (4, 4, 4)}]),
    "dft_factors": ((), [{"n": N, "nblocks": 8}]),
    "hadamard_factors": ((), [{"n": N, "nblocks": 8}]),
    "init_monarch": ((array(),), [{"in_features": N, "out_features": N}]),
    "monarch_project": ((MATRIX,), [CUT]),
    "monarch_project_data": (
        (MATRIX, array(TOKENS, N, dtype=jnp.float32)),
        [CUT | {"num_iterations": 2}],
    ),
}
# Numbers, and eigenvectors of matrices that are not symmetric, for CPUs; and what has
# a file of its own.
NOT_COMPILED = {"factor_mmstar", "monarch_matmul_fused", "monarch_mup_multipliers"}
TAKE_PLATFORM = {"monarch_matmul", "monarch_stack_matmul"}
EVERY = [
    (name, options)
    for name, (_, variants) in (DIFFERENTIABLE | CONSTANT).items()
    for options in variants
]


def case(name, options, platform):
    function = {
        "fold_monarch_stack": folded,
        "init_monarch": keyed(structured.init_monarch),
    }.get(name, getattr(structured, name))
    if name in TAKE_PLATFORM:
        options = options | {"platform": platform}
    arguments, _ = (DIFFERENTIABLE | CONSTANT)[name]
    return functools.partial(function, **options), arguments


def test_every_public_function_is_here():
    functions = {
        name
        for name in structured.__all__
        if inspect.isfunction(getattr(structured, name))
    }
    assert functions == set(DIFFERENTIABLE) | set(CONSTANT) | NOT_COMPILED


@pytest.mark.parametrize("place", ["tpu", "gpu"])
@pytest.mark.parametrize(("name", "options"), EVERY)
def test_it_compiles(place, name, options, request):
    target = request.getfixturevalue(place)
    function, arguments = case(name, options, target.platform)
    compiled = target.compile(function, *arguments)
    expected = jax.eval_shape(function, *arguments)
    found = jax.tree.map(lambda a: (a.shape, a.dtype), compiled.out_info)
    assert found == jax.tree.map(lambda a: (a.shape, a.dtype), expected)


@pytest.mark.parametrize("place", ["tpu", "gpu"])
@pytest.mark.parametrize(
    ("name", "options"), [pair for pair in EVERY if pair[0] in DIFFERENTIABLE]
)
def test_its_gradient_compiles(place, name, options, request):
    target = request.getfixturevalue(place)
    function, arguments = case(name, options, target.platform)

    def loss(*arrays):
        leaves = jax.tree.leaves(function(*arrays))
        return sum(jnp.sum(jnp.abs(leaf.astype(jnp.complex64)) ** 2) for leaf in leaves)

    positions = tuple(range(len(arguments)))
    compiled = target.compile(jax.grad(loss, positions), *arguments)
    found = jax.tree.map(lambda a: (a.shape, a.dtype), compiled.out_info)
    assert found == jax.tree.map(lambda a: (a.shape, a.dtype), arguments)
