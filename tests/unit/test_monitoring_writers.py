import math
import subprocess
import sys

import pytest

from t5x_like.monitoring.records import read_records
from t5x_like.monitoring.writers import JsonlWriter, TensorBoardWriter, Writers

READ_EVENTS = """
import sys
from tensorboardX.proto.event_pb2 import Event
import glob, struct
for path in sorted(glob.glob(sys.argv[1] + "/events*")):
    data = open(path, "rb").read()
    while data:
        (length,) = struct.unpack("Q", data[:8])
        event = Event.FromString(data[12 : 12 + length])
        for value in event.summary.value:
            print(event.step, value.tag, value.simple_value)
        data = data[16 + length :]
"""


def test_tensorboard_events_without_tensorflow(tmp_path):
    program = (
        "import sys; from pathlib import Path\n"
        "from t5x_like.monitoring.writers import TensorBoardWriter\n"
        "writer = TensorBoardWriter(Path(sys.argv[1]), restored_step=None)\n"
        "writer.write(7, {'loss/R_3_0.15': 1.5, 'gradient_norm': float('nan')})\n"
        "writer.close()\n"
        "roots = {name.split('.')[0] for name in sys.modules}\n"
        "print(sorted(roots & {'tensorflow', 'tensorboard', 'jax'}))\n"
    )
    result = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
    events = subprocess.run([sys.executable, "-c", READ_EVENTS, str(tmp_path)], capture_output=True, text=True)
    assert events.stdout.splitlines() == ["7 loss/R_3_0.15 1.5", "7 gradient_norm nan"]


def test_tensorboard_hides_what_a_resumed_run_writes_again(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    writer = TensorBoardWriter(tmp_path, restored_step=None)
    for step in range(1, 7):
        writer.write(step, {"loss": float(step)})
    writer.close()
    first = next(tmp_path.iterdir())
    first.rename(first.with_name(first.name.replace("tfevents.", "tfevents.0")))  # an earlier second
    writer = TensorBoardWriter(tmp_path, restored_step=4)
    for step in range(5, 8):
        writer.write(step, {"loss": float(10 * step)})
    writer.close()
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (4, 4.0),
        (5, 50.0),
        (6, 60.0),
        (7, 70.0),
    ]


class Failing:
    def __init__(self):
        self.calls = 0

    def write(self, step, values):
        self.calls += 1
        raise OSError("no space left on device")

    def close(self):
        raise AssertionError("dropped writers are left alone")


def test_failing_writer_is_dropped_with_one_warning(tmp_path, caplog):
    failing = Failing()
    writers = Writers(JsonlWriter(tmp_path / "metrics.jsonl", restored_step=None), [failing])
    for step in (1, 2, 3):
        writers.write(step, {"loss": 1.0})
    writers.close()
    assert failing.calls == 1
    assert len(caplog.records) == 1 and "no space left on device" in caplog.text
    assert len(read_records(tmp_path / "metrics.jsonl")[0]) == 3


def test_failing_record_ends_the_run():
    class Healthy(Failing):
        def write(self, step, values):
            raise AssertionError("nothing is written beside a missing record")

    with pytest.raises(OSError, match="no space"):
        Writers(Failing(), [Healthy()]).write(1, {"loss": math.pi})
