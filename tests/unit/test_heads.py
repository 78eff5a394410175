"""Laws of heads for texts: what is pooled, what the losses are, and which cells and rows count."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from config_examples import changed
from model_examples import model, tokens

from t5x_like.config import ConfigError, CorpusConfig, DataConfig, Labelled, RunConfig, TaskHead, TokenizerConfig
from t5x_like.config.errors import DataError
from t5x_like.config.training import TrainingConfig
from t5x_like.config.validate import validate
from t5x_like.evaluation.heads import classes, correlations, retrieval
from t5x_like.models.build import abstract, build, merge
from t5x_like.models.heads import contrast, pool
from t5x_like.models.parameters import count_parameters
from t5x_like.monitoring.metrics import value
from t5x_like.program import assemble
from t5x_like.training.losses import batch_metrics

LABELS = ("red", "green", "blue")


def with_head(kind, architecture="encoder", **changes):
    labels = LABELS if "classification" in kind else ()
    config = model(architecture, "rope", stack_changes={"num_layers": 1})
    return dataclasses.replace(config, task_head=TaskHead(kind=kind, labels=labels, **changes))


def call(config, batch, what=lambda model, batch: model.output(batch)):
    params = jax.jit(lambda: build(config, jax.random.key(0)))()
    graphdef = abstract(config).graphdef
    return params, jax.jit(lambda params, batch: what(merge(graphdef, params), batch))(params, batch)


def text_batch(rows=4, length=10, padding=3, stack="encoder", **features):
    ids = tokens(1, rows, length) % 50 + 1
    ids[:, length - padding :] = 0
    ones = np.ones(rows, np.int32)
    return {f"{stack}_input_tokens": ids, "label_weights": ones, "denoiser_ids": 0 * ones, **features}


def metrics_of(config, batch):
    graphdef = abstract(config).graphdef
    params = jax.jit(lambda: build(config, jax.random.key(0)))()

    @jax.jit
    def run(params, batch):
        def apply(params, batch, rng):
            return merge(graphdef, params).output(batch, dropout_rng=rng)

        return batch_metrics(apply, params, {"main": batch}, None, z_loss=0.0, label_smoothing=0.0, denoisers=["head"])[
            0
        ]

    return {name: value(mean) for name, mean in run(params, batch).items()}


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
def test_pooling_reads_the_valid_cells_only(pooling):
    states = np.random.default_rng(0).normal(size=(3, 6, 4)).astype(np.float32)
    valid = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0]])
    expected = []
    for row, cells in zip(states, valid, strict=True):
        there = row[cells > 0]
        expected.append({"cls": there[0], "mean": there.mean(0), "last": there[-1]}[pooling])
    np.testing.assert_allclose(pool(jnp.array(states), jnp.array(valid), pooling), expected, rtol=1e-6)


def test_the_contrastive_loss_is_the_cross_entropy_of_the_own_positive_among_all():
    vectors = np.random.default_rng(0).normal(size=(5, 3, 8)).astype(np.float32)
    weights = np.array([1, 1, 1, 1, 0], np.float32)
    logits, own = contrast(jnp.array(vectors), jnp.array(weights), 0.5)
    rows = np.arange(4)
    documents = np.concatenate([vectors[:4, 1], vectors[:4, 2]])
    expected = vectors[:4, 0] @ documents.T / 0.5
    expected = np.log(np.exp(expected).sum(1)) - expected[rows, rows]
    found = -jax.nn.log_softmax(logits)[rows, own[:4]]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_classes_have_a_loss_and_an_accuracy_in_which_rows_of_weight_0_do_not_count():
    config = with_head("classification", transform=True, dropout_rate=0.1)
    batch = text_batch(labels=np.array([0, 1, 2, 2], np.int32))
    params, scores = call(config, batch, lambda model, batch: model.scores(batch)[0])
    assert scores.shape == (4, 3) and config.draws
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == sum(count_parameters(config).values())
    batch["label_weights"][3] = 0
    found = metrics_of(config, batch)
    log_p = jax.nn.log_softmax(scores)
    np.testing.assert_allclose(found["loss"], -np.mean([log_p[i, i] for i in range(3)]), rtol=1e-5)
    assert found["loss/head"] == found["loss"]
    np.testing.assert_allclose(found["accuracy"], np.mean(np.argmax(np.asarray(scores), 1)[:3] == [0, 1, 2]))


def test_a_number_has_a_squared_error_and_no_accuracy():
    config = with_head("regression", "decoder", pooling="last")
    batch = text_batch(stack="decoder", labels=np.array([0.5, -1, 2, 0], np.float32))
    _, scores = call(config, batch, lambda model, batch: model.scores(batch)[0])
    found = metrics_of(config, batch)
    np.testing.assert_allclose(found["loss"], np.mean((scores - batch["labels"]) ** 2), rtol=1e-5)
    assert "accuracy" not in found


def test_a_decoder_sees_the_whole_text_where_the_batch_says_so():
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


def test_a_text_is_nearest_to_itself_and_padding_changes_nothing():
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


def test_a_head_that_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="two or more"):
        abstract(dataclasses.replace(with_head("classification"), task_head=TaskHead(kind="classification")))
    with pytest.raises(ConfigError, match="one stack"):
        abstract(dataclasses.replace(model("encoder_decoder"), task_head=TaskHead(kind="embedding")))


def labelled_run() -> RunConfig:
    corpus = CorpusConfig(
        files=("texts.jsonl",), inputs_field="text", text_field="label", target_kind="label", labels=LABELS
    )
    return RunConfig(
        name="labelled",
        model=dataclasses.replace(with_head("classification"), vocab_size=300),
        data=DataConfig(
            corpus=corpus,
            tokenizer=TokenizerConfig(kind="bytes", num_sentinels=4),
            layout="encoder",
            mixture=(Labelled(kind="classification"),),
            inputs_length=32,
            targets_length=0,
        ),
        training=TrainingConfig(num_train_steps=10, batch_size=8),
    )


@pytest.mark.parametrize(
    "path, value, told",
    [
        ("model.task_head", None, "model.task_head"),
        ("model.task_head.labels", ("red", "blue", "green"), "model.task_head.labels"),
        ("model.task_head.kind", "token_classification", "model.task_head.kind"),
        ("data.examples", "documents", "data.examples"),
        ("data.targets_length", 4, "data.targets_length"),
        ("data.corpus.labels", (), "data.corpus.labels"),
        ("data.corpus.labels", ("red", "red", "blue"), "data.corpus.labels"),
        ("data.corpus.target_kind", "number", "data.corpus.target_kind"),
        ("data.corpus.inputs_field", None, "data.corpus.inputs_field"),
        ("data.mixture", (Labelled(kind="classification"), Labelled(kind="classification", name="b")), "data.mixture"),
    ],
)
def test_a_run_whose_head_and_data_do_not_agree_is_refused(path, value, told):
    run = labelled_run()
    assert not validate(run)
    assert told in [problem.where for problem in validate(changed(run, path, value))]


def test_scores_of_heads_against_their_definitions():
    true, said = np.array([0, 0, 1, 2, 2, 2]), np.array([0, 1, 1, 2, 2, 0])
    f1 = [2 * 1 / (2 + 2), 2 * 1 / (1 + 2), 2 * 2 / (3 + 2)]
    found = classes(true, said, 4)
    np.testing.assert_allclose([found["f1_macro"], found["majority"]], [np.mean(f1), 0.5])
    x, y = np.array([1.0, 2, 3, 4]), np.array([1.0, 8, 27, 64])
    np.testing.assert_allclose(correlations(x, y)["spearman"], 1)
    np.testing.assert_allclose(correlations(x, y)["pearson"], np.corrcoef(x, y)[0, 1])
    assert correlations(x, x)["r2"] == 1
    queries = np.eye(4)
    assert retrieval(queries, queries)["mrr"] == 1
    assert retrieval(queries, np.roll(queries, 1, axis=0))["recall_at_1"] == 0


def test_texts_are_told_from_those_of_all_devices():
    run = labelled_run()
    corpus = CorpusConfig(files=("pairs.jsonl",), inputs_field="text", text_field="other")
    data = dataclasses.replace(run.data, corpus=corpus, mixture=(Labelled(kind="embedding"),), inputs_length=12)
    config = dataclasses.replace(with_head("embedding"), vocab_size=300)
    run = dataclasses.replace(run, model=config, data=data)
    assert not validate(run)
    random = np.random.default_rng(0)
    batch = {
        name: random.integers(1, 60, (8, 12)).astype(np.int32)
        for name in ("encoder_input_tokens", "positive_input_tokens")
    }
    batch |= {"label_weights": np.ones(8, np.int32), "denoiser_ids": np.zeros(8, np.int32)}
    params = jax.device_get(jax.jit(lambda: build(config, jax.random.key(0)))())
    found = []
    for count in (1, 8):
        program = assemble(run, jax.devices()[:count])
        placed = jax.tree.map(jax.device_put, params, jax.tree.map(lambda x: x.sharding, program.abstract_params))
        metrics = program.eval_step(placed, program.put({"main": batch}))
        found.append({name: value(mean) for name, mean in metrics.items()})
    assert found[0].keys() == found[1].keys() and 0.5 < found[0]["loss"]
    for name in found[0]:
        np.testing.assert_allclose(found[0][name], found[1][name], rtol=1e-4, atol=1e-6)
