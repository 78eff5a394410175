"""Cross-entropy in chunks of tokens: equal to that of whole logits, in memory that does not grow with the tokens."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5x_like.kernels.cross_entropy import cross_entropy
from t5x_like.kernels.linear_cross_entropy import LossSetting, LossSharding, linear_cross_entropy
from t5x_like.kernels.matmul import matmul

ROWS, LENGTH, WIDTH, VOCABULARY = 4, 6, 8, 24


def example(dtype: Any = jnp.float32, *, bias: bool = True) -> tuple[tuple[Any, ...], jax.Array, jax.Array]:
    """Return (states, kernel, bias), targets and weights, some of which are 0."""
    random = np.random.default_rng(0)
    states = jnp.asarray(random.normal(size=(ROWS, LENGTH, WIDTH)), dtype)
    kernel = jnp.asarray(random.normal(size=(WIDTH, VOCABULARY)), jnp.float32)
    offsets = jnp.asarray(random.normal(size=VOCABULARY), jnp.float32) if bias else None
    targets = jnp.asarray(random.integers(0, VOCABULARY, (ROWS, LENGTH)), jnp.int32)
    weights = jnp.asarray(random.integers(0, 3, (ROWS, LENGTH)), jnp.float32)
    # Some tokens whose target is the best, so that the accuracy is neither 0 nor 1.
    best = jnp.argmax(states.astype(jnp.float32) @ kernel, axis=-1)
    return (states, kernel, offsets), jnp.where(jnp.arange(LENGTH) % 3 == 0, best, targets).astype(jnp.int32), weights


def dense(parameters: tuple[Any, ...], targets: jax.Array, weights: jax.Array, setting: LossSetting) -> Any:
    """Return the objective, and the losses of the tokens, from whole logits."""
    states, kernel, bias = parameters
    logits = matmul(states, kernel, 1, jnp.dtype(jnp.float32))
    if bias is not None:
        logits = logits + bias
    if setting.softcap is not None:
        logits = setting.softcap * jnp.tanh(logits / setting.softcap)
    loss, z_term = cross_entropy(logits, targets, z_loss=setting.z_loss, label_smoothing=setting.label_smoothing)
    is_best = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
    return jnp.sum(weights * (setting.coefficient * loss + z_term)), (loss, z_term, is_best)


def chunked(parameters: tuple[Any, ...], targets: jax.Array, weights: jax.Array, setting: LossSetting) -> Any:
    objective, *rest = linear_cross_entropy(*parameters, targets, weights, setting)
    return objective, tuple(rest)


def values_and_gradients(function: Any, parameters: Any, targets: Any, weights: Any, setting: LossSetting) -> Any:
    # Three times the objective: the backward pass scales the gradient.
    def scaled(parameters: Any) -> Any:
        objective, losses = function(parameters, targets, weights, setting)
        return 3.0 * objective, losses

    return jax.jit(jax.value_and_grad(scaled, has_aux=True))(parameters)


def assert_equal(found: Any, expected: Any, value: float = 1e-6, gradient: float = 1e-5) -> None:
    def close(bound: float) -> Any:
        def check(a: Any, b: Any) -> None:
            assert a.dtype == b.dtype
            a, b = (np.asarray(x, np.float32) for x in (a, b))
            np.testing.assert_allclose(a, b, rtol=bound, atol=bound * np.abs(b).max())

        return check

    jax.tree.map(close(value), found[0], expected[0])
    jax.tree.map(close(gradient), found[1], expected[1])


SETTINGS = {
    "plain": LossSetting(),
    "z_loss": LossSetting(z_loss=1e-2, coefficient=0.7),
    "smoothing_and_softcap": LossSetting(z_loss=1e-2, label_smoothing=0.1, softcap=3.0),
}


@pytest.mark.parametrize("chunk", [5, 24])
@pytest.mark.parametrize("name", SETTINGS)
def test_values_and_gradients_equal_those_of_whole_logits(name: str, chunk: int) -> None:
    """Five tokens do not divide the 24 of the batch: the last chunk is filled up."""
    setting = SETTINGS[name]._replace(chunk_tokens=chunk)
    parameters, targets, weights = example(bias=name != "plain")
    expected = values_and_gradients(dense, parameters, targets, weights, setting)
    assert_equal(values_and_gradients(chunked, parameters, targets, weights, setting), expected)
    accuracy = float(jnp.mean(expected[0][1][2]))
    assert 0 < accuracy < 1
    without_gradient = jax.jit(lambda *args: chunked(*args, setting))(parameters, targets, weights)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), without_gradient[1], expected[0][1]
    )


def padded_and_whole(parameters: Any, targets: jax.Array, vocab_size: int) -> tuple[Any, Any, jax.Array]:
    """Return parameters whose columns from `vocab_size` on are zeros, those without these columns, and targets."""
    states, kernel, bias = parameters
    is_token = jnp.arange(VOCABULARY) < vocab_size
    padded = (states, kernel * is_token, bias * is_token)
    return padded, (states, kernel[:, :vocab_size], bias[:vocab_size]), targets % vocab_size


def assert_padding_has_no_part(found: Any, whole: Any, vocab_size: int) -> None:
    """Compare values and gradients of a padded kernel with those of the kernel without padding."""
    values, (states, kernel, bias) = found
    assert not np.any(kernel[:, vocab_size:]) and not np.any(bias[vocab_size:])
    assert_equal((values, (states, kernel[:, :vocab_size], bias[:vocab_size])), whole)


@pytest.mark.parametrize("name", SETTINGS)
def test_padding_has_neither_probability_nor_gradient(name: str) -> None:
    setting, vocab_size = SETTINGS[name]._replace(chunk_tokens=5), 19
    parameters, targets, weights = example()
    padded, whole, targets = padded_and_whole(parameters, targets, vocab_size)
    expected = values_and_gradients(dense, whole, targets, weights, setting)
    found = values_and_gradients(chunked, padded, targets, weights, setting._replace(vocab_size=vocab_size))
    assert_padding_has_no_part(found, expected, vocab_size)


def test_bfloat16_states_round_as_with_whole_logits() -> None:
    setting = LossSetting(z_loss=1e-2, chunk_tokens=5)
    example_16 = example(jnp.bfloat16)
    expected = values_and_gradients(dense, *example_16, setting)
    assert_equal(values_and_gradients(chunked, *example_16, setting), expected, value=1e-5, gradient=1e-2)


MESHES = {
    "rows_and_vocabulary": ({"fsdp": 2, "tensor": 4}, ("fsdp",), (), ("tensor",), ("fsdp",)),
    "rows_length_and_vocabulary": ({"data": 2, "context": 2, "tensor": 2}, ("data",), ("context",), ("tensor",), ()),
    "stored_over_rows_and_length": ({"fsdp": 2, "context": 2}, ("fsdp",), ("context",), (), ("fsdp", "context")),
}


@pytest.mark.parametrize("name", MESHES)
def test_losses_do_not_depend_on_the_mesh(name: str) -> None:
    degrees, batch, length, vocab, embed = MESHES[name]
    count = int(np.prod(list(degrees.values())))
    mesh = Mesh(np.array(jax.devices()[:count]).reshape(tuple(degrees.values())), tuple(degrees))
    setting = SETTINGS["smoothing_and_softcap"]._replace(chunk_tokens=2)
    parameters, targets, weights = example()
    expected = values_and_gradients(dense, parameters, targets, weights, setting)
    on_mesh = setting._replace(sharding=LossSharding(mesh, batch, length, vocab, embed))
    kernel = NamedSharding(mesh, PartitionSpec(embed or None, vocab or None))
    placed = (parameters[0], jax.device_put(parameters[1], kernel), parameters[2])
    found = values_and_gradients(chunked, placed, targets, weights, on_mesh)
    assert_equal(found, expected)
    assert found[1][1].sharding.is_equivalent_to(kernel, 2), "the gradient is split as the parameter"


def test_a_device_may_have_padding_alone() -> None:
    """The last of four devices has the columns 18 to 23."""
    vocab_size = 17
    degrees, batch, length, vocab, embed = MESHES["rows_and_vocabulary"]
    mesh = Mesh(np.array(jax.devices()).reshape(tuple(degrees.values())), tuple(degrees))
    parameters, targets, weights = example()
    padded, whole, targets = padded_and_whole(parameters, targets, vocab_size)
    setting = SETTINGS["smoothing_and_softcap"]._replace(chunk_tokens=5)
    expected = values_and_gradients(dense, whole, targets, weights, setting)
    sharding = LossSharding(mesh, batch, length, vocab, embed)
    on_mesh = setting._replace(sharding=sharding, vocab_size=vocab_size)
    found = values_and_gradients(chunked, padded, targets, weights, on_mesh)
    assert_padding_has_no_part(found, expected, vocab_size)


def temporary_bytes(function: Any, tokens: int, vocabulary: int, setting: LossSetting) -> int:
    shapes = [(1, tokens, 32), (32, vocabulary)]
    parameters = (*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes), None)
    targets = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    weights = jax.ShapeDtypeStruct((1, tokens), jnp.float32)

    def loss(parameters: Any, targets: Any, weights: Any) -> Any:
        return jax.value_and_grad(lambda p: function(p, targets, weights, setting)[0])(parameters)

    analysis = jax.jit(loss).lower(parameters, targets, weights).compile().memory_analysis()
    return int(analysis.temp_size_in_bytes)


def test_memory_is_that_of_a_chunk_and_of_the_gradient_of_the_kernel() -> None:
    setting = LossSetting(z_loss=1e-4, chunk_tokens=64)
    tokens, vocabulary = 2048, 4096
    whole = temporary_bytes(dense, tokens, vocabulary, setting)
    found = temporary_bytes(chunked, tokens, vocabulary, setting)
    logits, kernel = 4 * tokens * vocabulary, 4 * 32 * vocabulary
    assert whole > 0.9 * logits
    # Three arrays of the size of a chunk's logits, and the gradient of the kernel with what a chunk adds to it.
    assert found < 3 * (logits * 64 // tokens) + 2 * kernel + 4 * tokens * 32 * 4
    assert temporary_bytes(chunked, 2 * tokens, vocabulary, setting) < 1.2 * found + 4 * tokens * 32 * 4
