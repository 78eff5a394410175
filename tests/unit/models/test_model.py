"""Properties of the model: padding, packing, causality, prefixes, and equal results of scan, unrolling and remat."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.model_examples import EXAMPLES, VOCABULARY, forward, logits, model, parameters, tokens

from t5x_like.errors import ConfigError, DataError
from t5x_like.models import presets
from t5x_like.models.factory import abstract_model, bind_params, init_params

ARCHITECTURES = ["encoder_decoder", "decoder", "prefix_lm", "encoder"]
POSITIONS = ["relative_bias", "rope", "learned", "none"]
TOLERANCE = {"rtol": 0, "atol": 2e-5}


def example(architecture: str, seed: int, inputs: int, targets: int) -> dict[str, np.ndarray]:
    """Return one unpacked row under seqio's names."""
    if architecture == "encoder":
        return {"encoder_input_tokens": tokens(seed, 1, inputs)}
    if architecture == "encoder_decoder":
        return {"encoder_input_tokens": tokens(seed, 1, inputs), "decoder_input_tokens": shifted(seed, targets)}
    row = {"decoder_input_tokens": shifted(seed, inputs + targets)}
    if architecture == "prefix_lm":
        row["decoder_causal_attention"] = (np.arange(inputs + targets) <= inputs).astype(np.int32)[None]
    return row


def shifted(seed: int, length: int) -> np.ndarray:
    row = tokens(seed + 100, 1, length)
    row[:, 0] = 0
    return row


def pack(rows: list[dict[str, np.ndarray]], padding: int) -> dict[str, np.ndarray]:
    """Pack as seqio does: segments one after the other with ids from 1 and positions from 0, then padding."""
    packed: dict[str, np.ndarray] = {}
    for side in ("encoder", "decoder"):
        if f"{side}_input_tokens" not in rows[0]:
            continue
        lengths = [row[f"{side}_input_tokens"].shape[1] for row in rows]
        for name in [name for name in rows[0] if name.startswith(side)]:
            values = np.concatenate([row[name] for row in rows], axis=1)
            packed[name] = np.pad(values, ((0, 0), (0, padding)))
        ids = np.concatenate([np.full(n, i + 1) for i, n in enumerate(lengths)])
        packed[f"{side}_segment_ids"] = np.pad(ids, (0, padding))[None].astype(np.int32)
        packed[f"{side}_positions"] = np.pad(np.concatenate([np.arange(n) for n in lengths]), (0, padding))[None]
    return packed


# Rotary and learned positions follow `positions` of packed rows in the same way in every stack.
@pytest.mark.parametrize(
    ("architecture", "positions"),
    [
        pytest.param(
            architecture,
            positions,
            marks=[pytest.mark.slow] if architecture != "encoder_decoder" and positions != "relative_bias" else [],
        )
        for architecture in ARCHITECTURES
        for positions in POSITIONS
    ],
)
def test_packed_examples_have_the_logits_of_separate_ones(architecture, positions):
    config = model(architecture, positions)
    rows = [example(architecture, 0, 6, 4), example(architecture, 1, 3, 7)]
    packed = logits(config, pack(rows, padding=3))[0]
    separate = np.concatenate([logits(config, row)[0] for row in rows])
    assert np.abs(separate[0] - separate[-1]).max() > 0.1
    np.testing.assert_allclose(packed[: len(separate)], separate, **TOLERANCE)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("merged", "local prefix", "experts") else pytest.mark.slow)
        for name in EXAMPLES
    ],
)
def test_packing_and_unrolled_layers_do_not_change_logits_of_family_features(name):
    config = EXAMPLES[name]
    architecture = "prefix_lm" if "prefix" in name else config.architecture
    rows = [example(architecture, 0, 6, 4), example(architecture, 1, 3, 7)]
    packed = pack(rows, padding=3)
    separate = np.concatenate([logits(config, row)[0] for row in rows])
    found = logits(config, packed)[0]
    np.testing.assert_allclose(found[: len(separate)], separate, **TOLERANCE)
    unrolled = forward(dataclasses.replace(config, scan_layers=False))(parameters(config), packed)
    np.testing.assert_allclose(unrolled, found[None], **TOLERANCE)


