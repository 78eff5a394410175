"""Hugging Face checkpoints (config.json and safetensors), read and written without torch or transformers.

config_reader: typed access to config.json.
weight_map: rules that map tensors to parameters.
families: presets, rules and config.json of each model family, and their registry.
family_matching: the family of a checkpoint, and the families that can express a model.
state_dict: conversion of the tensors, one by one.
checkpoint: whole directories, as `t5x-like convert` reads and writes them.
"""
