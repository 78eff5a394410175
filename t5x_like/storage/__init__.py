"""Storage: one interface for local folders and object stores, through TensorStore's key-value stores.

TensorStore is used, and not fsspec or etils.epath, because it writes on the condition that a key has not changed (which
a lease needs), repeats failed requests with growing pauses and jitter, and is what arrays are read and written with.
Its drivers can be pointed at other servers of the two protocols: Google's by TENSORSTORE_GCS_HTTP_URL, Amazon's by an
endpoint. An object store has neither rename nor folders, locks or appends; what is built on this package needs none.
"""
