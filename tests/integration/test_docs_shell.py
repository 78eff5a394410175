"""Every command and Python example of README.md and docs/ is executed as written, on small runs of the shipped recipes.

A page is one test: in a copy of a prepared folder, its Python files are written, its other Python blocks are
executed, and its commands are run, in the order of the page. `helpers/docs_examples.py` names the commands that are not
executed, with the reason; `docs/python.md` is executed by `test_docs_python.py`.
"""

from __future__ import annotations

import csv
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from helpers.docs_examples import PAGES, REPOSITORY, Block, Command, blocks
from jax.experimental.compilation_cache import compilation_cache

import t5x_like.config
from t5x_like.cli.main import main
from t5x_like.config import initialization
from t5x_like.errors import EXIT_TERMINATED
from t5x_like.model_loading import open_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

EXECUTED = [
    page for page in PAGES if page != "docs/python.md" and any(block.language != "text" for block in blocks(page))
]

SMALL_RECIPES = f'''
"""The shipped recipe with small models: `configs/runs` of the current folder comes before the shipped one."""
import dataclasses
import importlib.util

from t5x_like.config import CorpusConfig, ul2
from t5x_like.models import presets

LEFT_OUT = [objective.name for objective in ul2() if objective.name not in ("R_3_0.15", "S")]
spec = importlib.util.spec_from_file_location("shipped_smoke", {str(REPOSITORY / "configs/runs/smoke.py")!r})
shipped = importlib.util.module_from_spec(spec)
spec.loader.exec_module(shipped)


def small(run, **fields):
    sizes = dict(num_layers=1, d_model=32, num_heads=4, num_kv_heads=4, head_dim=8, d_ff=64)
    stacks = {{
        name: stack and dataclasses.replace(stack, **sizes)
        for name in ("encoder", "decoder", "generator")
        for stack in [getattr(run.model, name)]
    }}
    data = dataclasses.replace(
        run.data,
        corpus=CorpusConfig(packages=False, max_documents=150, validation_fraction=0.2),
        tokenizer=dataclasses.replace(run.data.tokenizer, vocab_size=512),
        mixture=tuple(objective for objective in run.data.mixture if objective.name not in LEFT_OUT),
        inputs_length=40,
        targets_length=min(40, run.data.targets_length),
    )
    return dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, **stacks, vocab_size=640, **fields),
        data=data,
        training=dataclasses.replace(run.training, num_train_steps=4),
        checkpoints=dataclasses.replace(run.checkpoints, save_every_steps=2),
        evaluation=dataclasses.replace(run.evaluation, every_steps=4, num_batches=1),
        monitoring=dataclasses.replace(run.monitoring, num_decoded_samples=0),
    )


def recipe():
    return small(shipped.recipe())


def prefix_lm():
    return small(shipped.prefix_lm())


def decoder():
    return small(shipped.decoder())


def encoder():
    return small(shipped.encoder())


def llama():
    """A decoder that a published family describes."""
    run = dataclasses.replace(shipped.decoder(), name="base")
    llama_3 = presets.llama_3()
    decoder = dataclasses.replace(llama_3.decoder, rope_scaling=None)
    return small(dataclasses.replace(run, model=dataclasses.replace(llama_3, decoder=decoder)))
'''

TASKS = '''
"""Tasks named as in the documentation, over the vocabulary of the small runs."""
import glob

import seqio
import tensorflow as tf

from t5x_like.evaluation.text_metrics import squad

VOCABULARY = seqio.SentencePieceVocabulary(glob.glob("runs/stores/python_docs-*/tokenizer.model")[0], extra_ids=64)


def examples(split, shuffle_files, seed=None):
    texts = {"inputs": ["a list of", "the result"], "targets": ["a string", "a list"]}
    return tf.data.Dataset.from_tensor_slices(texts)


for name in ("squad_v010", "glue_cola", "glue_mrpc"):
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(examples, splits=["validation", "test"]),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features={feature: seqio.Feature(VOCABULARY) for feature in ("inputs", "targets")},
        metric_fns=[squad],
    )
seqio.MixtureRegistry.add("glue", ["glue_cola", "glue_mrpc"], default_rate=1.0)
'''

