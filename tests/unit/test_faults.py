"""Messages of faults as the libraries word them, and the exit code that follows from each."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import jax
import pytest

from t5x_like.data.store import token_arrays
from t5x_like.distributed.startup import translate_error
from t5x_like.errors import (
    EXIT_CODES,
    EXIT_REFUSED,
    EXIT_RESUMABLE,
    EXIT_UNEXPECTED,
    EXIT_USAGE,
    DataError,
    UserError,
    exit_code_of,
)
from t5x_like.faults import FAULTS, STORAGE_FAILED, Fault, FaultError, fault_of, write_error

DOCUMENT = Path(__file__).parents[2] / "docs" / "operating.md"
LAUNCH = DOCUMENT.with_name("launch.md")

MESSAGES = {
    # XLA on GPUs
    "INTERNAL: CUDA error: CUDA_ERROR_ECC_UNCORRECTABLE: uncorrectable ECC error encountered": 42,
    "INTERNAL: CUDA_ERROR_NVLINK_UNCORRECTABLE: uncorrectable NVLink error detected during the execution": 42,
    "INTERNAL: failed call to cuDevicePrimaryCtxRetain: CUDA_ERROR_HARDWARE_STACK_ERROR: hardware stack error": 42,
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes.": 1,
    "INTERNAL: CUDA error: CUDA_ERROR_OUT_OF_MEMORY: out of memory": 1,
    "INTERNAL: CUDA error: CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered": 1,
    "INVALID_ARGUMENT: Executable expected parameter 0 of size 8 but got buffer with incompatible size 4": 1,
    "UNIMPLEMENTED: unsupported operation f8e4m3 dot": 1,
    "INTERNAL: during the pass optimization-barrier-expander\nRET_CHECK failure: error in the layout": 1,
    # XLA on TPUs
    "INTERNAL: Core halted unexpectedly: INTERNAL: Accelerator device halted prematurely, perhaps due to an on-device "
    "check-failure. Node 0 halted unexpectedly at tag:pc TensorCoreSequencer:887:0x6f1": 42,
    "INTERNAL: ICI link between chip 3 and chip 7 is down": 42,
    "UNAVAILABLE: TPU initialization failed: slice health check failed: worker 5 did not respond": 42,
    "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.1G of 15.7G": 1,
    # NCCL
    "INTERNAL: NCCL operation ncclGroupEnd() failed: remote process exited or there was a network "
    "error. Last NCCL warning(error) log entry: 'socketProgressOpt: Call to recv from 10.0.0.2<33759> failed'": 42,
    "INTERNAL: xla/service/gpu/nccl_utils.cc:305: NCCL operation ncclCommInitRank(&comm, nranks, id, rank) failed: "
    " unhandled system error (run with NCCL_DEBUG=INFO for details).": 42,
    # gRPC, gloo and the coordination service
    "UNAVAILABLE: Socket closed\nAdditional GRPC error information from remote target coordination_service": 42,
    "DEADLINE_EXCEEDED: Barrier timed out. Id: t5x_like/barrier/3. This usually happens because a task triggered the "
    "barrier too early or too slowly.": 42,
    "INTERNAL: Task /job:jax_worker/replica:0/task:1 heartbeat timeout. This indicates that the remote task has "
    "failed, got preempted, or crashed unexpectedly.": 42,
    "UNKNOWN: Gloo AllReduce failed: [gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3453": 42,
    # TensorStore
    "UNAVAILABLE: Error reading \"gs://bucket/stores/c/0\": HTTP response code: 503": 42,
    "INTERNAL: Error reading \"gs://bucket/stores/c/0\": We encountered an internal error. Please try again. [source "
    "locations='tensorstore/kvstore/gcs_grpc/gcs_grpc.cc:503\\ntensorstore/internal/cache/kvs_backed_cache.h:208']": 42,
    "Error reading local file \"/mnt/stores/c/0\": [OS error 5: EIO Input/output error]": 42,
    "Error opening local file \"/mnt/stores/c/0\": [OS error 116: ESTALE Stale file handle]": 42,
    "PERMISSION_DENIED: Error reading \"gs://bucket/stores/zarr.json\": HTTP response code: 403": 2,
    "UNAUTHENTICATED: Error refreshing the access token: invalid_grant": 2,
    "Error writing local file \"/mnt/run/0\": [OS error 28: ENOSPC No space left on device]": 3,
    "RESOURCE_EXHAUSTED: [OS error 122: EDQUOT Disk quota exceeded] [tensorstore/internal/os/file_util_posix.cc]": 3,
}  # fmt: skip


def test_request_of_a_storage_that_cannot_be_reached_is_no_lost_process() -> None:
    message = "ABORTED: All 6 retry attempts failed: CURL error Could not resolve hostname: Could not resolve host"
    assert fault_of(message) is STORAGE_FAILED


@pytest.mark.parametrize("message", MESSAGES)
def test_message_of_a_library_decides_the_exit_code(message: str) -> None:
    error = translate_error(jax.errors.JaxRuntimeError(message))
    assert exit_code_of(error) == MESSAGES[message]
    assert isinstance(error, FaultError) == (MESSAGES[message] != EXIT_UNEXPECTED)
    if MESSAGES[message] == EXIT_RESUMABLE:
        assert "The same command resumes" in str(error) and message.splitlines()[0][:200] in str(error)


def test_errors_of_programs_are_not_faults() -> None:
    """A ValueError that mentions a timeout is no fault, and a closed pipe keeps its own code."""
    for error in (ValueError("the request timed out"), BrokenPipeError(errno.EPIPE, "Broken pipe"), KeyError("x")):
        assert translate_error(error) is error
    assert exit_code_of(translate_error(OSError(errno.ESTALE, "Stale file handle"))) == EXIT_RESUMABLE
    assert exit_code_of(translate_error(OSError(errno.ENOSPC, "No space left on device"))) == EXIT_REFUSED
    missing = FileNotFoundError(errno.ENOENT, "No such file")
    assert translate_error(missing) is missing


def test_failed_read_of_a_store_is_not_a_damaged_store() -> None:
    def code(message: str) -> int:
        class Read:
            def result(self, timeout: float) -> None:
                raise ValueError(message)

        with pytest.raises(UserError) as caught:
            token_arrays.result_of(Read(), Path("stores/s"))
        assert ("restore the store" in str(caught.value)) == isinstance(caught.value, DataError)
        return caught.value.exit_code

    assert code("UNAVAILABLE: Error reading chunk: HTTP response code: 503") == EXIT_RESUMABLE
    assert code("PERMISSION_DENIED: Error reading chunk: HTTP response code: 403") == EXIT_USAGE
    assert code("DATA_LOSS: Digest mismatch, stored 1, computed 2") == EXIT_USAGE


def test_failed_write_has_the_code_of_its_fault() -> None:
    def code(number: int) -> int:
        try:
            try:
                raise OSError(number, os.strerror(number))
            except OSError as error:
                raise ValueError("a library's error") from error
        except ValueError as error:
            return write_error("not written", error).exit_code

    assert code(errno.EIO) == code(errno.ESTALE) == EXIT_RESUMABLE
    assert code(errno.ENOSPC) == code(errno.EDQUOT) == EXIT_REFUSED
    assert code(errno.EACCES) == EXIT_USAGE
    assert code(errno.EROFS) == code(errno.EFBIG) == EXIT_REFUSED


def test_documentation_lists_the_faults_and_exit_codes() -> None:
    text = DOCUMENT.read_text()
    meanings = {entry.code: entry for entry in EXIT_CODES}
    for fault in FAULTS:
        restart = "yes" if meanings[fault.exit_code].restart else "no"
        assert re.search(rf"^\| {re.escape(fault.name)} \|.*\| {fault.exit_code} \| {restart} \|$", text, re.MULTILINE)


def test_documentation_of_launchers_has_the_table_of_exit_codes() -> None:
    documented = {}
    for codes, restart in re.findall(r"^\| ([\d, ]+) \| [^|]+ \| (yes|no)? *\|$", LAUNCH.read_text(), re.MULTILINE):
        documented |= {int(code): restart == "yes" for code in codes.split(",")}
    assert documented == {entry.code: entry.restart for entry in EXIT_CODES}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_every_entry_is_reached(fault: Fault) -> None:
    assert fault in [fault_of(message) for message in (*MESSAGES, "the machine is preempted")]
