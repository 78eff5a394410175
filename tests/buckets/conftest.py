"""Servers of the protocols of S3 and Google Cloud Storage: `make test-buckets` installs them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.bucket_proxy import Faults, proxied
from helpers.bucket_servers import Server, serving


@pytest.fixture(scope="session", params=["gs", "s3"])
def direct(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with an empty bucket."""
    packages = os.environ.get("BUCKET_SERVERS")
    if packages is None:
        pytest.skip("the servers are installed by `make test-buckets`")
    with serving(request.param, Path(packages), tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(scope="session")
def proxy(direct: Server) -> Iterator[tuple[Server, Faults]]:
    with proxied(direct) as both:
        yield both


@pytest.fixture
def server(proxy: tuple[Server, Faults]) -> Iterator[Server]:
    """The server behind a proxy, which checks the conditions of writes."""
    yield proxy[0]


@pytest.fixture
def faults(proxy: tuple[Server, Faults]) -> Iterator[Faults]:
    """The faults of `server`, none at first."""
    found = proxy[1]
    found.injected = 0
    yield found
    found.status, found.every, found.is_lost, found.is_cut, found.seconds = 0, 1, False, False, 0.0
