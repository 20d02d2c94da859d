"""Calls of the rooms layers, models, training and datasets."""

import pathlib
import runpy
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxlab import datasets, layers, models, training
from jaxlab.datasets.dataset import round_for_digest
from jaxlab.datasets.store import load_or_prepare
from jaxlab.likelihoods import Gaussian
from jaxlab.objective import Objective, plain
from jaxlab.training.feed import place, resident

_HARNESS = runpy.run_path(str(pathlib.Path(__file__).with_name("harness.py")))
call, _ramp = _HARNESS["call"], _HARNESS["ramp"]


KEY = jax.random.key(0)
OBJECTIVE = Objective(plain(lambda w, x: jnp.tanh(x @ w["a"]) @ w["b"]), Gaussian())
PARAMS = {"a": _ramp(3, 2), "b": _ramp(2, 1)}
BATCH = (_ramp(4, 3), _ramp(4, 1), jnp.ones(4))
SGD = optax.sgd(0.1)


def _monarch_linear(x, in_features, out_features, nblocks):
    layer = layers.MonarchLinear(
        in_features, out_features, nblocks=nblocks, rngs=nnx.Rngs(0)
    )
    return layer(x)


def _monarch_stack(x, sizes, nblocks):
    return layers.MonarchStack(sizes, nblocks=nblocks, rngs=nnx.Rngs(0))(x)


def _tuning_linear(x, u, hyperparameters):
    layer = layers.SelfTuningLinear(
        3, 2, hyperparameters=hyperparameters, rngs=nnx.Rngs(0)
    )
    return layer(x, u)


def _tuning_conv(x, u, window, hyperparameters):
    layer = layers.SelfTuningConv(
        1, 2, window, hyperparameters=hyperparameters, rngs=nnx.Rngs(0)
    )
    return layer(x, u)


def _monarchize(x, nblocks, rank):
    model = layers.monarchize(
        nnx.Linear(8, 8, rngs=nnx.Rngs(0)), nblocks=nblocks, rank=rank
    )
    return model(x)


def _densify(x):
    return layers.densify(layers.MonarchLinear(8, 6, nblocks=2, rngs=nnx.Rngs(0)))(x)


def _monarchize_params(params, nblocks):
    return layers.monarchize_params(params, lambda path, k: True, nblocks=nblocks)


def _autoencoder(x, sizes):
    return models.Autoencoder(sizes, rngs=nnx.Rngs(0))(x)


def _mlp(x, sizes):
    return models.MLP(sizes, rngs=nnx.Rngs(0))(x)


def _cnn(x, side, features, strides, outputs):
    model = models.CNN(
        side=side, features=features, strides=strides, outputs=outputs, rngs=nnx.Rngs(0)
    )
    return model(x)


def _gpt(tokens, **sizes):
    return models.GPT(**sizes, rngs=nnx.Rngs(0))(tokens)


def _mixer(x, **sizes):
    return models.Mixer(**sizes, rngs=nnx.Rngs(0))(x)


def _vit(x, **sizes):
    return models.ViT(**sizes, rngs=nnx.Rngs(0))(x)


def _create_state(key, params, loss_scale):
    return training.create_state(key, params, optax.adam(0.1), loss_scale=loss_scale)


def _train_step(key, params, batch, accumulate, remat):
    step = training.make_train_step(
        OBJECTIVE, SGD, accumulate=accumulate, remat=remat, donate=False
    )
    return step(training.create_state(key, params, SGD), batch)[0].params


def _fit(key, params, batch, epochs, batch_size, evaluate_every, steps_per_call):
    state = training.create_state(key, jax.tree.map(jnp.array, params), SGD)
    result = training.fit(
        OBJECTIVE,
        SGD,
        state,
        batch,
        epochs=epochs,
        batch_size=batch_size,
        evaluate_every=evaluate_every,
        steps_per_call=steps_per_call,
        progress=False,
    )
    return result.state.params


def _fit_streamed(key, params, batch, steps_per_epoch):
    state = training.create_state(key, jax.tree.map(jnp.array, params), SGD)
    result = training.fit(
        OBJECTIVE,
        SGD,
        state,
        lambda epoch, step: batch,
        epochs=1,
        steps_per_epoch=steps_per_epoch,
        progress=False,
    )
    return result.state.params


