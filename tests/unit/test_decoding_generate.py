"""The engine with its cache against the model without one, recomputed from the start for every token."""

import copy
import functools

import jax
import numpy as np
import pytest

from t5x_like.config import CausalLM, ConfigError, DataConfig, ModelConfig, RunConfig, StackConfig, TrainingConfig, ul2
from t5x_like.decoding import generate
from t5x_like.decoding.continuous import Batcher, Sizes
from t5x_like.decoding.generate import generate_tokens
from t5x_like.decoding.sampling import Sampling
from t5x_like.program import Program, assemble

VOCABULARY = 64
EOS = 1
PROMPTS = [[5, 9, 33, 7, 1], [8], [12, 40, 41, 42, 3, 3, 3, 17, 20, 21, 50, 51, 52, 53, 54, 55, 56, 1], [60, 2]]
ALLOWED = (np.arange(VOCABULARY) % 7 != 0) & (np.arange(VOCABULARY) != EOS)


@functools.cache
def untrained(layout: str, positions: str = "relative_bias", max_positions: int = 64) -> tuple[Program, dict]:
    """A program, and parameters so large that the next token depends on all of the text before it."""
    stack = StackConfig(
        num_layers=2,
        d_model=32,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        d_ff=64,
        positions=positions,
        max_positions=max_positions,
    )
    encoder = stack if layout == "encoder_decoder" else None
    run = RunConfig(
        name="tiny",
        model=ModelConfig(encoder=encoder, decoder=stack, vocab_size=VOCABULARY),
        data=DataConfig(
            layout=layout,
            mixture=(CausalLM(),) if layout == "causal_lm" else ul2(),
            inputs_length=32,
            targets_length=32,
        ),
        training=TrainingConfig(num_train_steps=1, batch_size=4),
    )
    program = assemble(run, jax.devices()[:1])
    rng = np.random.default_rng(0)
    return program, jax.tree.map(lambda leaf: rng.normal(0.0, 0.4, leaf.shape).astype(np.float32), program.spec.params)


def recompute(program: Program, params, prompts: list[list[int]], steps: int) -> list[list[int]]:
    """Greedy decoding without a cache, one row at a time; cells to the right of the last token do not matter."""
    layout = program.run.data.layout
    logits = jax.jit(lambda params, batch: program.model(params)(batch)[0])

    def row(tokens: list[int]) -> np.ndarray:
        return np.pad(np.array(tokens, np.int32), (0, 48 - len(tokens)))[None]

    def next_token(prompt: list[int], tokens: list[int]) -> int:
        stream = [0, *tokens] if layout == "encoder_decoder" else [0, *prompt, *tokens]
        batch = {"decoder_input_tokens": row(stream)}
        if layout == "encoder_decoder":
            batch["encoder_input_tokens"] = row(prompt)
        if layout == "prefix_lm":
            batch["decoder_causal_attention"] = row([1] * (len(prompt) + 1))
        return int(np.where(ALLOWED, logits(params, batch)[len(stream) - 1], -np.inf).argmax())

    results = []
    for prompt in prompts:
        tokens: list[int] = []
        while len(tokens) < steps:
            tokens.append(next_token(prompt, tokens))
        results.append(tokens)
    return results


@pytest.mark.parametrize(
    ("layout", "positions"),
    [
        ("encoder_decoder", "relative_bias"),
        ("encoder_decoder", "learned"),
        ("prefix_lm", "relative_bias"),
        ("prefix_lm", "rope"),
        ("causal_lm", "rope"),
        ("causal_lm", "relative_bias"),
    ],
)
def test_greedy_with_the_cache_equals_recomputation(layout, positions):
    program, params = untrained(layout, positions)
    bidirectional = layout == "prefix_lm"
    settings = dict(allowed_V=ALLOWED, max_new_tokens=20, bidirectional=bidirectional)
    found = generate_tokens(program, params, PROMPTS, batch_size=3, **settings)
    assert found == recompute(program, params, PROMPTS, 20)
    assert len({token for tokens in found for token in tokens}) > 10, "equal tokens throughout would say little"


def test_the_prefix_is_read_in_both_directions():
    program, params = untrained("prefix_lm")
    settings = dict(allowed_V=ALLOWED, max_new_tokens=20)
    both = generate_tokens(program, params, PROMPTS, bidirectional=True, **settings)
    assert both != generate_tokens(program, params, PROMPTS, **settings)


def test_a_row_stops_at_eos_and_at_the_limit():
    program, params = untrained("causal_lm")
    free = generate_tokens(program, params, PROMPTS, allowed_V=ALLOWED, max_new_tokens=24)
    assert [len(tokens) for tokens in free] == [24] * 4
    assert generate_tokens(program, params, PROMPTS, allowed_V=ALLOWED, max_new_tokens=17) == [t[:17] for t in free]
    assert generate_tokens(program, params, [], allowed_V=ALLOWED, max_new_tokens=24) == []

    # A model that says EOS where this one says some token: rows end there, each on its own, and the others go on.
    token = free[0][11]
    swap = np.arange(VOCABULARY)
    swap[[EOS, token]] = token, EOS
    swapped = copy.copy(params)
    swapped["head"] = {"kernel": params["head"]["kernel"][:, swap]}
    cut = generate_tokens(program, swapped, PROMPTS, allowed_V=ALLOWED[swap], max_new_tokens=24)
    assert cut == [tokens[: tokens.index(token)] if token in tokens else tokens for tokens in free]
    assert len(set(map(len, cut))) > 1


@pytest.mark.parametrize("layout", ["encoder_decoder", "prefix_lm"])
def test_a_sampled_row_does_not_depend_on_its_neighbours(layout):
    program, params = untrained(layout)
    sample = functools.partial(
        generate_tokens,
        program,
        params,
        allowed_V=ALLOWED,
        max_new_tokens=12,
        bidirectional=layout == "prefix_lm",
        sampling=Sampling(temperature=1.5, top_k=20, top_p=0.95),
    )
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[3]]
    together = sample(prompts, seed=7)
    assert together == [sample([prompt], seed=7, rows=[row])[0] for row, prompt in enumerate(prompts)]
    assert sample([[9] * 4, *prompts[::-1]], seed=7, rows=[3, 2, 1, 0])[1:] == together[::-1]
    # The same prompt in another row, or under another seed, is another draw.
    same = sample([PROMPTS[0]] * 3, seed=7)
    assert len(set(map(tuple, same))) == 3
    assert sample(prompts, seed=8) != together


def test_calls_of_many_lengths_compile_once():
    program, params = untrained("causal_lm")
    before = generate._decode_batch._cache_size()
    for length in range(1, 15):
        prompts = [[5] * length, [6], [7] * (length // 2)]
        generate_tokens(program, params, prompts, allowed_V=ALLOWED, max_new_tokens=1 + length)
    assert generate._decode_batch._cache_size() - before <= 1


def test_learned_positions_limit_the_prompt():
    program, params = untrained("causal_lm", "learned", max_positions=24)
    assert len(generate_tokens(program, params, [[5] * 17], allowed_V=ALLOWED, max_new_tokens=6)[0]) == 6
    with pytest.raises(ConfigError, match="26 positions, expected at most 24"):
        Batcher(program, params, allowed_V=ALLOWED, sizes=Sizes(prompt_length=16, new_tokens=9))
    with pytest.raises(ConfigError, match="25 positions, expected at most 24"):
        generate_tokens(program, params, [[5] * 17], allowed_V=ALLOWED, max_new_tokens=7)
