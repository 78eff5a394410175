"""T5X's checkpoints to parameters.

arrays: the files, legacy (a msgpack index beside TensorStore arrays) and Orbax, of which nothing is believed unchecked.
names: which array is which parameter, one table for layers by name and for layers in one array.
convert: the arrays themselves, one by one.
directories: whole checkpoints, as `t5x-like convert` reads them.
"""