def _evaluate(params, batch, batch_size):
    return training.evaluate(OBJECTIVE, params, (), batch, batch_size=batch_size)


def _monitor(key, params, batch, k, num_matvecs, every):
    monitor = training.CurvatureMonitor(
        OBJECTIVE, batch, key=key, k=k, num_matvecs=num_matvecs, every=every
    )
    record = monitor.record(1, params)
    return {"sharpness": record["sharpness"], "trace": record["trace"]}


def _checkpoints(state, step, keep):
    with (
        tempfile.TemporaryDirectory() as folder,
        training.Checkpoints(folder, keep=keep) as checkpoints,
    ):
        checkpoints.save(step, state)
        checkpoints.wait()
        return checkpoints.restore(state).state


def _with_extra_args(params, updates):
    tx = training.with_extra_args(optax.MultiSteps(SGD, 2))
    return tx.update(updates, tx.init(params), params, nobody=1)[0]


def _resident(data, batch_size, drop_remainder):
    return resident(data, batch_size=batch_size, drop_remainder=drop_remainder).arrays


class _Model(nnx.Module):
    """A module of the caller's, so that errors within count as theirs."""

    def __init__(self):
        self.linear = nnx.Linear(3, 2, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.linear(x)


def _from_nnx(x):
    made = training.from_nnx(_Model(), Gaussian())
    return made.objective.apply_fn(made.params, (), x, key=None, train=False)[0]


def _place(leaf):
    mesh = jax.make_mesh((1,), ("d",))
    return place(leaf, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))


def _switched(x):
    model = layers.MonarchLinear(8, 6, nblocks=2, rngs=nnx.Rngs(0))
    parts = training.from_nnx(model, Gaussian())
    state = training.create_state(KEY, parts.params, SGD)
    new = training.switch_layers(
        model, state, layers.densify, likelihood=Gaussian(), optimizer=SGD
    )
    return new.model(x)


def _reverse(inputs, targets, epochs, batch_size, dense_fraction):
    model = layers.MonarchLinear(8, 6, nblocks=2, rngs=nnx.Rngs(0))
    parts = training.from_nnx(model, Gaussian())
    state = training.create_state(KEY, parts.params, SGD)
    result = training.reverse_sparsification(
        model,
        state,
        (inputs, targets),
        likelihood=Gaussian(),
        optimizer=SGD,
        epochs=epochs,
        batch_size=batch_size,
        dense_fraction=dense_fraction,
        progress=False,
    )
    return result.dense.state.params


def _arrays(data):
    return data.splits, data.extras


def _curves(train, test, seed):
    return _arrays(datasets.curves(train=train, test=test, seed=seed))


def _clusters(**sizes):
    return _arrays(datasets.gaussian_clusters(**sizes))


def _planted(structure, **sizes):
    return _arrays(datasets.planted_structure(structure, **sizes))


def _make_dataset(inputs, targets):
    return _arrays(datasets.make_dataset("one", "One.", {"train": (inputs, targets)}))


def _content_digest(inputs, targets):
    return datasets.content_digest({"train": (inputs, targets)})


def _load(name):
    return _arrays(datasets.load(name))


def _stored(inputs, targets):
    build = lambda: datasets.make_dataset("one", "One.", {"train": (inputs, targets)})
    with tempfile.TemporaryDirectory() as folder:
        return _arrays(load_or_prepare(build, "one", data_dir=folder))


TOKENS = jnp.array([[0, 3, 6], [1, 2, 0]])
TABLE, LABELS = np.asarray(_ramp(4, 2)), np.arange(4, dtype=np.int32)
DENSE = {"dense": {"kernel": _ramp(8, 6), "bias": jnp.zeros(6)}}
MONARCH = {"dense": {"w1": _ramp(2, 2, 4), "w2": _ramp(2, 3, 2)}}
IMAGE = {"side": 4, "patch": 2, "width": 4, "blocks": 1, "outputs": 3}
STEP = {"key": KEY, "params": PARAMS, "batch": BATCH}

