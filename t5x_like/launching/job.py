"""What is launched, apart from where: the training command, its environment, and when it is started again."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterator, Mapping

from t5x_like.config import ConfigError, Problem
from t5x_like.config.errors import RESTART_CODES

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TOKEN = re.compile(
    r"\bhf_[A-Za-z0-9]{20}|\bAKIA[A-Z0-9]{16}|\bgh[pousr]_[A-Za-z0-9]{30}|-----BEGIN [A-Z ]*PRIVATE KEY"
)
"""What access tokens of Hugging Face, AWS and GitHub, and private keys look like."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A training run that something else is to start.

    Attributes:
      name: Of the run. Where a launcher allows letters, digits and hyphens only, `resource_name` is taken.
      recipe: As `t5x-like train` takes it.
      arguments: Of `train`, behind the recipe: its options and overrides.
      workdir: The run's directory as the processes see it; it must be the same files for all of them.
      env: Variables of every process.
      secrets: Names of variables whose values the launcher's own place for secrets supplies.
      max_restarts: After exits with `restart_codes`.
      restart_codes: Exit codes after which the same command is run again.
      grace_seconds: Between the signal to stop and the kill: what a save may take.
    """

    name: str
    recipe: str
    workdir: str
    arguments: tuple[str, ...] = ()
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    secrets: tuple[str, ...] = ()
    max_restarts: int = 10
    restart_codes: tuple[int, ...] = RESTART_CODES
    grace_seconds: int = 120

    def __post_init__(self) -> None:
        problems = list(_problems(self))
        if problems:
            raise ConfigError(problems)

    @property
    def resource(self) -> str:
        """The name for schedulers and clouds."""
        return resource_name(self.name)

    def train(self, python: str, *options: str) -> tuple[str, ...]:
        """The command of every process.

        Args:
          python: The interpreter there.
          options: Of `train`, from the launcher.
        """
        command = (python, "-m", "t5x_like", "train", self.recipe, "--workdir", self.workdir)
        return (*command, *options, *self.arguments)


def resource_name(name: str, limit: int = 40) -> str:
    """A name that DNS, Kubernetes, Google Cloud and SLURM accept: lower case letters, digits and hyphens.

    A part of the name's digest is added where names that differ in more than case and underscores would meet.
    """
    plain = name.lower().replace("_", "-")
    slug = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")
    if not re.match("[a-z]", slug):
        slug = f"run-{slug}".rstrip("-")
    if slug == plain and len(slug) <= limit:
        return slug
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{slug[: limit - 9].rstrip('-')}-{digest}"


def _problems(job: Job) -> Iterator[Problem]:
    texts = [("recipe", job.recipe), ("workdir", job.workdir)]
    texts += [(f"argument {number}", text) for number, text in enumerate(job.arguments)]
    texts += [(f"variable {name}", value) for name, value in job.env.items()]
    for where, text in texts:
        if "\0" in text:
            yield Problem(where, "a NUL character", "text that a command line can hold")
        if re.search("[\ud800-\udfff]", text):
            yield Problem(where, "bytes that are no UTF-8", "text that a file can hold")
        if _TOKEN.search(text):
            fix = "name a variable by --secret NAME, and let the launcher's own place for secrets supply it"
            yield Problem(where, "what looks like an access token", "none in files and command lines", fix)
    for name in (*job.env, *job.secrets):
        if not _VARIABLE.fullmatch(name):
            yield Problem("environment", repr(name), "a name of letters, digits and underscores")
    for name in sorted(set(job.secrets) & set(job.env)):
        yield Problem("environment", f"{name} twice", "a variable (--env) or a secret (--secret)")
    for code in job.restart_codes:
        if not 1 <= code <= 255:
            yield Problem("restart codes", str(code), "1 to 255")
    if job.max_restarts < 0:
        yield Problem("restarts", str(job.max_restarts), "0 or more")
    if job.grace_seconds < 1:
        yield Problem("grace period", f"{job.grace_seconds} seconds", "1 or more")
