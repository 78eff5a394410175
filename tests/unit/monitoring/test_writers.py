import math
import struct
import subprocess
import sys

import pytest

from t5x_like.monitoring.writers import WRITERS, JsonlWriter, NoWriter, TensorBoardWriter, Writers
from t5x_like.utils.jsonl import read_records


def test_tensorboard_events_without_tensorflow(tmp_path):
    program = (
        "import sys; from pathlib import Path\n"
        "from t5x_like.monitoring.writers import TensorBoardWriter\n"
        "writer = TensorBoardWriter(Path(sys.argv[1]), restored_step=None)\n"
        "writer.write(7, {'loss/R_3_0.15': 1.5, 'grad_norm': float('nan')})\n"
        "writer.close()\n"
        "roots = {name.split('.')[0] for name in sys.modules}\n"
        "print(sorted(roots & {'tensorflow', 'tensorboard', 'jax'}))\n"
    )
    result = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
    values = [(event.step, value) for event in events(tmp_path) for value in event.summary.value]
    assert [(step, value.tag) for step, value in values] == [(7, "loss/R_3_0.15"), (7, "grad_norm")]
    assert values[0][1].simple_value == 1.5 and math.isnan(values[1][1].simple_value)


def events(directory):
    from tensorboardX.proto.event_pb2 import Event

    records = []
    for path in sorted(directory.iterdir()):
        data = path.read_bytes()
        while data:  # TFRecord: length, its checksum, payload, its checksum
            (length,) = struct.unpack("Q", data[:8])
            records.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return records


def test_tensorboard_hides_what_a_resumed_run_writes_again(tmp_path):
    """A start mark with a step makes TensorBoard drop the events from that step on."""
    writer = TensorBoardWriter(tmp_path, restored_step=4)
    writer.write(5, {"loss": 50.0})
    writer.close()
    version, start, loss = events(tmp_path)
    assert version.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (5, start.session_log.START)
    assert (loss.step, loss.summary.value[0].tag, loss.summary.value[0].simple_value) == (5, "loss", 50.0)
    assert loss.wall_time >= start.wall_time > 1e9


def test_two_processes_in_one_second_write_two_event_files(tmp_path, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 1_700_000_000.0)
    for process in (11, 12):
        monkeypatch.setattr("os.getpid", lambda process=process: process)
        TensorBoardWriter(tmp_path, restored_step=None).close()
    assert len(list(tmp_path.iterdir())) == 2


class Flaky:
    """Writer that cannot be opened, or not written, while `broken`."""

    def __init__(self, breaks):
        self.breaks, self.broken, self.steps, self.attempts = breaks, True, [], 0

    def open(self, run_dir, restored_step):
        self.restored_step = restored_step
        self._require("open")
        return self

    def write(self, step, values):
        self._require("write")
        self.steps.append(step)

    def close(self):
        self._require("close")

    def _require(self, what):
        self.attempts += what == self.breaks
        if self.broken and what == self.breaks:
            raise OSError("no space left on device")


def of_run(tmp_path, monkeypatch, writer):
    monkeypatch.setitem(WRITERS._entries, "flaky", writer.open)
    record = JsonlWriter(tmp_path / "metrics.jsonl", restored_step=None)
    return Writers.of_run(["flaky"], tmp_path, None, record=record, display=NoWriter())


@pytest.mark.parametrize("breaks", ["open", "write"])
def test_failing_writer_is_tried_again_with_one_warning(tmp_path, caplog, monkeypatch, breaks):
    """It is opened again at increasing intervals, and continues after its last step."""
    flaky = Flaky(breaks)
    writers = of_run(tmp_path, monkeypatch, flaky)
    for step in range(1, 101):
        flaky.broken = step <= 50
        writers.write(step, {"loss": 1.0})
    writers.close()
    assert len(caplog.records) == 1 and "flaky failed (OSError: no space left on device)" in caplog.text
    assert flaky.steps == list(range(flaky.steps[0], 101)) and 50 < flaky.steps[0] <= 72
    assert flaky.attempts - (len(flaky.steps) if breaks == "write" else 1) <= 7
    assert len(read_records(tmp_path / "metrics.jsonl").records) == 100


def test_writer_that_cannot_be_closed_is_reported(tmp_path, caplog, monkeypatch):
    writers = of_run(tmp_path, monkeypatch, Flaky("close"))
    writers.write(1, {"loss": 1.0})
    writers.close()
    assert len(caplog.records) == 1 and "flaky failed" in caplog.text


def test_failing_record_ends_the_run(tmp_path):
    class Failing(NoWriter):
        def write(self, step, values):
            raise OSError("no space left on device")

    class Healthy(NoWriter):
        def write(self, step, values):
            raise AssertionError("nothing is written beside a missing record")

    with pytest.raises(OSError, match="no space"):
        Writers(Failing(), [Healthy()]).write(1, {"loss": math.pi})
