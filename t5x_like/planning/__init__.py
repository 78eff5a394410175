"""Planning of a run before it is started: sizes, FLOPs and memory for the machines to choose from."""
