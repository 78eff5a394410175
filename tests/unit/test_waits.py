"""Every wait in the package has a limit: calls that can block are found in the source, and those without a timeout are
listed here with what limits them. docs/operating.md has the same numbers."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from t5x_like import errors
from t5x_like.cli.main import parse
from t5x_like.config import TimeoutsConfig

ROOT = Path(errors.__file__).parent
OPERATING = ROOT.parent / "docs" / "operating.md"

ALWAYS = 99
# Name of a call that can block -> number of positional arguments with which it has a timeout.
BLOCKING = {
    **{name: 1 for name in ("result", "exception", "wait", "join", "get", "acquire")},
    **{name: 2 for name in ("wait_for", "create_connection")},
    **{name: ALWAYS for name in ("communicate", "accept", "recv", "urlopen", "HTTPConnection", "HTTPSConnection")},
    **{name: ALWAYS for name in ("ThreadPoolExecutor", "ProcessPoolExecutor", "shutdown", "as_completed")},
    **{name: ALWAYS for name in ("flock", "lockf", "subprocess.run", "subprocess.call")},
    **{name: ALWAYS for name in ("subprocess.check_call", "subprocess.check_output", "subprocess.getoutput")},
}

NO_WAIT = "it returns at once"
SAVE = "`error_of_save` waits for the only work of the thread, with a limit"
FILES = "reads of files: the stage of a run, or --stall-timeout"
RUN = "the processes of the run, which have limits of their own; one that cannot be killed is given up"
# Module -> call -> what limits it.
ALLOWED = {
    "checkpoints/bucket.py": {"ThreadPoolExecutor(1, thread_name_prefix='checkpoint')": SAVE, "self.wait()": SAVE},
    "checkpoints/manager.py": {"ThreadPoolExecutor(1, thread_name_prefix='checkpoint')": SAVE, "self.wait()": SAVE},
    "checkpoints/checksums.py": {"ThreadPoolExecutor(_THREADS)": FILES},
    "data/sources/python_docs.py": {"concurrent.futures.ThreadPoolExecutor(workers)": "READ_SECONDS of each process"},
    "data/store/store_paths.py": {"concurrent.futures.ThreadPoolExecutor(_DIGEST_THREADS)": FILES},
    "distributed/rendezvous.py": {
        "connection.recv(1, socket.MSG_PEEK)": "the connection does not block",
        "listener.accept()": "the listener has a timeout",
    },
    "distributed/startup.py": {"jax.distributed.shutdown()": "jax's own limit, and timeouts.start"},
    "kernels/expert_dispatch.py": {"x.at[order].get(unique_indices=True, mode='promise_in_bounds')": NO_WAIT},
    "launching/local.py": {"group.wait()": RUN, "process.wait()": RUN},
    "serving/app.py": {
        "completion.chunks.get()": "--timeout of the request",
        "merged.get()": "--timeout of the request",
    },
    "sharding/constrain.py": {"_ACTIVE.get()": NO_WAIT, "_RECORD.get()": NO_WAIT},
    "storage/mirror.py": {"ThreadPoolExecutor(THREADS)": "REQUEST_SECONDS of each request"},
    "storage/transfers.py": {"ThreadPoolExecutor(THREADS)": "REQUEST_SECONDS of each request"},
    "trainer/profiling.py": {"wait()": "the device, within the stage of a step"},
    "trainer/session.py": {"self.checkpoints.wait()": SAVE},
}


def unbounded(source: str) -> Iterator[str]:
    """Yield the calls in a source file that can block and have no timeout."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            function, text = ast.unparse(node.func), ast.unparse(node)
            name = function if function.startswith("subprocess.") else function.rpartition(".")[2]
            has_limit = any(keyword.arg in ("timeout", "wait") for keyword in node.keywords) or "LOCK_NB" in text
            if len(node.args) < BLOCKING.get(name, 0) and not has_limit:
                yield text


def test_every_call_that_can_block_has_a_limit() -> None:
    found: dict[str, set[str]] = {}
    for path in sorted(ROOT.rglob("*.py")):
        if calls := set(unbounded(path.read_text())):
            found[path.relative_to(ROOT).as_posix()] = calls
    assert found == {module: set(calls) for module, calls in ALLOWED.items()}


@pytest.mark.parametrize(
    "call",
    [
        "future.result()",
        "thread.join()",
        "messages.get()",
        "process.communicate(text)",
        "subprocess.run(argv, check=True)",
        "condition.wait_for(ready)",
        "fcntl.flock(file, fcntl.LOCK_EX)",
        "socket.create_connection(address)",
        "executor.shutdown()",
    ],
)
def test_an_unbounded_call_is_found(call: str) -> None:
    assert list(unbounded(call)) == [call]


@pytest.mark.parametrize(
    "call",
    ["future.result(timeout=3)", "thread.join(3.0)", "', '.join(words)", "event.wait(5)", "table.get(key)"],
)
def test_a_bounded_call_is_not_found(call: str) -> None:
    assert not list(unbounded(call))


def test_a_command_that_waits_for_runs_has_no_limit_of_its_own() -> None:
    """A run may train for days without a word to the process that started it."""
    for words in (
        ["train", "smoke"],
        ["sweep", "smoke"],
        ["study", "exposure"],
        ["launch", "local", "smoke", "-n", "2"],
    ):
        assert "stall_timeout" not in parse(words)[0]
    assert "stall_timeout" in parse(["prepare", "smoke"])[0]


def test_limits_of_the_documentation_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| [^|]+ \| ([\d.]+) (s|min|h) \| ([^|]+) \|$", OPERATING.read_text(), re.MULTILINE)
    checked = 0
    for number, unit, where in rows:
        seconds = float(number) * {"s": 1, "min": 60, "h": 3600}[unit]
        for field in re.findall(r"`timeouts\.(\w+)`", where):
            assert getattr(TimeoutsConfig(), field) == seconds, where
            checked += 1
        for name, path in re.findall(r"`([A-Z_]+)` in `([\w/]+)\.py`", where):
            module = importlib.import_module(f"t5x_like.{path.replace('/', '.')}")
            assert getattr(module, name) == seconds, where
            checked += 1
    assert checked >= 20
