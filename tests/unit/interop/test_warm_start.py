"""Warm starts by assignment maps: mapped parameters, refused maps, and outputs of the initialized models."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.config_examples import changed, example
from helpers.model_examples import EXAMPLES, VOCABULARY, forward, model, parameters, tokens

from t5x_like.config import InitializeFrom
from t5x_like.config.initialization import (
    ALL_BUT_CROSS_ATTENTION,
    decoder_to_encoder,
    decoder_to_encoder_decoder,
    encoder_decoder_to_encoder,
)
from t5x_like.config.training import FreezeConfig
from t5x_like.config.validation import validate
from t5x_like.errors import ConfigError
from t5x_like.interop.warm_start import NOISE, apply_mapping, grown, plan_mapping, table
from t5x_like.models.factory import abstract_model
from t5x_like.training.freezing import unfreeze_steps

GEMMA_2 = EXAMPLES["local"]
GEMMA_3 = model("decoder", "rope", stack_changes={"qk_norm": True}, tie_embeddings=True)
MERGED = dataclasses.replace(
    GEMMA_3, encoder=GEMMA_3.decoder, decoder=dataclasses.replace(GEMMA_3.decoder, cross_attention="merged")
)


def t5gemma(decoder):
    return dataclasses.replace(decoder, encoder=decoder.decoder, separate_encoder_embeddings=True)


def flat(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def adapted(source, old, new):
    """Return (parameters of `new` from those of `old`, its own initial ones, the assignment)."""
    assignment = plan_mapping(source, abstract_model(old), abstract_model(new))
    fresh = parameters(new, 7)
    return flat(apply_mapping(assignment, parameters(old), fresh, abstract_model(new), seed=3)), flat(fresh), assignment


def test_decoder_initializes_both_stacks_as_in_t5gemma():
    old = flat(parameters(GEMMA_2))
    found, fresh, assignment = adapted(decoder_to_encoder_decoder("x"), GEMMA_2, t5gemma(GEMMA_2))
    assert found.keys() == fresh.keys()
    for path, leaf in found.items():
        origin = path.replace("cross_attention", "self_attention").replace("encoder/", "decoder/")
        origin = origin.replace("encoder_token_embedder", "token_embedder")
        np.testing.assert_array_equal(leaf, old[origin], err_msg=path)
    assert "decoder/layers/cross_attention_post_norm/scale" in found
    assert set(assignment.values()) == set(old)


def test_warm_up_trains_only_the_fresh_cross_attention():
    source = decoder_to_encoder_decoder("x", cross_attention="fresh")
    found, fresh, assignment = adapted(source, GEMMA_2, t5gemma(GEMMA_2))
    kept = {path for path, origin in assignment.items() if origin is None}
    assert kept == {path for path in found if "/cross_attention" in path} != set()
    for path in kept:
        np.testing.assert_array_equal(found[path], fresh[path])
    warm_up = unfreeze_steps((FreezeConfig(paths=(ALL_BUT_CROSS_ATTENTION,), until_step=1000),), found)
    assert {path for path, start in warm_up.items() if start == 0} == kept


def test_merged_attention_copies_parameters_and_equals_the_source_without_inputs():
    source = decoder_to_encoder_decoder("x", cross_attention="merged")
    assignment = plan_mapping(source, abstract_model(GEMMA_3), abstract_model(MERGED))
    assert None not in assignment.values()
    params = apply_mapping(assignment, parameters(GEMMA_3), parameters(MERGED, 7), abstract_model(MERGED), seed=3)
    batch = {"decoder_input_tokens": tokens(1, 2, 6)}
    found = forward(MERGED)(params, batch | {"encoder_input_tokens": np.zeros((2, 4), np.int32)})
    np.testing.assert_allclose(found, forward(GEMMA_3)(parameters(GEMMA_3), batch), rtol=1e-5, atol=1e-5)


def test_encoder_is_initialized_from_encoder_decoder_or_decoder():
    encoder = dataclasses.replace(GEMMA_3, encoder=GEMMA_3.decoder, decoder=None)
    for old, source in [
        (MERGED, encoder_decoder_to_encoder("x")),
        (t5gemma(GEMMA_3), encoder_decoder_to_encoder("x", separate_tables=True)),
        (GEMMA_3, decoder_to_encoder("x")),
    ]:
        found, _, assignment = adapted(source, old, encoder)
        expected = flat(parameters(old))
        assert None not in assignment.values()
        for path, leaf in found.items():
            np.testing.assert_array_equal(leaf, expected[assignment[path]])
        of_table = assignment["token_embedder/embedding"]
        assert of_table.startswith("encoder_") == (old.separate_encoder_embeddings)
        assert all(origin.split("/")[1] == path.split("/")[1] for path, origin in assignment.items())
    # Causal to prefix-LM: the same parameters, another mask.
    assert plan_mapping(InitializeFrom(directory="x"), abstract_model(GEMMA_3), abstract_model(GEMMA_3))


def test_new_rows_of_a_table_are_drawn_around_the_mean():
    old = model("decoder", "rope", tie_embeddings=False)
    new = dataclasses.replace(old, vocab_size=VOCABULARY + 40)
    source = InitializeFrom(directory="x", resize=("token_embedder/embedding", "head/kernel"))
    found, _, assignment = adapted(source, old, new)
    before = flat(parameters(old))
    for path, axis in (("token_embedder/embedding", 0), ("head/kernel", 1)):
        kept, more = np.split(found[path], [VOCABULARY], axis=axis)
        np.testing.assert_array_equal(kept, before[path])
        mean, deviation = (of(kept, axis=axis, keepdims=True) for of in (np.mean, np.std))
        away = (more - mean) / deviation / NOISE
        assert 0.9 < away.std() < 1.1 and abs(away).max() < 6
    np.testing.assert_array_equal(adapted(source, old, new)[0]["head/kernel"], found["head/kernel"])
    lines = table(assignment, {p: x.shape for p, x in before.items()}, {p: x.shape for p, x in found.items()})
    assert any("token_embedder/embedding" in line and "grown from (61, 32)" in line for line in lines)
    same = grown(jnp.ones((4, 2)), (9, 2), 0, jax.random.key(0))
    np.testing.assert_array_equal(same, np.ones((9, 2)))


REFUSED = {
    "an unused rule": (
        {"rename_rules": (("(.*)", r"\1"), ("encoder/(.*)", r"\1"))},
        "match no parameter of the source",
    ),
    "a rule to nowhere": ({"rename_rules": (("(.*)", r"\1"), ("decoder/(.*)", r"deocder/\1"))}, "such as deocder/"),
    "a rule too late": ({"rename_rules": (("(.*)", r"\1"), ("(decoder/.*)", r"\1"))}, "no rule before it"),
    "no source": ({"rename_rules": (("(decoder/.*)", r"\1"),)}, "token_embedder/embedding: found no source"),
    "unused fresh": ({"reinit": ("encoder/.*",)}, r"initialize_from.reinit.0: found 'encoder/\.\*', unused"),
    "unused grow": ({"resize": ("lm_head",)}, "initialize_from.resize.0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_maps_that_do_not_match_the_models_are_refused(case):
    changes, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        plan_mapping(InitializeFrom(directory="x", **changes), abstract_model(GEMMA_3), abstract_model(GEMMA_3))


def test_different_shapes_are_refused():
    larger = dataclasses.replace(GEMMA_3, vocab_size=VOCABULARY + 1)
    wider = dataclasses.replace(GEMMA_3, decoder=dataclasses.replace(GEMMA_3.decoder, d_ff=49))
    grow = InitializeFrom(directory="x", resize=(".*",))
    with pytest.raises(ConfigError, match=r"\(61, 32\) from token_embedder.*name the table in initialize_from.resize"):
        plan_mapping(InitializeFrom(directory="x"), abstract_model(GEMMA_3), abstract_model(larger))
    with pytest.raises(ConfigError, match=r"mlp/wo/kernel: found \(2, 48, 32\)"):
        plan_mapping(grow, abstract_model(GEMMA_3), abstract_model(wider))
    with pytest.raises(ConfigError, match=r"found \(62, 32\)"):
        plan_mapping(grow, abstract_model(larger), abstract_model(GEMMA_3))


@pytest.mark.parametrize(
    "source",
    [
        InitializeFrom(directory=""),
        InitializeFrom(directory="x", step=-1),
        InitializeFrom(directory="x", rename_rules=()),
        InitializeFrom(directory="x", rename_rules=(("(", "a"),)),
        InitializeFrom(directory="x", rename_rules=(("a", r"\1"),)),
        InitializeFrom(directory="x", reinit=("[",)),
    ],
)
def test_invalid_initialization_is_refused_before_reading(source):
    assert len(validate(changed(example(), "initialize_from", source))) == 1
    assert validate(changed(example(), "initialize_from", InitializeFrom(directory="x"))) == []