SHORT_BASE = "t5x-like train smoke:llama --workdir runs/base --training.num-train-steps 2"
EXPORTED_BASE = "t5x-like convert --to hf runs/base DIR --family llama"
BEFORE = {
    # Page -> commands that make what the page takes for granted.
    "docs/adapters.md": [SHORT_BASE],
    "docs/models.md": [SHORT_BASE, EXPORTED_BASE],
    "docs/migrate-huggingface.md": [SHORT_BASE, EXPORTED_BASE],
    "docs/checkpoints.md": [
        SHORT_BASE,
        EXPORTED_BASE,
        "t5x-like train smoke:decoder --workdir runs/decoder --training.num-train-steps 2",
    ],
    "docs/decoding.md": ["t5x-like train smoke:encoder --workdir runs/encoder --training.num-train-steps 2"],
    "docs/evaluation.md": [
        SHORT_BASE,
        EXPORTED_BASE,
        "t5x-like train smoke:prefix_lm --training.num-train-steps 2",
        "cp -r runs/smoke runs/mine",
        """echo '{"answers": ["a cat"], "output": "the cat"}' >answers.jsonl""",
        """echo '{"good": "a cat", "bad": "a cats"}' >pairs.jsonl""",
    ],
}
REPLACEMENTS = {
    # Page -> text of its examples -> text that is executed, with fewer steps.
    "README.md": {
        "--workdir runs/mine": "--workdir runs/mine --training.num-train-steps 2 --evaluation.num-batches 1 "
        "--data.inputs-length 40 --data.targets-length 16",
        "serve runs/mine": "serve runs/mine --port 8000 --prompt-length 30 --max-new-tokens 4",
        "export runs/mine exported": "export runs/mine exported --prompt-length 30 --max-new-tokens 4",
    },
    "docs/adapters.md": {"steps=200": "steps=2"},
    "docs/migrate-huggingface.md": {"steps 2000": "steps 2"},
    "docs/finetune.md": {
        "steps 300": "steps 2 --evaluation.num-batches 1 --monitoring.num-decoded-samples 0 --data.inputs-length 40",
        "steps 100": "steps 2 --evaluation.num-batches 1 --monitoring.num-decoded-samples 0",
        "rows[:400]": "rows[:40]",
        "rows[200:]": "rows[200:260]",
    },
    # A decoder compiles faster than an encoder-decoder. The two commands are alternatives: each gets a run.
    "docs/processes.md": {"local smoke ": "local smoke:decoder ", "steps 20": "steps 2"},
    "docs/sharding.md": {"train smoke ": "train smoke:decoder ", "auto True": "auto True --workdir runs/auto"},
    "docs/seqio.md": {"num_train_steps=20": "num_train_steps=2"},
    "docs/evaluation.md": {"smoke:500": "smoke:2", "1500": "4"},
    "docs/studies.md": {
        'Budget("steps", 60)': 'Budget("steps", 4)',
        "every_steps=20": "every_steps=2",
        "seeds=(0, 1, 2)": "seeds=(0,)",
        "--seeds 0 1 2 3": "--seeds 0 1",
    },
    "docs/encoders.md": {
        "num_train_steps=150": "num_train_steps=4",
        "warmup_steps=20": "warmup_steps=2",
        "steps 200": "steps 4",
    },
}


class Session:
    """The examples of one page, executed in the current folder.

    Attributes:
      names: Of the Python blocks that are not files.
      servers: Processes of commands that serve until they are stopped.
    """

    def __init__(self, page: str, names: dict[str, Any]) -> None:
        self.page, self.names = page, names
        self.port = _free_port()
        self.servers: list[subprocess.Popen[bytes]] = []

    def write_files(self) -> None:
        for block in blocks(self.page):
            if block.language == "python" and block.file_name:
                Path(block.file_name).write_text(self.shorter(block.text))

    def execute(self, block: Block) -> None:
        text = self.shorter(block.text)
        if block.language == "python" and block.file_name is None:
            exec(compile(text, block.where, "exec"), self.names)
        for command in block.commands:
            if command.reason_not_executed is None:
                self.run(command)

    def shorter(self, text: str) -> str:
        for old, new in REPLACEMENTS.get(self.page, {}).items():
            text = text.replace(old, new)
        return text

    def run(self, command: Command) -> None:
        """Run a command: this package's own and Python files in this process, a server in the background, others in a
        shell. Starting Python, jax and TensorFlow for each command would cost as much as the commands."""
        text = self.shorter(command.text)
        if self.page in ("docs/serving.md", "README.md"):
            text = text.replace("8000", str(self.port))
        if text.startswith("t5x-like serve"):
            self.servers.append(subprocess.Popen(["bash", "-c", f"exec {text}"]))
            _wait_for(f"http://127.0.0.1:{self.port}/health", self.servers[-1])
            return
        words = Command(command.where, command.section, text).words
        is_own = words[0] == "t5x-like" and not set(words) & {"|", ">", "--execute"}
        if words[0] == "python":
            with pytest.MonkeyPatch.context() as patch:
                patch.syspath_prepend(".")
                patch.setattr(sys, "argv", words[1:])
                runpy.run_path(words[1], run_name="__main__")
            return
        code = _call(words[1:]) if is_own else subprocess.run(["bash", "-c", text], timeout=300).returncode
        refusal = command.output.startswith("t5x-like: ")
        assert (code != 0) == refusal, f"{command.where}: exit code {code} of {text}"


