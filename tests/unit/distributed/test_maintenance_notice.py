"""Notices of the metadata server: which values end a run, and which machines ask for them."""

from __future__ import annotations

import queue
from pathlib import Path

import pytest
from helpers.metadata_server import metadata_server

from t5x_like.distributed.maintenance_notice import HOST_VARIABLE, metadata_host, watch_notices


def test_change_to_a_notice_is_reported_once() -> None:
    notices: queue.SimpleQueue[str] = queue.SimpleQueue()
    with metadata_server() as server, watch_notices(server.host, notices.put):
        for name in server.values:
            server.wait_for_requests(name, 1)
        # A live migration does not stop the machine.
        server.set("maintenance-event", "MIGRATE_ON_HOST_MAINTENANCE")
        server.wait_for_requests("maintenance-event", 2)
        server.set("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")
        assert notices.get(timeout=120) == "maintenance-event TERMINATE_ON_HOST_MAINTENANCE"
        server.set("preempted", "TRUE")
        assert notices.get(timeout=120) == "preempted TRUE"
    assert notices.empty()


def test_notice_before_the_start_does_not_end_the_restarted_run() -> None:
    notices: queue.SimpleQueue[str] = queue.SimpleQueue()
    with metadata_server() as server:
        server.set("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")
        with watch_notices(server.host, notices.put):
            server.wait_for_requests("maintenance-event", 1)
            server.set("maintenance-event", "NONE")
            server.wait_for_requests("maintenance-event", 2)
            assert notices.empty()
            server.set("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")
            assert notices.get(timeout=120) == "maintenance-event TERMINATE_ON_HOST_MAINTENANCE"


def test_answers_of_other_servers_are_no_notices() -> None:
    notices: queue.SimpleQueue[str] = queue.SimpleQueue()
    with metadata_server() as server:
        server.flavor = "Other"
        with watch_notices(server.host, notices.put):
            server.wait_for_requests("preempted", 1)
            server.set("preempted", "TRUE")
            with pytest.raises(queue.Empty):
                notices.get(timeout=0.5)
    assert server.requests["preempted"] == 1


def test_only_machines_of_google_ask(tmp_path: Path) -> None:
    product = tmp_path / "product_name"
    assert metadata_host({}, product) is None
    product.write_text("KVM\n")
    assert metadata_host({}, product) is None
    product.write_text("Google Compute Engine\n")
    assert metadata_host({}, product) == "metadata.google.internal"
    assert metadata_host({HOST_VARIABLE: "127.0.0.1:1"}, tmp_path / "missing") == "127.0.0.1:1"
