"""Import of T5X checkpoints.

checkpoint_reader: the files, legacy (a msgpack index beside TensorStore arrays) and Orbax, all checked before use.
weight_map: mapping of arrays to parameters, for layers by name and for layers in one array.
state_dict: conversion of the arrays, one by one.
adafactor_state: conversion of Adafactor's second moments.
checkpoint: whole checkpoints, as `t5x-like convert` reads them.
"""