@pytest.mark.parametrize("name", ["merged", "local", "first layer", "per-layer bias"])
def test_traced_program_does_not_grow_with_the_number_of_layers(name):
    """Layers that differ in numbers are one block with those numbers as data."""

    def size(num_layers):
        config = EXAMPLES[name]
        stacks = {of: dataclasses.replace(stack, num_layers=num_layers) for of, stack in config.stacks.items()}
        config = dataclasses.replace(config, **stacks)
        spec, row = abstract_model(config), example(config.architecture, 0, 6, 4)
        lowered = jax.jit(jax.grad(lambda params: jnp.sum(bind_params(spec.graphdef, params)(row)))).lower(spec.params)
        return len(lowered.as_text().splitlines())

    assert size(4) == size(40)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_on_the_right_does_not_change_logits(architecture, positions):
    config = model(architecture, positions)
    row = example(architecture, 0, 6, 4)
    plain = logits(config, row)[0]
    padded = logits(config, {name: np.pad(x, ((0, 0), (0, 5))) for name, x in row.items()})[0]
    np.testing.assert_allclose(padded[: len(plain)], plain, **TOLERANCE)


@pytest.mark.parametrize("architecture", ["encoder_decoder", "decoder", "prefix_lm"])
def test_a_later_token_never_changes_an_earlier_logit(architecture):
    config = model(architecture, "rope")
    row = example(architecture, 0, 6, 5)
    before = logits(config, row)[0]
    changed = {name: x.copy() for name, x in row.items()}
    position = before.shape[0] - 2
    changed["decoder_input_tokens"][0, position] = changed["decoder_input_tokens"][0, position] % (VOCABULARY - 1) + 1
    after = logits(config, changed)[0]
    np.testing.assert_array_equal(after[:position], before[:position])
    assert (np.abs(after[position:] - before[position:]).max(axis=-1) > 1e-3).all()


def test_a_late_token_of_the_prefix_changes_early_states_of_the_prefix():
    config = model("prefix_lm")
    row = example("prefix_lm", 0, 6, 5)
    changed = {name: x.copy() for name, x in row.items()}
    changed["decoder_input_tokens"][0, 6] = changed["decoder_input_tokens"][0, 6] % (VOCABULARY - 1) + 1
    difference = np.abs(logits(config, changed)[0] - logits(config, row)[0]).max(axis=-1)
    assert (difference > 1e-3).all()
    causal = {"decoder_input_tokens": row["decoder_input_tokens"]}
    causal_changed = {"decoder_input_tokens": changed["decoder_input_tokens"]}
    np.testing.assert_array_equal(logits(config, causal)[0, :6], logits(config, causal_changed)[0, :6])


@functools.cache
def gradients(config):
    """Return the gradients of a loss with dropout, at the parameters of the model with scan and without remat."""
    weights = np.random.default_rng(0).normal(size=(1, 1, VOCABULARY))
    batch, graphdef = example("encoder_decoder", 0, 6, 4), abstract_model(config).graphdef

    def loss(params):
        logits = bind_params(graphdef, params)(batch, dropout_rng=jax.random.key(1))
        return jnp.mean(jax.nn.log_softmax(logits) * weights)

    return jax.jit(jax.grad(loss))(parameters(dataclasses.replace(config, scan_layers=True, remat="none")))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"scan_layers": False}, {"remat": "dots"}, {"remat": "qkv"}, {"remat": "full"}])
def test_scan_unrolled_and_remat_have_the_same_gradients(changes):
    config = model("encoder_decoder", stack_changes={"dropout_rate": 0.2})
    expected, found = gradients(config), gradients(dataclasses.replace(config, **changes))
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    for actual, reference in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(actual, reference, rtol=0, atol=1e-6 * largest)


def test_attention_backends_agree_in_the_model():
    batch = example("encoder_decoder", 0, 6, 4)
    reference = logits(model("encoder_decoder"), batch)
    np.testing.assert_allclose(logits(model("encoder_decoder", attention="xla"), batch), reference, **TOLERANCE)


def test_half_precision_is_near_full_precision():
    batch = example("encoder_decoder", 0, 6, 4)
    config = model("encoder_decoder")
    full = logits(config, batch)
    half = forward(dataclasses.replace(config, dtype="bfloat16"))(parameters(config), batch)
    assert half.dtype == jnp.float32
    assert 0 < np.abs(half - full).max() < 0.05 * np.abs(full).max()


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_the_compiled_program_does_not_grow_with_depth(remat):
    def hlo_bytes(layers):
        config = model("encoder_decoder", stack_changes={"num_layers": layers}, remat=remat)
        spec, batch = abstract_model(config), example("encoder_decoder", 0, 6, 4)
        loss = jax.grad(lambda params: bind_params(spec.graphdef, params)(batch).sum())
        return len(jax.jit(loss).lower(spec.params).as_text())

    assert hlo_bytes(32) < 1.02 * hlo_bytes(4)


