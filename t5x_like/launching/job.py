"""Job: the training command, its environment, and its restart policy, independent of the target."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterator, Mapping

from t5x_like.errors import RESTART_CODES, ConfigError, ConfigProblem

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TOKEN = re.compile(
    r"\bhf_[A-Za-z0-9]{20}|\bAKIA[A-Z0-9]{16}|\bgh[pousr]_[A-Za-z0-9]{30}|-----BEGIN [A-Z ]*PRIVATE KEY"
)
"""Pattern of access tokens of Hugging Face, AWS and GitHub, and of private keys."""
SHARED_MOUNT = "/mnt/runs"
"""Default mount point of a volume that all machines share."""


_GRACE = "--checkpoints.grace-seconds"
"""Option of `train` that gives a run the grace time of its launcher, with which it compares its saves."""


@dataclasses.dataclass(frozen=True)
class Job:
    """Training run to be started on a target.

    Attributes:
      name: Name of the run. `resource` is its form for targets that allow only letters, digits and hyphens.
      recipe: Recipe, as `t5x-like train` takes it.
      workdir: Run directory as the processes see it: a directory that they share, or a URL of an object store.
      arguments: Arguments of `train` after the recipe: options and overrides.
      env: Environment variables of every process.
      secrets: Names of variables whose values come from the target's secret store.
      max_restarts: Maximum number of restarts after exits with `restart_codes`.
      restart_codes: Exit codes after which the same command is run again.
      grace_seconds: Seconds between the signal to stop and the kill, available for a save.
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
        """Name for schedulers and clouds."""
        return resource_name(self.name)

    def train(self, python: str, *options: str) -> tuple[str, ...]:
        """Return the command of every process, which imports nothing from the folder that it starts in (-P).

        Args:
          python: Python interpreter on the target.
          options: Options of `train` that the target adds.
        """
        command = (python, "-P", "-m", "t5x_like", "train", self.recipe, "--workdir", self.workdir)
        grace: tuple[str, ...] = ()
        # The parser of overrides takes underscores for hyphens.
        is_given = any(text.replace("_", "-").startswith(_GRACE) for text in self.arguments)
        if self.grace_seconds != Job.grace_seconds and not is_given:
            grace = (_GRACE, str(self.grace_seconds))
        return (*command, *options, *grace, *self.arguments)


def resource_name(name: str, limit: int = 40) -> str:
    """Return a name that DNS, Kubernetes, Google Cloud and SLURM accept: lower case letters, digits and hyphens.

    Part of the name's digest is appended if names that differ in more than case and underscores would become equal.
    """
    plain = name.lower().replace("_", "-")
    slug = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")
    if not re.match("[a-z]", slug):
        slug = f"run-{slug}".rstrip("-")
    if slug == plain and len(slug) <= limit:
        return slug
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{slug[: limit - 9].rstrip('-')}-{digest}"


def _problems(job: Job) -> Iterator[ConfigProblem]:
    texts = [("recipe", job.recipe), ("workdir", job.workdir)]
    texts += [(f"argument {number}", text) for number, text in enumerate(job.arguments)]
    texts += [(f"variable {name}", value) for name, value in job.env.items()]
    for where, text in texts:
        if "\0" in text:
            yield ConfigProblem(where, "a NUL character", "text without NUL characters")
        if re.search("[\ud800-\udfff]", text):
            yield ConfigProblem(where, "bytes that are not valid UTF-8", "UTF-8 text")
        if _TOKEN.search(text):
            fix = "name a variable with --secret NAME, whose value comes from the target's secret store"
            yield ConfigProblem(where, "a text that looks like an access token", "no token in files and commands", fix)
    for name in (*job.env, *job.secrets):
        if not _VARIABLE.fullmatch(name):
            yield ConfigProblem("environment", repr(name), "a name of letters, digits and underscores")
    for name in sorted(set(job.secrets) & set(job.env)):
        yield ConfigProblem("environment", f"{name} twice", "either a variable (--env) or a secret (--secret)")
    for code in job.restart_codes:
        if not 1 <= code <= 255:
            yield ConfigProblem("restart codes", str(code), "1 to 255")
    if job.max_restarts < 0:
        yield ConfigProblem("restarts", str(job.max_restarts), "0 or more")
    if job.grace_seconds < 1:
        yield ConfigProblem("grace period", f"{job.grace_seconds} seconds", "1 or more")
