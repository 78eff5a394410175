"""Sources of documents: text files, tables, TensorFlow Datasets, seqio Tasks and the embedded corpus."""
