"""Assignment maps: what goes where, what is refused, and that adapted models compute what they should."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from config_examples import changed, example
from model_examples import EXAMPLES, VOCABULARY, forward, model, parameters, tokens

from t5x_like.config import ConfigError, InitializeFrom
from t5x_like.config.adaptation import (
    ALL_BUT_CROSS_ATTENTION,
    encoder_decoder_of_decoder,
    encoder_of_decoder,
    encoder_of_encoder_decoder,
)
from t5x_like.config.training import Freeze
from t5x_like.config.validate import validate
from t5x_like.interop.adaptation import NOISE, adapt, grown, plan, table
from t5x_like.models.build import abstract
from t5x_like.training.freezing import starts

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
    """(parameters of `new` from those of `old`, its own initial ones, the assignment)"""
    assignment = plan(source, abstract(old), abstract(new))
    fresh = parameters(new, 7)
    return flat(adapt(assignment, parameters(old), fresh, abstract(new), seed=3)), flat(fresh), assignment


def test_a_decoder_becomes_both_stacks_as_in_t5gemma():
    old = flat(parameters(GEMMA_2))
    found, fresh, assignment = adapted(encoder_decoder_of_decoder("x"), GEMMA_2, t5gemma(GEMMA_2))
    assert found.keys() == fresh.keys()
    for path, leaf in found.items():
        origin = path.replace("cross_attention", "self_attention").replace("encoder/", "decoder/")
        origin = origin.replace("encoder_token_embedder", "token_embedder")
        np.testing.assert_array_equal(leaf, old[origin], err_msg=path)
    assert "decoder/layers/cross_attention_post_norm/scale" in found
    assert set(assignment.values()) == set(old)


def test_a_fresh_cross_attention_is_all_that_its_warm_up_trains():
    source = encoder_decoder_of_decoder("x", cross_attention="fresh")
    found, fresh, assignment = adapted(source, GEMMA_2, t5gemma(GEMMA_2))
    kept = {path for path, origin in assignment.items() if origin is None}
    assert kept == {path for path in found if "/cross_attention" in path} != set()
    for path in kept:
        np.testing.assert_array_equal(found[path], fresh[path])
    warm_up = starts((Freeze(paths=(ALL_BUT_CROSS_ATTENTION,), until_step=1000),), found)
    assert {path for path, start in warm_up.items() if start == 0} == kept


def test_merged_attention_is_a_plain_copy_and_without_inputs_the_model_is_the_old_one():
    source = encoder_decoder_of_decoder("x", cross_attention="merged")
    assignment = plan(source, abstract(GEMMA_3), abstract(MERGED))
    assert None not in assignment.values()
    params = adapt(assignment, parameters(GEMMA_3), parameters(MERGED, 7), abstract(MERGED), seed=3)
    batch = {"decoder_input_tokens": tokens(1, 2, 6)}
    found = forward(MERGED)(params, batch | {"encoder_input_tokens": np.zeros((2, 4), np.int32)})
    np.testing.assert_allclose(found, forward(GEMMA_3)(parameters(GEMMA_3), batch), rtol=1e-5, atol=1e-5)


def test_encoders_are_taken_out_or_made_of_decoders():
    encoder = dataclasses.replace(GEMMA_3, encoder=GEMMA_3.decoder, decoder=None)
    for old, source in [
        (MERGED, encoder_of_encoder_decoder("x")),
        (t5gemma(GEMMA_3), encoder_of_encoder_decoder("x", separate_tables=True)),
        (GEMMA_3, encoder_of_decoder("x")),
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
    assert plan(InitializeFrom(directory="x"), abstract(GEMMA_3), abstract(GEMMA_3))


def test_tables_grow_around_the_mean_of_what_they_have():
    old = model("decoder", "rope", tie_embeddings=False)
    new = dataclasses.replace(old, vocab_size=VOCABULARY + 40)
    source = InitializeFrom(directory="x", grow=("token_embedder/embedding", "head/kernel"))
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
    "an unused rule": ({"rules": (("(.*)", r"\1"), ("encoder/(.*)", r"\1"))}, "match nothing of the source"),
    "a rule to nowhere": ({"rules": (("(.*)", r"\1"), ("decoder/(.*)", r"deocder/\1"))}, "such as deocder/"),
    "a rule too late": ({"rules": (("(.*)", r"\1"), ("(decoder/.*)", r"\1"))}, "no rule before it"),
    "no source": ({"rules": (("(decoder/.*)", r"\1"),)}, "token_embedder/embedding: found no source"),
    "unused fresh": ({"fresh": ("encoder/.*",)}, r"initialize_from.fresh.0: found 'encoder/\.\*', unused"),
    "unused grow": ({"grow": ("lm_head",)}, "initialize_from.grow.0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_maps_that_do_not_fit_are_refused(case):
    changes, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        plan(InitializeFrom(directory="x", **changes), abstract(GEMMA_3), abstract(GEMMA_3))


def test_shapes_are_strict():
    larger = dataclasses.replace(GEMMA_3, vocab_size=VOCABULARY + 1)
    wider = dataclasses.replace(GEMMA_3, decoder=dataclasses.replace(GEMMA_3.decoder, d_ff=49))
    grow = InitializeFrom(directory="x", grow=(".*",))
    with pytest.raises(ConfigError, match=r"\(61, 32\) from token_embedder.*name the table in initialize_from.grow"):
        plan(InitializeFrom(directory="x"), abstract(GEMMA_3), abstract(larger))
    with pytest.raises(ConfigError, match=r"mlp/wo/kernel: found \(2, 48, 32\)"):
        plan(grow, abstract(GEMMA_3), abstract(wider))
    with pytest.raises(ConfigError, match=r"found \(62, 32\)"):
        plan(grow, abstract(larger), abstract(GEMMA_3))


@pytest.mark.parametrize(
    "source",
    [
        InitializeFrom(directory=""),
        InitializeFrom(directory="x", step=-1),
        InitializeFrom(directory="x", rules=()),
        InitializeFrom(directory="x", rules=(("(", "a"),)),
        InitializeFrom(directory="x", rules=(("a", r"\1"),)),
        InitializeFrom(directory="x", fresh=("[",)),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_read(source):
    assert len(validate(changed(example(), "initialize_from", source))) == 1
    assert validate(changed(example(), "initialize_from", InitializeFrom(directory="x"))) == []
