"""Loader of an exported model, which needs jax, NumPy and flatbuffers (`pip install jax flatbuffers`).

Every exported directory has a copy of this file.

    from loader import load

    model = load(".")                                     # the directory of manifest.json
    model.generate([[37, 405, 1]], max_new_tokens=20)     # token ids in, token ids out, greedy

`model.call(NAME, ...)` calls one function of manifest.json's "functions" on any number of rows. The manifest describes
its arguments after the weights and its results.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

SCHEMA_VERSION = 1
_DTYPES = {"F32": np.float32, "BF16": jnp.bfloat16, "I8": np.int8}


def load(directory: str | Path = Path(__file__).parent) -> "ExportedModel":
    """Load a directory that `t5x-like export` wrote, with its weights on jax's first device."""
    return ExportedModel(Path(directory))


class ExportedModel:
    """An exported model.

    Attributes:
      manifest: Contents of manifest.json: special ids, lengths and functions of the model.
      weights: Weights by name, on the device.
    """

    def __init__(self, directory: Path):
        self.manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
        version = self.manifest["schema_version"]
        if version != SCHEMA_VERSION:
            raise ValueError(
                f"{directory}: schema_version {version}, expected {SCHEMA_VERSION}: take the loader beside it"
            )
        self.functions = {}
        for name in self.manifest["functions"]:
            exported = _deserialize((directory / f"{name}.stablehlo").read_bytes())
            # The cache is donated, so that it is in memory only once.
            self.functions[name] = jax.jit(exported.call, donate_argnums=(1,) if name == "decode" else ())
        self.weights = read_weights(directory / "weights.safetensors")

    def call(self, name: str, *arguments: Any) -> Any:
        """Return the result of a function on the model's weights and these arguments."""
        return self.functions[name](self.weights, *arguments)

    def pad(self, rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Return rows of token ids as arguments of the functions: (tokens int32 [B, P], lengths int32 [B])."""
        longest = self.manifest["prompt_length"]
        tokens = np.zeros((len(rows), longest), np.int32)
        for tokens_P, row in zip(tokens, rows, strict=True):
            if not 0 < len(row) <= longest:
                raise ValueError(f"found a row of {len(row)} tokens, expected 1 to {longest}")
            tokens_P[: len(row)] = row
        return tokens, np.array([len(row) for row in rows], np.int32)

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """Return the greedy continuation of each prompt, without the token that ends it.

        Args:
          prompts: Token ids: inputs of the encoder, or the beginning of a decoder's stream without the start token.
          max_new_tokens: At most manifest.json's "new_tokens".
        """
        manifest = self.manifest
        if not 0 < max_new_tokens <= manifest["new_tokens"]:
            raise ValueError(f"max_new_tokens {max_new_tokens}, expected 1 to {manifest['new_tokens']}")
        if not prompts:
            return []
        has_encoder = manifest["has_encoder"]
        tokens, lengths = self.pad(
            prompts if has_encoder else [[manifest["decoder_start_token_id"], *row] for row in prompts]
        )
        result = self.call("prefill", tokens, lengths)
        chosen_by_step: list[np.ndarray] = []
        done = np.zeros(len(prompts), bool)
        while True:
            logits = np.array(result["logits"])
            logits[:, manifest["forbidden_ids"]] = -np.inf
            chosen = logits.argmax(axis=-1).astype(np.int32)
            done |= np.isin(chosen, manifest["eos_ids"])
            chosen_by_step.append(np.where(done, -1, chosen))
            if done.all() or len(chosen_by_step) == max_new_tokens:
                break
            result = self.call("decode", result["cache"], chosen)
        return [[token for token in row if token >= 0] for row in np.stack(chosen_by_step, axis=1).tolist()]


def _deserialize(contents: bytes) -> jax.export.Exported:
    try:
        return jax.export.deserialize(bytearray(contents))
    except ImportError as error:
        # jax imports flatbuffers when it reads an exported function, and does not install it.
        raise ImportError(f"{error}; install it: pip install flatbuffers") from None


def read_weights(path: Path) -> dict[str, jax.Array]:
    """Return the tensors of a safetensors file by name, as jax arrays."""
    data = np.memmap(path, np.uint8, mode="r")
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8:start].tobytes())
    header.pop("__metadata__", None)
    weights = {}
    for name, entry in header.items():
        begin, end = (start + offset for offset in entry["data_offsets"])
        dtype = np.dtype(_DTYPES[entry["dtype"]])
        if end > data.size or end - begin != math.prod(entry["shape"]) * dtype.itemsize:
            raise ValueError(f"{path}: {name} lies from byte {begin} to {end} of {data.size}: a truncated file?")
        weights[name] = jnp.asarray(np.frombuffer(data[begin:end].tobytes(), dtype).reshape(entry["shape"]))
    return weights
