"""ELECTRA: replaced tokens, the parameters that each loss trains, and the trained encoder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.config_examples import changed
from helpers.config_examples import example as run_example
from helpers.model_examples import VOCABULARY, model, parameters, tokens

from t5x_like.config.model import MoEConfig
from t5x_like.config.validation import validate
from t5x_like.errors import DataError
from t5x_like.models.electra import detection, sample
from t5x_like.models.factory import abstract_model, bind_params
from t5x_like.monitoring.metrics import compute
from t5x_like.training.losses import batch_metrics, summed_loss

MASK = VOCABULARY - 1
LOSS = "discriminator/loss"


def electra(positions: str = "learned"):
    encoder = model("encoder", positions, embedding_norm=True, tie_embeddings=True, lm_head_transform=True).encoder
    generator = dataclasses.replace(encoder, d_model=16, num_heads=2, num_kv_heads=2, d_ff=24)
    return model(
        "encoder",
        positions,
        embedding_norm=True,
        tie_embeddings=True,
        lm_head_transform=True,
        head_bias=True,
        generator=generator,
        embedding_dim=24,
    )


def batch_of(seed: int = 0, rows: int = 4, length: int = 24, padding: int = 3):
    original = tokens(seed, rows, length) % (MASK - 1) + 1
    original[:, length - padding :] = 0
    masked = (np.random.default_rng(seed).random(original.shape) < 0.3) & (original != 0)
    return {
        "encoder_input_tokens": np.where(masked, MASK, original).astype(np.int32),
        "encoder_target_tokens": original,
        "encoder_loss_weights": masked.astype(np.int32),
    }


def run(config, params, call):
    """Return the result of `call` on the model with these parameters, compiled."""
    graphdef = abstract_model(config).graphdef
    return jax.jit(lambda params: call(bind_params(graphdef, params)))(params)


def test_only_masked_tokens_are_replaced_and_equal_samples_count_as_original():
    config, batch = electra(), batch_of()
    params = jax.tree.map(jnp.asarray, parameters(config))
    masked, original = batch["encoder_loss_weights"] > 0, batch["encoder_target_tokens"]
    # A generator that fills in the most frequent token, which sometimes is the original.
    frequent = np.bincount(original[masked], minlength=VOCABULARY).argmax()
    params["generator"]["head"]["bias"] = params["generator"]["head"]["bias"].at[frequent].add(40.0)

    @jax.jit
    def expected(params):
        of_model = bind_params(abstract_model(config).graphdef, params)
        logits = of_model.generate(batch["encoder_input_tokens"])
        corrupted = jnp.where(masked, sample(logits, jax.random.key(0), 0), original)
        return logits, corrupted, of_model.detect(corrupted)

    logits, corrupted, detected = map(np.asarray, expected(params))
    output = run(config, params, lambda model: model.output(batch))
    np.testing.assert_allclose(output.logits, logits, atol=1e-5)
    replaced, present = corrupted != original, original != 0
    assert 0 < replaced.sum() < masked.sum(), "some samples hit the original, and are no replacements"
    assert not replaced[~masked].any()
    loss = np.logaddexp(0, detected) - detected * replaced
    assert compute(output.losses[LOSS]) == pytest.approx(loss[present].mean(), rel=1e-5)
    assert float(output.losses[LOSS].weight) == present.sum()
    right = ((detected > 0) == replaced)[present].mean()
    assert compute(output.metrics["discriminator/accuracy"]) == pytest.approx(right, rel=1e-6)
    assert compute(output.metrics["discriminator/replaced"]) == pytest.approx(replaced.sum() / present.sum(), rel=1e-6)


@pytest.mark.slow
def test_padding_has_the_id_that_the_model_names():
    """Generator, samples and the discriminator's loss do not depend on padding, and id 0 is text."""
    config = dataclasses.replace(electra(), pad_token_id=7)
    batch = batch_of()
    original = np.where(batch["encoder_target_tokens"] == 7, 8, batch["encoder_target_tokens"])
    original[:, -3:] = 7
    original[:, 0] = 0
    masked = batch["encoder_loss_weights"] * (np.arange(24) > 0)
    batch = {
        "encoder_input_tokens": np.where(masked > 0, MASK, original).astype(np.int32),
        "encoder_target_tokens": original.astype(np.int32),
        "encoder_loss_weights": masked,
    }
    inputs = batch["encoder_input_tokens"]

    def call(model):
        weight = model.output(batch).losses[LOSS].weight
        return weight, model.generate(inputs)[:, :21], model.generate(inputs[:, :21])

    weight, padded, narrow = run(config, jax.tree.map(jnp.asarray, parameters(config)), call)
    assert weight == inputs.shape[0] * 21
    np.testing.assert_allclose(padded, narrow, atol=1e-5)
    frequent = jnp.zeros(VOCABULARY).at[jnp.array([7, 9])].set(jnp.array([40.0, 20.0]))
    assert set(np.unique(sample(jnp.broadcast_to(frequent, (2, 9, VOCABULARY)), jax.random.key(0), 7))) == {9}


