"""From documents to batches: corpora, tokenizers, token stores, denoisers, features, and the stream over them."""
