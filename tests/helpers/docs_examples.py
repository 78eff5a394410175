"""Examples of README.md and docs/*.md: their code blocks and commands, and which commands are not executed.

`tests/integration/test_docs_shell.py` executes every command that `reason_not_executed` does not name, with the Python
examples around it; `tests/unit/test_docs.py` checks the others without executing them.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PAGES = {
    str(path.relative_to(REPOSITORY)): path
    for path in sorted([*REPOSITORY.glob("README.md"), *REPOSITORY.glob("docs/*.md")])
}
LANGUAGES = ("bash", "console", "python", "text")
"""Info strings of code blocks: commands; commands after `$ ` with their output; Python; anything else."""

NOT_EXECUTED = {
    # Key: a page and the heading above the command, or the command itself.
    "README.md: Install": "creates an environment and trains for ten minutes; CI does both",
    "README.md: Command line": "a list of forms with placeholders; the pages have an example of each command",
    "docs/index.md: Start": "creates an environment and trains for ten minutes; CI does both",
    "docs/launch.md: Starting a run on many machines": "a form with placeholders",
    "docs/planning.md: Planning": "a form with placeholders",
    "docs/planning.md: From plan to run": "a form with placeholders",
    "docs/evaluation.md: lm-evaluation-harness": "needs the extra harness: tests/integration/test_harness.py",
    "docs/studies.md: Sweeps": "trains nine runs: tests/integration/test_sweep.py",
    "docs/prepare.md: Apache Beam": "needs the extra beam and a cluster: tests/integration/test_prepare_beam.py",
    "docs/migrate-t5x.md: Checkpoints": "needs a T5X checkpoint: tests/unit/interop/test_t5x.py",
    "docs/quoted-numbers.md: Numbers people quote": "prints the page itself: tests/unit/planning/test_account.py",
    "docs/planning-compiled.md: Compiled plans": "needs XLA's compiler for TPUs: tests/aot",
    "docs/planning-compiled.md: Searching the batch size": "needs XLA's compiler for TPUs: tests/aot",
    "docs/planning-compiled.md: Peaks of the shipped recipes": "needs XLA's compiler for TPUs, and an hour",
    "docs/performance.md: The benchmark": "needs the extra hf and an idle machine for a quarter of an hour",
    "docs/checkpoints.md: When a run saves": "trains to the end: tests/integration/test_best_checkpoints.py",
    "docs/checkpoints.md: Early stopping": "trains to the end: tests/integration/test_best_checkpoints.py",
    "docs/checkpoints.md: Run directories in buckets": "needs a bucket: tests/buckets",
    "docs/launch.md: On a TPU pod, with a bucket": "needs a bucket and a cloud: tests/launch, tests/buckets",
    "docs/checkpoints.md: T5X": "needs a T5X checkpoint of 308 MB: tests/unit/interop/test_t5x.py",
    "t5x-like convert --from t5x checkpoint_1000000 OUT --model t5_1_1:small": "needs a T5X checkpoint of 308 MB",
    "t5x-like convert --from hf all-MiniLM-L6-v2 minilm": "needs a download: tests/golden/test_sentence_encoder.py",
    "t5x-like embed minilm --input docstrings.jsonl --output vectors.parquet": "needs the model before it",
    "t5x-like eval runs/smoke --retrieval 220,400": "needs rows of 100 tokens: tests/unit/evaluation/test_retrieval.py",
    "t5x-like prepare ul2:ul2_20b --data.store-dir /shared/stores": "needs the recipe's corpus",
    "docker build --file launch/Containerfile --build-arg EXTRA=tpu --tag REGISTRY/t5x-like:1 .": "needs Docker",
    "docker push REGISTRY/t5x-like:1": "needs Docker and a registry",
    "sbatch ul2/train.sbatch": "needs SLURM: tests/launch/test_slurm.py",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Command:
    """A command of a page, without its comment; `output` is the text below it in a console block."""

    where: str
    section: str
    text: str
    output: str = ""

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)

    @property
    def reason_not_executed(self) -> str | None:
        return NOT_EXECUTED.get(self.text, NOT_EXECUTED.get(self.section))


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced code block; `section` is the page with the heading above it."""

    page: str
    line: int
    section: str
    language: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def file_name(self) -> str | None:
        """Name in a first line `# NAME.py`: the block is a file, which commands of the page use."""
        match = re.match(r"# (\w+\.py)\n", self.text)
        return match.group(1) if match else None

    @property
    def commands(self) -> list[Command]:
        if self.language not in ("bash", "console"):
            return []
        lines = self.text.replace("\\\n", " ").splitlines()
        commands: list[Command] = []
        for line in lines:
            if self.language == "console" and not line.startswith("$ "):
                commands[-1] = dataclasses.replace(commands[-1], output=f"{commands[-1].output}{line}\n")
            elif line.strip():
                text = re.sub(r"\s+", " ", re.split(r"\s+# ", line.removeprefix("$ "))[0]).strip()
                commands.append(Command(self.where, self.section, text))
        return commands


def blocks(page: str) -> list[Block]:
    """Return the fenced code blocks of a page, in order."""
    found: list[Block] = []
    section, language, begin, lines = page, None, 0, PAGES[page].read_text().splitlines()
    for number, line in enumerate(lines, 1):
        if line.startswith("```") and language is None:
            language, begin = line[3:].strip(), number
        elif line.startswith("```"):
            found.append(Block(page, begin, section, language or "", "\n".join(lines[begin : number - 1]) + "\n"))
            language = None
        elif language is None and line.startswith("#"):
            section = f"{page}: {line.lstrip('# ')}"
    return found


def indented_lines(page: str) -> list[str]:
    """Return the lines outside fenced blocks that Markdown shows as code because they are indented."""
    return re.findall(r"^    .*", re.sub(r"^```.*?^```", "", PAGES[page].read_text(), flags=re.M | re.S), flags=re.M)


def commands() -> list[Command]:
    """Return the commands of all pages."""
    return [command for page in PAGES for block in blocks(page) for command in block.commands]
