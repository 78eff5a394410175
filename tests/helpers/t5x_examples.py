"""Checkpoints of this package's parameters in exactly the format that T5X's `Checkpointer` and Orbax write."""

import jax
import numpy as np
import tensorstore as ts
from flax import serialization

from t5x_like.interop.t5x.weight_map import tensors

SMALL = 100
"""Arrays with fewer elements are in the index itself, as T5X keeps those without a partitioning."""


def flat(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def arrays(params, axis=None, *, joined=True):
    """Return T5X's arrays by path below target. The names are the importer's; the layout is written out here."""
    leaves = flat(params)
    by_path = {}
    for tensor in tensors({path: leaf.shape for path, leaf in leaves.items()}, axis):
        leaf = leaves[tensor.rule.param]
        leaf = leaf if tensor.layer is None else leaf[tensor.layer]
        if leaf.ndim - (tensor.axis is not None) == 3 and joined and "attention" in tensor.path:
            lead = leaf.shape[:1] if tensor.axis is not None else ()
            inner = leaf.shape[len(lead) :]
            pair = (inner[0] * inner[1], inner[2]) if "/out/" in tensor.path else (inner[0], inner[1] * inner[2])
            leaf = leaf.reshape(*lead, *pair)
        if "relpos_bias" in tensor.path:
            leaf = np.swapaxes(leaf, -1, -2)
        by_path[tensor.path] = leaf if tensor.axis is None else np.moveaxis(leaf, 0, tensor.axis)
    return by_path


def nested(by_path):
    tree = {}
    for path, leaf in by_path.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def write_legacy(directory, by_path, *, version=3, dtype="float32", driver="file", states=None):
    """Write `checkpoint_N/` of T5X's Checkpointer: gzip zarr arrays of several chunks, and the msgpack index."""
    directory.mkdir(parents=True)
    written = {f"target/{path}": leaf for path, leaf in by_path.items()}
    written |= {f"state/param_states/{path}": leaf for path, leaf in (states or {}).items()}
    entries = {path: _write(directory, path, leaf, dtype, driver) for path, leaf in written.items()}
    tree = nested(entries)
    tree.setdefault("state", {})["step"] = np.int32(1000)
    index = serialization.to_bytes({"version": version, "optimizer": tree})
    (directory / "checkpoint").write_bytes(index)
    return directory


def _write(directory, path, leaf, dtype, driver):
    if leaf.size < SMALL:
        return np.ascontiguousarray(leaf)
    name = path.replace("/", ".")
    chunks = [size // 2 if size % 2 == 0 else size for size in leaf.shape]
    metadata = {"compressor": {"id": "gzip"}, "shape": list(leaf.shape), "chunks": chunks}
    spec = {"driver": "zarr", "dtype": dtype, "metadata": metadata}
    store = {"driver": "file", "path": str(directory / name)}
    opened = ts.open({**spec, "kvstore": store}, create=True, open=True).result()
    opened.write(leaf.astype(opened.dtype.numpy_dtype)).result()
    inner = {"driver": driver, "path": f"{name}/"} | ({"bucket": "t5x-dummy-bucket"} if driver == "gcs" else {})
    return {**spec, "kvstore": inner}


def write_orbax(directory, by_path, *, ocdbt=True):
    """Write `checkpoint_N/state/` of T5X's OrbaxCheckpointManagerInterface."""
    import orbax.checkpoint as ocp

    tree = {"target": nested(by_path), "state": {"step": np.int32(1000), "param_states": {}}}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt)) as checkpointer:
        checkpointer.save(directory / "state", tree)
    return directory
