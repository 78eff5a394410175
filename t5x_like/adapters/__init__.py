"""LoRA: low-rank adapters, their frozen base weights, and merging."""