CALLS = [
    call(layers.MonarchLinear, _ramp(2, 8), 8, 6, 2, use=_monarch_linear),
    call(layers.MonarchStack, _ramp(2, 8), (8, 8, 6), 2, use=_monarch_stack),
    call(layers.SelfTuningLinear, _ramp(4, 3), _ramp(4, 2), 2, use=_tuning_linear),
    call(
        layers.SelfTuningConv,
        _ramp(2, 4, 4, 1),
        _ramp(2, 2),
        (3, 3),
        2,
        use=_tuning_conv,
    ),
    call(layers.densify, _ramp(2, 8), use=_densify),
    call(layers.monarchize, _ramp(2, 8), 2, 2, use=_monarchize),
    call(layers.densify_params, MONARCH),
    # A bias is handed through whatever it is.
    call(
        layers.monarchize_params,
        DENSE,
        2,
        use=_monarchize_params,
        skip=("params:dtype",),
    ),
    call(models.Autoencoder, _ramp(2, 6), (6, 4, 2), use=_autoencoder),
    call(models.MLP, _ramp(2, 3), (3, 4, 2), use=_mlp),
    call(models.CNN, _ramp(2, 4, 4, 1), 4, (2,), (1,), 3, use=_cnn),
    call(
        models.GPT,
        tokens=TOKENS,
        vocabulary=7,
        context=5,
        width=4,
        layers=1,
        heads=2,
        use=_gpt,
    ),
    call(
        models.Mixer,
        x=_ramp(2, 16),
        token_hidden=2,
        channel_hidden=4,
        use=_mixer,
        **IMAGE,
    ),
    call(models.ViT, x=_ramp(2, 16), heads=2, use=_vit, **IMAGE),
    # Integer leaves are kept as they are.
    call(
        training.create_state,
        KEY,
        PARAMS,
        8.0,
        use=_create_state,
        skip=("params:dtype",),
    ),
    call(
        training.make_train_step,
        accumulate=2,
        remat=False,
        use=_train_step,
        like="params",
        **STEP,
    ),
    call(
        training.fit,
        epochs=1,
        batch_size=2,
        evaluate_every=1,
        steps_per_call=2,
        use=_fit,
        like="params",
        skip=("epochs:count",),
        **STEP,
    ),
    call(training.fit, steps_per_epoch=1, use=_fit_streamed, like="params", **STEP),
    call(
        training.reverse_sparsification,
        _ramp(4, 8),
        _ramp(4, 6),
        2,
        2,
        0.5,
        use=_reverse,
    ),
    call(training.switch_layers, _ramp(2, 8), use=_switched),
    call(training.evaluate, PARAMS, BATCH, 2, use=_evaluate),
    call(
        training.CurvatureMonitor,
        KEY,
        PARAMS,
        BATCH,
        1,
        2,
        1,
        use=_monitor,
        skip=("value",),
    ),
    call(  # what is saved comes back, integers too
        training.Checkpoints,
        PARAMS,
        3,
        2,
        use=_checkpoints,
        like="state",
        skip=("dtype",),
    ),
    call(training.accuracy, _ramp(4, 3), jnp.array([0, 1, 2, 0])),
    call(training.epoch_order, KEY, 3, size=4),
    call(training.from_nnx, _ramp(2, 3), use=_from_nnx),
    call(
        training.with_extra_args,
        PARAMS,
        PARAMS,
        use=_with_extra_args,
        like="updates",
        skip=("shape",),
    ),
    call(resident, BATCH, 2, False, use=_resident, skip=("dtype", "layout")),
    call(place, _ramp(4, 2), use=_place, like="leaf", skip=("dtype",)),
    call(datasets.curves, 2, 1, 0, use=_curves),
    call(
        datasets.gaussian_clusters,
        classes=3,
        dim=2,
        separation=4.0,
        train=6,
        validation=2,
        test=2,
        seed=0,
        use=_clusters,
    ),
    call(
        datasets.planted_structure,
        "monarch",
        train=4,
        validation=2,
        test=2,
        noise_scale=0.1,
        seed=0,
        use=_planted,
    ),
    call(
        datasets.make_dataset,
        TABLE,
        LABELS,
        use=_make_dataset,
        skip=("dtype", "layout"),
    ),
    call(datasets.content_digest, TABLE, LABELS, use=_content_digest, skip=("layout",)),
    call(round_for_digest, TABLE),
    call(
        load_or_prepare, TABLE, LABELS, use=_stored, skip=("dtype", "layout", "value")
    ),
    call(datasets.load, "digits", use=_load),
    call(datasets.encode_text, "def f(x):"),
    call(datasets.decode_text, np.arange(5)),
    call(datasets.windows, np.arange(8), context=3),
]