def _call(arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as error:
        return int(error.code or 0)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        try:
            urllib.request.urlopen(url).close()
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"the server ended with {process.returncode}")


def _share_compilations(folder: str | None, min_seconds: float) -> None:
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", min_seconds)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with small recipes, texts, prompts, Tasks, and the trained and evaluated run `runs/smoke`."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("configs/runs", "texts", "my", "bin"):
        (folder / name).mkdir(parents=True)
    (folder / "configs/runs/smoke.py").write_text(SMALL_RECIPES)
    (folder / "my/tasks.py").write_text(TASKS)
    script = folder / "bin/t5x-like"
    script.write_text(f"#!{sys.executable}\nimport sys\nfrom t5x_like.cli.main import main\nsys.exit(main())\n")
    script.chmod(0o755)
    sources = sorted((REPOSITORY / "t5x_like/config").glob("*.py"))
    (folder / "texts/sources.jsonl").write_text(
        "".join(json.dumps({"content": path.read_text()}) + "\n" for path in sources)
    )
    for number, name in enumerate(("train", "dev", "test")):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["text"], *([path.read_text()] for path in sources[number::3])])
    (folder / "data").mkdir()
    for number, name in enumerate(("train", "dev", "test")):
        rows = [f"{path.stem}\t{path.read_text().split()[0]}" for path in sources[number::3]]
        (folder / f"data/{name}.tsv").write_text("\n".join(["inputs\ttargets", *rows]) + "\n")
    prompts = ["The function returns a", "Return the"]
    (folder / "prompts.txt").write_text("\n".join(prompts) + "\n")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    # Many commands compile the same programs.
    previous = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    _share_compilations(str(folder / "compilations"), 0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["prepare", "smoke"]) == 0
        assert main(["train", "smoke"]) == 0
        assert main(["eval", "runs/smoke:2"]) == 0
    # The folder set for jax itself takes precedence over the cache of the run directory.
    assert any((folder / "compilations").iterdir())
    assert not (folder / "runs/smoke/compilation_cache").exists()
    yield folder
    _share_compilations(*previous)


@pytest.fixture
def folder(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the prepared folder as the current one; what its files register is forgotten afterwards."""
    copy = tmp_path / "docs"
    shutil.copytree(prepared, copy, ignore=shutil.ignore_patterns("compilations"))
    monkeypatch.chdir(copy)
    monkeypatch.setenv("PATH", f"{copy / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    # As in the console script, the current folder is not on the import path.
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(copy))])
    before = set(sys.modules)
    yield copy
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None)
        if file and Path(file).is_relative_to(copy):
            del sys.modules[name]


@pytest.mark.parametrize("page", EXECUTED)
def test_examples_of_the_page_can_be_executed(page: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    names = vars(t5x_like.config) | vars(initialization)
    session = Session(page, names)
    for number, text in enumerate(BEFORE.get(page, ())):
        session.run(Command(f"{page}, before, {number}", page, text))
    if page == "docs/decoding.md":
        model = open_model(Path("runs/smoke"))
        names |= {"program": model.program, "params": model.params()[1], "inputs": [5, 1], "targets": [6, 1]}
    try:
        session.write_files()
        for block in blocks(page):
            session.execute(block)
            refusals = [command for command in block.commands if command.output.startswith("t5x-like: ")]
            printed = capfd.readouterr().err
            for command in refusals:
                if command.reason_not_executed is None:
                    assert command.output.splitlines()[0] in printed
        if page == "docs/processes.md":
            # Its processes have no such folder, and use the cache of the run directory.
            assert any(Path("runs/smoke_decoder/compilation_cache").rglob("*-cache"))
    finally:
        for server in session.servers:
            server.terminate()
            assert server.wait(60) in (EXIT_TERMINATED, -signal.SIGTERM)
