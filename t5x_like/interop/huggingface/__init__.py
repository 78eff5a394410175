"""Hugging Face's directories (config.json and safetensors) to parameters and back.

names: which tensor is which parameter, one table per family, read in both directions.
settings: config.json to ModelConfig and back.
convert: the tensors themselves, one by one.
directories: whole directories, as `t5x-like convert` reads and writes them.
"""
