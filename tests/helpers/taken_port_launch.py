"""The local launcher, which is given a port that is taken before it is given free ones:
`TAKEN_PORT=N python -m helpers.taken_port_launch ARGUMENTS`."""

from __future__ import annotations

import os
import sys

from t5x_like.launching import local

_ports = iter([int(os.environ["TAKEN_PORT"])])
_free_port = local._free_port


def next_port() -> int:
    return next(_ports, None) or _free_port()


if __name__ == "__main__":
    local._free_port = next_port
    sys.exit(local.main())
