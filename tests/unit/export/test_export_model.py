"""Exported models: run by their loader in a process without this package, with int8's error within its bound."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.model_examples import EXAMPLES, VOCABULARY, forward, model, parameters
from helpers.model_examples import tokens as tokens_of
from helpers.task_head_examples import with_head
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_like.errors import ConfigError
from t5x_like.export import loader
from t5x_like.export.bundle import Prompts, write_exported
from t5x_like.export.quantization import SCALE, contracted_axes, quantized, unpacked
from t5x_like.export.traced_functions import Lengths, exported_functions
from t5x_like.models.factory import abstract_model, bind_params, kernels
from t5x_like.utils.tree_paths import by_path

MODELS = EXAMPLES | {
    "t5": model("encoder_decoder"),
    "learned": model("prefix_lm", "learned"),
    "encoder": model("encoder", "rope"),
}
# A backend for all platforms, as `export_model` sets it.
ALL = {name: dataclasses.replace(config, attention="reference") for name, config in MODELS.items()}
PROMPT, NEW = 9, 6
FORBIDDEN = [0, 5, 6]

# Whatever it would import beside jax and what jax itself needs is refused, so that nothing is there by accident.
ALONE = """
import json, sys
import jax, jax.export, jax.numpy, numpy
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("t5x_like", "flax", "optax", "orbax", "safetensors", "tensorstore"):
            raise ImportError(f"{name} must not be needed")
sys.meta_path.insert(0, Refuse())
sys.path.insert(0, sys.argv[1])
from loader import load
model = load()
rows = json.loads(sys.argv[2])
if "predict" in model.functions:
    print(json.dumps(numpy.asarray(model.call("predict", *model.pad(rows))).tolist()))
else:
    print(json.dumps([model.generate(rows[:count], int(sys.argv[3])) for count in (len(rows), 1)]))
