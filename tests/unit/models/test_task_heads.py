"""Task heads: pooling, losses, and the tokens and rows that count."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.config_examples import changed
from helpers.model_examples import model, tokens
from helpers.parallel_programs import random_like, start
from helpers.task_head_examples import labeled_run, with_head

from t5x_like.config import (
    AdamWConfig,
    CorpusConfig,
    LabeledExamples,
    ShardingConfig,
    TaskHeadConfig,
    batch_spec,
)
from t5x_like.config.validation import validate
from t5x_like.errors import ConfigError, DataError
from t5x_like.evaluation.task_head_metrics import classification_scores, regression_scores, retrieval
from t5x_like.models.factory import abstract_model, bind_params, init_params
from t5x_like.models.task_heads import contrast, pool, stack_sides, text_mask
from t5x_like.monitoring.metrics import compute
from t5x_like.program import build_program
from t5x_like.training.losses import batch_metrics


def call(config, batch, what=lambda model, batch: model.output(batch)):
    params = jax.jit(lambda: init_params(config, jax.random.key(0)))()
    graphdef = abstract_model(config).graphdef
    return params, jax.jit(lambda params, batch: what(bind_params(graphdef, params), batch))(params, batch)


def text_batch(rows=4, length=10, padding=3, stack="encoder", **features):
    ids = tokens(1, rows, length) % 50 + 1
    ids[:, length - padding :] = 0
    ones = np.ones(rows, np.int32)
    return {f"{stack}_input_tokens": ids, "label_weights": ones, "denoiser_ids": 0 * ones, **features}


def metrics_of(config, batch):
    graphdef = abstract_model(config).graphdef
    params = jax.jit(lambda: init_params(config, jax.random.key(0)))()

    @jax.jit
    def run(params, batch):
        def apply(params, batch, rng):
            return bind_params(graphdef, params).output(batch, dropout_rng=rng)

        return batch_metrics(apply, params, {"main": batch}, None, z_loss=0.0, label_smoothing=0.0, denoisers=["head"])[
            0
        ]

    return {name: compute(mean) for name, mean in run(params, batch).items()}


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
def test_pooling_ignores_padding(pooling):
    states = np.random.default_rng(0).normal(size=(3, 6, 4)).astype(np.float32)
    valid = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0]])
    expected = []
    for row, mask in zip(states, valid, strict=True):
        there = row[mask > 0]
        expected.append({"cls": there[0], "mean": there.mean(0), "last": there[-1]}[pooling])
    np.testing.assert_allclose(pool(jnp.array(states), jnp.array(valid), pooling), expected, rtol=1e-6)


def test_padding_of_a_text_has_the_id_that_the_model_names():
    ids = jnp.array([[0, 7, 2, 1, 1], [0, 2, 1, 1, 1]])  # As of RoBERTa, whose padding is 1 and whose first token is 0.
    config = dataclasses.replace(model("encoder"), pad_token_id=1)
    np.testing.assert_array_equal(text_mask(config, {"encoder_input_tokens": ids}), ids != 1)


def test_texts_of_pairs_attend_to_their_own_tokens_only():
    config = dataclasses.replace(with_head("embedding", "prefix_lm"), pad_token_id=7)
    anchor, positive = (
        np.array([[7, 0, 5, 7, 7]]),
        np.array([[7, 4, 3, 0, 7]]),
    )  # A decoder's first token can be any id.
    batch = {"decoder_input_tokens": anchor, "positive_input_tokens": positive, "decoder_causal_attention": anchor}
    texts, sides = stack_sides(config, batch)
    assert sides == 2
    expected = [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]
    np.testing.assert_array_equal(texts["decoder_causal_attention"], expected)
    np.testing.assert_array_equal(text_mask(config, texts), expected)
    # Where padding has the id of EOS, a text still ends in its EOS.
    texts, _ = stack_sides(dataclasses.replace(config, eos_ids=(7,)), batch)
    np.testing.assert_array_equal(texts["decoder_causal_attention"], [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_padded_rows_need_a_padding_id_or_segment_ids(stack):
    config = dataclasses.replace(model(stack), pad_token_id=None)
    batch = {f"{stack}_input_tokens": jnp.array([[3, 4, 0]])}
    with pytest.raises(DataError, match="without a padding id.*model.pad_token_id"):
        text_mask(config, batch)
    segments = {f"{stack}_segment_ids": jnp.array([[1, 1, 0]])}
    np.testing.assert_array_equal(text_mask(config, batch | segments), [[True, True, False]])


def test_contrastive_loss_is_cross_entropy_over_the_texts_of_all_rows():
    vectors = np.random.default_rng(0).normal(size=(5, 3, 8)).astype(np.float32)
    # The last row does not count, and row 2 has no hard negative.
    weights = np.array([[1, 1], [1, 1], [1, 0], [1, 1], [0, 0]], np.float32)
    logits, own = contrast(jnp.array(vectors), jnp.array(weights), 0.5)
    rows = np.arange(4)
    documents = np.concatenate([vectors[:4, 1], vectors[[0, 1, 3], 2]])
    expected = vectors[:4, 0] @ documents.T / 0.5
    expected = np.log(np.exp(expected).sum(1)) - expected[rows, rows]
    found = -jax.nn.log_softmax(logits)[rows, own[:4]]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_classification_loss_and_accuracy_ignore_rows_of_weight_0():
    config = with_head("classification", transform=True, dropout_rate=0.1)
    batch = text_batch(labels=np.array([0, 1, 2, 2], np.int32))
    params, scores = call(config, batch, lambda model, batch: model.scores(batch)[0])
    assert scores.shape == (4, 3) and config.uses_rng
    assert params["head"]["out"]["kernel"].shape[1] == 3 and params["head"]["out"]["bias"].shape == (3,)
    batch["label_weights"][3] = 0
    found = metrics_of(config, batch)
    log_p = jax.nn.log_softmax(scores)
    np.testing.assert_allclose(found["loss"], -np.mean([log_p[i, i] for i in range(3)]), rtol=1e-5)
    assert found["loss/head"] == found["loss"]
    np.testing.assert_allclose(found["accuracy"], np.mean(np.argmax(np.asarray(scores), 1)[:3] == [0, 1, 2]))


def test_regression_has_a_squared_error_and_no_accuracy():
    config = with_head("regression", "decoder", pooling="last")
    batch = text_batch(stack="decoder", labels=np.array([0.5, -1, 2, 0], np.float32))
    _, scores = call(config, batch, lambda model, batch: model.scores(batch)[0])
    found = metrics_of(config, batch)
    np.testing.assert_allclose(found["loss"], np.mean((scores - batch["labels"]) ** 2), rtol=1e-5)
    assert "accuracy" not in found


def test_decoder_attends_bidirectionally_if_the_batch_requests_it():
    config = with_head("embedding", "prefix_lm", pooling="cls")
    batch = text_batch(stack="decoder")
    other = {**batch, "decoder_input_tokens": batch["decoder_input_tokens"].copy()}
    other["decoder_input_tokens"][:, 5] = 51
    both = {"decoder_causal_attention": (batch["decoder_input_tokens"] != 0).astype(np.int32)}

    def scores(model, batches):
        return [model.scores(batch)[0] for batch in batches]

    _, (a, b, c, d) = call(config, [batch, other, batch | both, other | both], scores)
    np.testing.assert_array_equal(a, b)
    assert np.abs(c - d).max(1).min() > 1e-4
    np.testing.assert_allclose(np.linalg.norm(a, axis=1), 1, rtol=1e-5)


def test_text_is_nearest_to_itself_and_padding_does_not_change_embeddings():
    config = with_head("embedding")
    batch = text_batch()
    wider = {**batch, "encoder_input_tokens": np.pad(batch["encoder_input_tokens"], ((0, 0), (0, 4)))}
    _, narrow = call(config, batch, lambda model, batch: model.scores(batch)[0])
    _, wide = call(config, wider, lambda model, batch: model.scores(batch)[0])
    np.testing.assert_allclose(narrow, wide, atol=1e-5)
    assert metrics_of(config, batch | {"positive_input_tokens": batch["encoder_input_tokens"]})["accuracy"] == 1


def test_packed_rows_and_missing_labels_are_refused():
    config = with_head("classification")
    batch = text_batch(labels=np.zeros(4, np.int32))
    with pytest.raises(DataError, match="one text per row"):
        call(config, batch | {"encoder_positions": batch["encoder_input_tokens"]})
    del batch["labels"]
    with pytest.raises(DataError, match="'labels'"):
        call(config, batch)


def test_invalid_task_heads_are_refused():
    with pytest.raises(ConfigError, match="two or more"):
        abstract_model(
            dataclasses.replace(with_head("classification"), task_head=TaskHeadConfig(kind="classification"))
        )
    with pytest.raises(ConfigError, match="one stack"):
        abstract_model(dataclasses.replace(model("encoder_decoder"), task_head=TaskHeadConfig(kind="embedding")))


@pytest.mark.parametrize(
    "path, value, expected_path",
    [
        ("model.task_head", None, "model.task_head"),
        ("model.task_head.labels", ("red", "blue", "green"), "model.task_head.labels"),
        ("model.task_head.kind", "token_classification", "model.task_head.kind"),
        ("model.pad_token_id", None, "model.pad_token_id"),
        ("data.example_mode", "documents", "data.example_mode"),
        ("data.targets_length", 4, "data.targets_length"),
        ("data.corpus.labels", (), "data.corpus.labels"),
        ("data.corpus.labels", ("red", "red", "blue"), "data.corpus.labels"),
        ("data.corpus.target_kind", "number", "data.corpus.target_kind"),
        ("data.corpus.inputs_field", None, "data.corpus.inputs_field"),
        (
            "data.mixture",
            (LabeledExamples(kind="classification"), LabeledExamples(kind="classification", name="b")),
            "data.mixture",
        ),
    ],
)
def test_run_with_mismatched_head_and_data_is_refused(path, value, expected_path):
    run = labeled_run()
    assert not validate(run)
    assert expected_path in [problem.where for problem in validate(changed(run, path, value))]


def test_head_metrics_match_their_definitions():
    true, predicted = np.array([0, 0, 1, 2, 2, 2]), np.array([0, 1, 1, 2, 2, 0])
    f1 = [2 * 1 / (2 + 2), 2 * 1 / (1 + 2), 2 * 2 / (3 + 2)]
    scores = classification_scores(true, predicted)
    np.testing.assert_allclose([scores["f1_macro"], scores["majority"]], [100 * np.mean(f1), 50])
    x, y = np.array([1.0, 2, 3, 4]), np.array([1.0, 8, 27, 64])
    np.testing.assert_allclose(regression_scores(x, y)["spearman"], 100)
    np.testing.assert_allclose(regression_scores(x, y)["pearson"], 100 * np.corrcoef(x, y)[0, 1])
    assert regression_scores(x, x)["r2"] == 100
    queries = np.eye(4)
    assert retrieval(queries, queries)["mrr"] == 100
    assert retrieval(queries, np.roll(queries, 1, axis=0))["recall_at_1"] == 0


def ranking_loss(vectors, negatives, temperature):
    """Return sentence-transformers' MultipleNegativesRankingLoss of each row: vectors of its text, its positive and
    its hard negatives [B, S, d], and which of the negatives there are [B, S - 2]."""
    vectors = vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)
    there = np.nonzero(negatives.T)
    documents = jnp.concatenate([vectors[:, 1], jnp.swapaxes(vectors[:, 2:], 0, 1)[there]])
    return -jnp.diagonal(jax.nn.log_softmax(vectors[:, 0] @ documents.T / temperature)[:, : len(vectors)])


def test_contrastive_loss_on_a_mesh_equals_the_published_formulas():
    """In-batch and hard negatives come from all devices. The Matryoshka loss (Kusupati et al. 2022) is the sum of the
    losses of prefixes, times their weights. Adam's first moment after one step is a tenth of the gradient."""
    run = labeled_run()
    corpus = CorpusConfig(
        files=("a.jsonl",), inputs_field="text", text_field="other", negative_fields=("x",), num_negatives=2
    )
    data = dataclasses.replace(run.data, corpus=corpus, mixture=(LabeledExamples(kind="embedding"),), inputs_length=12)
    head = {"temperature": 0.5, "matryoshka_dimensions": (16, 8), "matryoshka_weights": (0.5, 2.0)}
    config = dataclasses.replace(with_head("embedding", **head), vocab_size=300)
    training = dataclasses.replace(run.training, optimizer=AdamWConfig(weight_decay=0.0), max_gradient_norm=None)
    sharding = ShardingConfig(data=2, fsdp=2, tensor=2)
    run = dataclasses.replace(run, model=config, data=data, training=training, sharding=sharding)
    assert not validate(run)
    random = np.random.default_rng(0)
    sides = [f"{side}_input_tokens" for side in ("encoder", "positive", "negative_1", "negative_2")]
    batch = {name: random.integers(1, 60, (8, 12)).astype(np.int32) for name in sides}
    batch |= {"label_weights": np.array([1] * 7 + [0], np.int32), "denoiser_ids": np.zeros(8, np.int32)}
    negatives = np.array([[1, 1], [1, 0], [0, 0], [1, 1], [1, 1], [1, 0], [1, 1], [1, 1]], np.int32)
    batch |= {"negative_1_weights": negatives[:, 0], "negative_2_weights": negatives[:, 1]}
    assert {name: x.shape for name, x in batch.items()} == {n: x.shape for n, x in batch_spec(run)["main"].items()}
    program = build_program(run, jax.devices()[:8])
    params = random_like(program.abstract_params, 0)

    def expected(params):
        model = bind_params(program.spec.graphdef, params)
        vectors = jnp.stack([model.scores({"encoder_input_tokens": batch[side][:7]})[0] for side in sides], axis=1)
        means = {n: ranking_loss(vectors[..., :n], negatives[:7], 0.5).mean() for n in (32, 16, 8)}
        return means[32] + 0.5 * means[16] + 2.0 * means[8], means

    (_, means), gradient = jax.jit(jax.value_and_grad(expected, has_aux=True))(params)
    after, metrics = program.train_step(start(program, {"params": params}), program.shard_batch({"main": batch}))
    found = {name: compute(mean) for name, mean in metrics.items()}
    for name, size in (("loss", 32), ("loss/head", 32), ("matryoshka_16", 16), ("matryoshka_8", 8)):
        assert found[name] == pytest.approx(float(means[size]), rel=1e-4)
    atol = 1e-5 * max(float(np.abs(x).max()) for x in jax.tree.leaves(gradient))
    moment = after["opt_state"].mu
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 0.1 * b, rtol=1e-3, atol=atol), moment, gradient)


@pytest.mark.parametrize(
    "changes, expected_path",
    [
        ({"kind": "regression"}, "model.task_head.matryoshka_dimensions"),
        ({"matryoshka_dimensions": (32,)}, "model.task_head.matryoshka_dimensions"),
        ({"matryoshka_dimensions": (8, 8)}, "model.task_head.matryoshka_dimensions"),
        ({"matryoshka_weights": (1.0, 1.0)}, "model.task_head.matryoshka_weights"),
    ],
)
def test_invalid_prefixes_of_embeddings_are_refused(changes, expected_path):
    head = dataclasses.replace(TaskHeadConfig(kind="embedding", matryoshka_dimensions=(8,)), **changes)
    with pytest.raises(ConfigError, match=expected_path):
        abstract_model(dataclasses.replace(with_head("embedding"), task_head=head))