def test_dropout_depends_on_the_key_alone():
    config = model("decoder", "none", stack_changes={"dropout_rate": 0.5})
    batch = example("decoder", 0, 6, 4)
    run, params = forward(config), parameters(config)
    first, again, other = (run(params, batch, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1
    assert np.abs(first - run(params, batch)).max() > 0.1


def test_each_layer_has_its_own_dropout_mask():
    """Each of two layers adds 1, dropped with rate 1/2 and scaled, to 0: states are 0, 2 or 4 before the final norm,
    and never 2 if both had the same mask."""
    config = model("encoder", "none", stack_changes={"dropout_rate": 0.5, "use_bias": True})
    params = jax.tree.map(jnp.zeros_like, parameters(config))
    params["encoder"]["layers"]["mlp"]["wo"]["bias"] += 1.0
    params["encoder"]["final_norm"]["scale"] += 1.0
    encode = jax.jit(
        lambda key: bind_params(abstract_model(config).graphdef, params).encode(tokens(0, 2, 8), dropout_rng=key)
    )
    for token in np.asarray(encode(jax.random.key(0))).reshape(16, 32):
        assert len(np.unique(np.round(token[token > 0], 4))) == 2


def shrunk(config):
    """Return the preset with its flags and a small size. Tables have the preset's scale, relative to the width."""
    changes = {"num_layers": 2, "d_model": 64, "num_heads": 4, "head_dim": 16, "d_ff": 128, "num_kv_heads": 4}
    stacks = {name: dataclasses.replace(stack, **changes) for name, stack in config.stacks.items()}
    return dataclasses.replace(config, **stacks, vocab_size=1000, dtype="float32")


PRESETS = {
    "t5_1_1": presets.t5_1_1("small"),
    "t5_1_0": presets.t5_1_0("small"),
    "ul2_20b": presets.ul2_20b(),
    "decoder_1b": presets.decoder_1b(),
    "bert_base": presets.bert_base(),
    **{f"smoke {name}": presets.smoke(name) for name in ARCHITECTURES},
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_fresh_model_starts_near_the_logarithm_of_the_vocabulary(name):
    config = shrunk(PRESETS[name])
    random = np.random.default_rng(0)
    batch = {f"{side}_input_tokens": random.integers(1, 1000, (4, 32)) for side in config.stacks}
    spec = abstract_model(config)
    fresh = jax.jit(lambda: bind_params(spec.graphdef, init_params(config, jax.random.key(0)))(batch))()
    targets = random.integers(1, 1000, (4, 32))
    loss = -np.mean(np.take_along_axis(np.asarray(jax.nn.log_softmax(fresh)), targets[..., None], axis=-1))
    assert abs(loss - np.log(1000)) < 0.6


def test_parameters_have_the_abstract_shapes():
    config = model("encoder_decoder")
    spec = abstract_model(config)
    built = jax.jit(lambda: init_params(config, jax.random.key(0)))()
    assert jax.tree.map(lambda x: (x.shape, x.dtype), built) == jax.tree.map(lambda x: (x.shape, x.dtype), spec.params)
    axes = jax.tree.map(lambda x, names: len(names) == x.ndim, spec.params, spec.logical_axes)
    assert all(jax.tree.leaves(axes))


def test_missing_feature_is_named_in_the_error():
    config = model("encoder_decoder")
    with pytest.raises(DataError, match="decoder_input_tokens"):
        logits(config, {"encoder_input_tokens": tokens(0, 1, 3)})


def test_all_inconsistencies_of_the_stacks_are_listed():
    config = model("encoder_decoder")
    assert config.encoder is not None and config.decoder is not None
    wrong = dataclasses.replace(
        config,
        encoder=dataclasses.replace(config.encoder, num_kv_heads=3),
        decoder=dataclasses.replace(config.decoder, d_model=64, positions="rope", head_dim=7),
    )
    with pytest.raises(ConfigError) as error:
        abstract_model(wrong)
    assert [problem.where for problem in error.value.problems] == [
        "model.encoder.num_kv_heads",
        "model.decoder.head_dim",
        "model.decoder.d_model",
    ]


def test_rows_longer_than_the_position_table_are_refused():
    with pytest.raises(ConfigError, match="32 learned positions for rows of 40 tokens"):
        logits(model("decoder", "learned"), {"decoder_input_tokens": tokens(0, 1, 40)})
