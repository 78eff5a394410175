"""The deterministic stream of training rows: windows, packing, mixing, feature conversion, batches and prefetching."""
