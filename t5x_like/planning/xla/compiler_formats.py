"""Text formats of XLA's TPU compiler that this package reads, as regular expressions, in one module.

None of these formats is an interface: a new libtpu may change any of them. After an update of libtpu, run the tests in
`tests/aot`, mend the expressions here, and change the version.
"""

from __future__ import annotations

import re

LIBTPU_VERSION = "0.0.42"
"""Version of libtpu whose texts the expressions were written for."""

# The compiler's messages.
REMATERIALIZATION = "Involuntary full rematerialization"
"""Warning of a resharding that XLA can only do by gathering the whole array."""
REQUIRED_MEMORY = re.compile(
    r"\(?(\d+(?:\.\d+)?)([KMGT])\)?(?: of (?:\d|\.)+[KMGT] hbm|\)? exceeds available)", re.IGNORECASE
)
"""Bytes, with their unit, that a program needs, in the error of a program that does not fit."""

# The text of a compiled program, `compiled.as_text()`; XLA:CPU shares it.
ARRAY = re.compile(r"([a-z]+[0-9]*[a-z0-9]*)\[([0-9,<=]*)\](\{[^{}]*\})?")
MEMORY_SPACE = re.compile(r"S\((\d+)\)")
COMPUTATION = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*\{\s*$")
COMPUTATION_END = re.compile(r"^\}(, execution_thread=.*)?\s*$")
INSTRUCTION_NAME = re.compile(r"^\s+(ROOT )?%?([^\s=]+) = ")
OPERAND = re.compile(r"%([^\s,(){}]+)")
CALLED = re.compile(
    r"(calls|body|condition|to_apply|true_computation|false_computation|branch_computations|called_computations)="
    r"(\{[^}]*\}|%?[^\s,})]+)"
)
TRIP_COUNT = re.compile(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)')
OP_NAME = re.compile(r'op_name="([^"]*)"')
LOOP_COUNTER = re.compile(r"^[su](8|16|32|64)\[\]")

# Groups of devices in the attributes of a collective.
SOURCE_TARGET_PAIRS = re.compile(r"source_target_pairs=\{(\{.*?\})\}")
GROUP_LISTS = re.compile(r"replica_groups=\{(\{.*?\})\}")
GROUP_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
GROUP_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, ?device_ids=\(([^{]*)\))? ?\{([^}]*)\}")
MESH_IOTA = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?")
MESH_AXIS = re.compile(r"'([^']+)'(?:=(\d+)|:\((\d+)\)(\d+))?")
ASYNC_CHAIN = re.compile(r'channel_id=(\d+).*frontend_attributes=\{[^}]*chain_id="')
SLICE_TRANSFER = re.compile(r'_xla_megascale_transfer_type="([A-Z_]+)"')

# The reports that a compilation dumps.
ALLOCATED_TOTAL = re.compile(r"Memory Space: (\S+) \(color=(\d+)\)\nTotal bytes: (\d+)")
PEAK_HEADER = "(peak):\n"
LIVE_VALUE = re.compile(r"^\s+(\S+?)(\{[\d,]*\}): (\d+) bytes")
ALLOCATION = re.compile(r"^allocation (\d+): size \d+(, color \d+)?")
ALLOCATED_VALUE = re.compile(r"^ value: <\d+ (\S+?)(\{[\d,]*\})? .*\(size=(\d+),offset=(\d+)\): (\S+?\])")
INSTRUCTION_OP_NAME = re.compile(r'^\s+(?:ROOT )?%?(\S+) = .*op_name="([^"]*)"')
ARGUMENT_KEY = re.compile(r"\['([^']+)'\]")
