"""`t5x-like convert --to hf`: write a model as a Hugging Face directory."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from t5x_like.adapters.base_weights import BASE
from t5x_like.checkpoints import model_dir
from t5x_like.checkpoints.checkpoint_ref import CheckpointRef
from t5x_like.checkpoints.model_dir import HUGGINGFACE_DIR
from t5x_like.errors import DataError, SafetyError
from t5x_like.export.model_card import model_card
from t5x_like.export.sentence_files import write_sentence_files
from t5x_like.interop.huggingface.checkpoint import (
    LEFT_OUT,
    SENTENCE_FILES,
    SHARD_BYTES,
    TOKENIZER_FILES,
    copied,
    write_directory,
)
from t5x_like.interop.huggingface.config_reader import Fields
from t5x_like.interop.huggingface.family_matching import PREFIX_LM, require_family, written_model
from t5x_like.interop.huggingface.tokenizer_export import write_tokenizer
from t5x_like.interop.safetensors_file import Pending, TensorFile
from t5x_like.model_loading import LoadedModel, open_model
from t5x_like.models.factory import abstract_model
from t5x_like.storage.mirror import local_copy
from t5x_like.utils import tree_paths
from t5x_like.utils.atomic_write import write_atomically
from t5x_like.utils.sanitize import say


@dataclasses.dataclass(frozen=True)
class _Origin:
    """Hugging Face directory that a model was imported from.

    Attributes:
      family: Its `model_type`.
      folder: Folder with its config.json and tokenizer files.
      left_out: Its tensors for which the model has no parameters.
    """

    family: str | None
    folder: Path
    left_out: list[Pending]


def export_directory(
    model: str | Path | CheckpointRef,
    out: Path,
    *,
    family: str | None = None,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
    license_id: str | None = None,
    report: Callable[[str], None] = say,
) -> None:
    """Write a model as a Hugging Face directory, with adapters merged into their base.

    Args:
      model: Directory of the model, with its step if one is named.
      family: `model_type` to write; None for that of the import, or the plainest that the model belongs to.
      dtype: Type of the tensors: float32 or bfloat16.
      shard_bytes: Size from which the tensors are split into several files.
      license_id: Licence of the weights for the model card of a run, as the hub names it.
      report: Called with each line of the report.

    Raises:
      SafetyError: the model was trained as a prefix LM, which no decoder of transformers computes.
      DataError, RefusedError: there is no checkpoint, the model belongs to no such family, or `out` exists.
    """
    loaded = open_model(model)
    _require_causal(loaded)
    origin = _origin(loaded)
    export_family = require_family(loaded.model, family or origin.family)
    kind = export_family.model_type
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), abstract_model(loaded.model).params
    )
    # The store may be missing: only the tokenizer is then not written.
    step, params = loaded.params(abstract_params=shapes, check_data=False)
    tree_paths.require_finite(params, str(model))
    with model_dir.made_whole(out) as partial:
        base: dict[str, Any] = {}
        left_out: list[Pending] = []
        if origin.family == kind and (origin.folder / "config.json").is_file():
            base = Fields.read(origin.folder / "config.json").values
            left_out = origin.left_out
            for name in (*TOKENIZER_FILES, *SENTENCE_FILES):
                if (origin.folder / name).is_file():
                    (partial / name).parent.mkdir(exist_ok=True)
                    shutil.copyfile(origin.folder / name, partial / name)
        else:
            for line in _write_run_tokenizer(partial, loaded):
                report(f"  not written: {line}")
            for line in write_sentence_files(partial, loaded):
                report(f"  not written: {line}")
        if export_family.missing_note and not left_out:
            report(f"  not written: {export_family.missing_note}")
        write_directory(
            partial,
            written_model(loaded.model, export_family),
            params,
            kind,
            base=base,
            left_out=left_out,
            dtype=dtype,
            shard_bytes=shard_bytes,
        )
        size = sum(leaf.size for leaf in jax.tree.leaves(params))
        if loaded.kind == "run":
            card = model_card(loaded, step, size, export_family.written_type, license_id)
            write_atomically(partial / "README.md", card)
    report(f"{out}: {kind}, {size:,} parameters in {dtype}")


def _require_causal(loaded: LoadedModel) -> None:
    """Raise SafetyError for a prefix LM: decoders of transformers attend causally to the prefix as well."""
    if loaded.trained_on is not None and loaded.trained_on.layout == "prefix_lm":
        raise SafetyError(
            f"{loaded.path}: found a run with data.layout prefix_lm, expected causal_lm: {PREFIX_LM}. Export it by "
            "`t5x-like export`, or train it further with data.layout causal_lm and initialize_from"
        )


def _origin(loaded: LoadedModel) -> _Origin:
    """Return the directory that the model, or the base of its adapters, was imported from."""
    if loaded.source is not None:
        description, weights = loaded.source.description, loaded.source.weights
        unused = [copied(weights, name) for name in description.unused]
        return _Origin(description.family.model_type, loaded.path, unused)
    path, lora = loaded.path, loaded.run.training.lora
    base = path if lora is None else local_copy(lora.base, BASE)
    if (base / model_dir.MODEL).is_file():
        path = base
    folder = path / HUGGINGFACE_DIR
    left_out: list[Pending] = []
    if (folder / LEFT_OUT).is_file():
        file = TensorFile(folder / LEFT_OUT)
        left_out = [copied(file, name) for name in file.tensors]
    return _Origin(model_dir.read_model(path)[1], folder, left_out)


def _write_run_tokenizer(out: Path, loaded: LoadedModel) -> list[str]:
    """Write the tokenizer of a run's store; return a line if it cannot be written."""
    if loaded.trained_on is None:
        return []
    if loaded.trained_on.seqio is not None:
        return ["a tokenizer: the run reads a seqio Task live"]
    try:
        return write_tokenizer(out, loaded.tokenizer, loaded.model.architecture)
    except DataError as error:
        return [f"a tokenizer: {error}"]