def test_recall_and_precision_count_replaced_tokens():
    logits = jnp.array([[2.0, -1.0, 3.0, -2.0, 5.0]])
    replaced = jnp.array([[True, True, False, False, True]])
    present = jnp.array([[True, True, True, True, False]])
    _, metrics = detection(logits, replaced, present, 1.0)
    values = {name.rpartition("/")[2]: compute(mean) for name, mean in metrics.items()}
    assert values == {"accuracy": 0.5, "replaced": 0.5, "recall": 0.5, "precision": 0.5}
    loss, _ = detection(logits.at[0, 4].set(-1e4), replaced, present, 1.0)
    assert float(loss.sum) < 10, "padding does not count"


def test_each_loss_trains_its_own_network_and_both_train_the_embeddings():
    config, batch = electra(), batch_of()
    graphdef = abstract_model(config).graphdef

    def of_generator(params):
        output = bind_params(graphdef, params).output(batch, dropout_rng=jax.random.key(1))
        masked = batch["encoder_loss_weights"]
        log_p = jnp.take_along_axis(jax.nn.log_softmax(output.logits), batch["encoder_target_tokens"][..., None], -1)
        return -jnp.sum(log_p[..., 0] * masked)

    def of_discriminator(params):
        return bind_params(graphdef, params).output(batch, dropout_rng=jax.random.key(1)).losses[LOSS].sum

    def sizes(tree):
        return {jax.tree_util.keystr(path): float(jnp.abs(x).max()) for path, x in jax.tree.leaves_with_path(tree)}

    generator, discriminator = (
        jax.jit(jax.grad(loss))(parameters(config)) for loss in (of_generator, of_discriminator)
    )
    assert set(sizes(discriminator["generator"]).values()) == {0.0}
    own = {"head": generator["head"], "layers": generator["encoder"]["layers"]}
    assert set(sizes(own).values()) == {0.0}
    for gradient in (generator, discriminator):
        shared = (
            gradient["token_embedder"],
            gradient["encoder"]["position_embedder"],
            gradient["encoder"]["embedding_norm"],
        )
        assert min(sizes(shared).values()) > 0
    assert {name for name, size in sizes(generator["generator"]).items() if size == 0} == set()
    assert min(sizes({"head": discriminator["head"], "layers": discriminator["encoder"]["layers"]["mlp"]}).values()) > 0
    assert "position_embedder" not in generator["generator"]["encoder"]


def test_samples_follow_the_softmax_and_are_never_padding():
    """Chi-square over 40,000 draws of 12 tokens in three blocks; 31.3 is the 0.999 quantile of 11 degrees."""
    token_ids = np.array([1, 2, 63, 127, 128, 130, 200, 255, 256, 270, 298, 299])
    logits = np.full(300, -30.0, np.float32)
    logits[token_ids] = np.random.default_rng(0).normal(size=12)
    logits[0] = 9.0
    draw = jax.jit(lambda rng: sample(jnp.broadcast_to(logits, (200, 200, 300)), rng, 0))
    draws = np.asarray(draw(jax.random.key(3)))
    share = np.exp(logits[token_ids])
    expected = draws.size * share / share.sum()
    counts = np.bincount(draws.ravel(), minlength=300)
    assert counts[token_ids].sum() == draws.size
    assert ((counts[token_ids] - expected) ** 2 / expected).sum() < 31.3
    assert 0.05 < (draws == np.asarray(draw(jax.random.key(4)))).mean() < 0.5


@pytest.mark.slow
def test_total_loss_is_generator_loss_plus_fifty_times_discriminator_loss():
    config, batch = electra(), batch_of(padding=7)
    graphdef = abstract_model(config).graphdef

    def apply(params, batch, rng):
        return bind_params(graphdef, params).output(batch, dropout_rng=rng)

    metrics, coefficients = batch_metrics(
        apply, parameters(config), {"main": batch}, None, z_loss=0.0, label_smoothing=0.0, denoisers=["m"]
    )
    masked, present = batch["encoder_loss_weights"].sum(), (batch["encoder_target_tokens"] != 0).sum()
    assert coefficients == {LOSS: 50.0} and float(metrics[LOSS].weight) == present > masked
    total = summed_loss(metrics, coefficients, metrics) / masked
    assert float(total) == pytest.approx(compute(metrics["loss"]) + 50 * compute(metrics[LOSS]), rel=1e-5)