"""


def exported(folder, config, weights, **changes):
    folder.mkdir()
    prompts = Prompts(forbidden_ids=FORBIDDEN)
    write_exported(folder, config, weights, Lengths(PROMPT, NEW), prompts=prompts, dtype="float32", **changes)
    return folder


def run_alone(folder, rows, new=NEW):
    command = [sys.executable, "-c", ALONE, str(folder), json.dumps(rows), str(new)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def rows_of(seed, *lengths):
    random = np.random.default_rng(seed)
    return [random.integers(1, VOCABULARY, length).tolist() for length in lengths]


def greedy(config, prompts, new):
    """Decode greedily; every step reads the whole of every row again."""
    answers = []
    for prompt in prompts:
        stream, answer = (
            [config.decoder_start_token_id] if config.encoder is not None else [config.decoder_start_token_id, *prompt],
            [],
        )
        for _ in range(new):
            batch = {"decoder_input_tokens": np.array([[*stream, *[0] * (PROMPT + NEW - len(stream))]], np.int32)}
            if config.encoder is not None:
                batch["encoder_input_tokens"] = np.array([[*prompt, *[0] * (PROMPT - len(prompt))]], np.int32)
            logits = np.array(forward(config)(parameters(config), batch))[0, len(stream) - 1]
            logits[FORBIDDEN] = -np.inf
            if (token := int(logits.argmax())) in config.eos_ids:
                break
            stream, answer = [*stream, token], [*answer, token]
        answers.append(answer)
    return answers


def some_slow(names, quick):
    return [pytest.param(name, marks=[] if name in quick else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", some_slow([name for name in ALL if name != "encoder"], []))
def test_loader_generates_the_same_tokens_as_the_model(tmp_path, name):
    config = ALL[name]
    folder = exported(tmp_path / "out", config, by_path(parameters(config)))
    rows = rows_of(3, 4, PROMPT - 1, 1)
    expected = greedy(config, rows, NEW)
    assert any(expected)
    assert run_alone(folder, rows) == [expected, expected[:1]]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["classification", "embedding"])
def test_outputs_of_a_task_head_are_exported(kind):
    config = dataclasses.replace(with_head(kind), attention="reference")
    weights = by_path(parameters(config))
    predict = exported_functions(config, weights, Lengths(PROMPT, NEW), platforms=("cpu",))["predict"]
    tokens, lengths = tokens_of(0, 3, PROMPT), np.array([PROMPT, 4, 1], np.int32)
    batch = {"encoder_input_tokens": tokens, "encoder_segment_ids": (np.arange(PROMPT) < lengths[:, None]).astype(int)}
    graphdef = abstract_model(config).graphdef
    expected = jax.jit(lambda params: bind_params(graphdef, params).scores(batch)[0])(parameters(config))
    np.testing.assert_allclose(predict.call(weights, tokens, lengths), expected, atol=1e-5)


def test_logits_of_an_encoder_do_not_depend_on_padding_and_batch_size(tmp_path):
    config = ALL["encoder"]
    folder = exported(tmp_path / "out", config, by_path(parameters(config)))
    rows = rows_of(4, PROMPT, 5)
    found = np.array(run_alone(folder, rows))
    for row, logits in zip(rows, found, strict=True):
        alone = forward(config)(parameters(config), {"encoder_input_tokens": np.array([row], np.int32)})
        np.testing.assert_allclose(logits[: len(row)], alone[0], atol=1e-5)


def test_loader_without_flatbuffers_says_what_to_install(tmp_path):
    """jax reads exported functions by this package and does not install it."""
    shutil.copy(loader.__file__, tmp_path / "loader.py")
    program = (
        "import sys\n"
        "sys.modules['flatbuffers'] = None\n"
        "import loader\n"
        "try:\n    loader._deserialize(b'')\nexcept ImportError as error:\n    print(error)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "pip install flatbuffers" in done.stdout, done.stderr[-2000:]


def test_program_has_three_platforms_and_a_symbolic_batch_size():
    config = ALL["t5"]
    functions = exported_functions(config, by_path(parameters(config)), Lengths(PROMPT, NEW))
    assert list(functions) == ["encode", "prefill", "decode"]
    for name, function in functions.items():
        assert function.platforms == ("cpu", "cuda", "tpu"), name
        batched = [aval for aval in function.out_avals if any(not isinstance(size, int) for size in aval.shape)]
        assert len(batched) == len(function.out_avals)


def test_attention_that_depends_on_the_platform_is_refused():
    config = dataclasses.replace(ALL["t5"], attention="splash")
    with pytest.raises(ConfigError, match="found splash, expected a backend that runs on every platform: reference"):
        exported_functions(config, {}, Lengths(PROMPT, NEW))


def test_lengths_beyond_learned_positions_are_refused():
    config = ALL["learned"]
    with pytest.raises(ConfigError, match="33 positions, expected at most 32"):
        exported_functions(config, by_path(parameters(config)), Lengths(27, 6))


@pytest.mark.parametrize("name", some_slow(ALL, ["t5"]))
def test_int8_error_is_at_most_half_a_level(name):
    config = ALL[name]
    params = parameters(config)
    weights, before = quantized(params, config), by_path(params)
    assert {path for path, leaf in weights.items() if leaf.dtype == jnp.int8} == set(contracted_axes(config))
    assert set(kernels(config)) <= set(contracted_axes(config))
    assert jax.tree.structure(unpacked(weights)) == jax.tree.structure(params)
    after = by_path(unpacked(weights))
    for path, leaf in before.items():
        # Round to the nearest of 127 levels on each side; the rest is bitwise what it was.
        bound = 0.5001 * np.asarray(weights[path + SCALE]) if path + SCALE in weights else 0.0
        assert np.all(np.abs(np.asarray(after[path]) - np.asarray(leaf)) <= bound), path


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), factor=st.floats(2.0**-20, 2.0**20))
def test_int8_scales_are_proportional_to_the_weights(seed, factor):
    """An output's scale follows its weights alone: another output, however large, does not coarsen it."""
    config = ALL["encoder"]
    path = "encoder/layers/mlp/wo/kernel"
    random = np.random.default_rng(seed)
    shape = by_path(parameters(config))[path].shape
    kernel = random.normal(size=shape).astype(np.float32)
    tree = parameters(config)
    larger = kernel.copy()
    larger[..., 0] *= factor
    small, large = (quantized(_with(tree, path, value), config) for value in (kernel, larger))
    np.testing.assert_array_equal(small[path][..., 1:], large[path][..., 1:])
    np.testing.assert_allclose(large[path + SCALE][..., 0], small[path + SCALE][..., 0] * factor, rtol=1e-6)


def _with(tree, path, value):
    name, _, rest = path.partition("/")
    return tree | {name: jnp.asarray(value) if not rest else _with(tree[name], rest, value)}


def test_int8_of_zero_weights_is_zero():
    config = ALL["encoder"]
    zeros = jax.tree.map(jnp.zeros_like, parameters(config))
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(unpacked(quantized(zeros, config))))


def test_int8_programs_run_on_int8_weights(tmp_path):
    config = ALL["encoder"]
    weights = quantized(parameters(config), config)
    folder = exported(tmp_path / "out", config, weights)
    rows = rows_of(5, PROMPT)
    found = np.array(run_alone(folder, rows))
    batch = {"encoder_input_tokens": np.array(rows, np.int32)}
    np.testing.assert_allclose(found, forward(config)(unpacked(weights), batch), atol=1e-5)
    whole = sum(leaf.nbytes for leaf in by_path(parameters(config)).values())
    assert (folder / "weights.safetensors").stat().st_size < whole