def test_samples_depend_on_the_key_and_evaluation_is_deterministic():
    config, batch = electra(), batch_of()
    graphdef = abstract_model(config).graphdef
    apply = jax.jit(lambda params, rng: bind_params(graphdef, params).output(batch, dropout_rng=rng))
    params = parameters(config)
    losses = [compute(apply(params, rng).losses[LOSS]) for rng in (None, None, jax.random.key(0), jax.random.key(1))]
    assert losses[0] == losses[1] and len(set(losses)) == 3
    assert config.uses_rng, "so that the step makes keys even without dropout"


@pytest.mark.parametrize("positions", ["relative_bias", pytest.param("learned", marks=pytest.mark.slow)])
def test_padding_and_packing_do_not_change_the_outputs(positions):
    config = electra(positions)
    lengths = (9, 6)
    rows = [{name: x[:, :n] for name, x in batch_of(n, 1, padding=0).items()} for n in lengths]
    alone = {
        name: np.concatenate([np.pad(row[name], ((0, 0), (0, 11 - row[name].shape[1]))) for row in rows])
        for name in rows[0]
    }
    packed = {name: np.concatenate([*(row[name] for row in rows), np.zeros((1, 4), np.int32)], 1) for name in rows[0]}
    ids = {"segment_ids": [1] * 9 + [2] * 6 + [0] * 4, "positions": [*range(9), *range(6), 0, 0, 0, 0]}
    ids = {name: np.array([x], np.int32) for name, x in ids.items()}

    def call(model):
        one = (
            model.generate(packed["encoder_input_tokens"], **ids),
            model.detect(packed["encoder_target_tokens"], **ids),
        )
        two = model.generate(alone["encoder_input_tokens"]), model.detect(alone["encoder_target_tokens"])
        return one, two, model.output({**packed, **{f"encoder_{name}": x for name, x in ids.items()}})

    one, two, output = run(config, parameters(config), call)
    for of_packed, of_alone in zip(one, two, strict=True):
        for row, start in enumerate((0, 9)):
            outputs = of_packed[0, start : start + lengths[row]]
            np.testing.assert_allclose(outputs, of_alone[row, : lengths[row]], atol=2e-5)
    assert float(output.losses[LOSS].weight) == 15


def test_encoder_equals_that_of_a_model_without_generator():
    config = electra()
    params = parameters(config)
    plain = dataclasses.replace(config, generator=None)
    of_plain = {name: params.get(name, part) for name, part in abstract_model(plain).params.items()}
    of_plain["head"] = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract_model(plain).params["head"])
    text = batch_of()["encoder_target_tokens"]
    states = [run(c, p, lambda model: model.encode(text)) for c, p in ((config, params), (plain, of_plain))]
    np.testing.assert_array_equal(*states)


def test_batch_without_the_original_tokens_is_refused():
    batch = batch_of()
    del batch["encoder_target_tokens"]
    graphdef = abstract_model(electra()).graphdef
    with pytest.raises(DataError, match="encoder_target_tokens"):
        jax.eval_shape(lambda params: bind_params(graphdef, params).output(batch), parameters(electra()))


@pytest.mark.parametrize(
    ("path", "wrong", "where", "expected"),
    [
        ("model.generator.num_kv_heads", 3, "model.generator.num_kv_heads", "a divisor of num_heads"),
        ("model.generator.positions", "learned", "model.generator.positions", "share embeddings"),
        ("model.discriminator_loss_weight", 0.0, "model.discriminator_loss_weight", "above 0"),
        ("model.tie_embeddings", True, "model.lm_head_transform", "table's width"),
        ("model.embedding_dim", 0, "model.embedding_dim", "1 or more"),
        (
            "model.generator.relative_bias_bidirectional",
            False,
            "model.generator.relative_bias",
            "a generator attends to",
        ),
        ("model.generator.experts", MoEConfig(num_experts=2), "model.generator.experts", "no experts"),
        ("model.encoder.experts", MoEConfig(num_experts=2), "model.encoder.experts", "no experts"),
        ("model.decoder", dataclasses.replace(run_example().model.decoder), "model.generator", "an encoder alone"),
    ],
)
def test_invalid_generators_are_refused_with_the_reason(path, wrong, where, expected):
    run = run_example("encoder")
    sound = changed(run, "model.generator", dataclasses.replace(run.model.encoder, d_model=16, num_layers=1))
    assert validate(sound) == []
    found = [problem for problem in validate(changed(sound, path, wrong)) if problem.where.startswith(where)]
    assert len(found) == 1 and expected in found[0].expected
