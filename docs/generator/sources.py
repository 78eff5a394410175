"""Write the sources of the documentation site to `build/docs`: the pages of `docs/`, its notebooks as pages, and those
that are generated.

Links to files outside of `docs/` lead to the repository if `mkdocs.yml` gives its address as `repo_url`. Without it
such a link becomes its text, followed by the path if the text does not contain it. A link to a file that does not exist
is an error. Links between pages and to headings are checked by the generator of the site.
"""

from __future__ import annotations

import posixpath
import re
import shutil
import sys
from pathlib import Path

import command_reference
import config_reference
import notebooks
import python_reference
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
OUTPUT = REPOSITORY / "build/docs"
GENERATED = {
    "reference/configuration.md": config_reference.page,
    "reference/command-line.md": command_reference.page,
    "reference/python.md": python_reference.page,
}
_LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\((\.\.?/[^)\s#]+)(#[^)\s]*)?\)")


def main() -> int:
    """Write the sources and return the exit code: 1 if a page links to a file that does not exist."""
    repo_url = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text()).get("repo_url")
    shutil.rmtree(OUTPUT, ignore_errors=True)
    shutil.copytree(REPOSITORY / "docs", OUTPUT, ignore=shutil.ignore_patterns("generator"))
    for name, text in notebooks.pages(REPOSITORY / "docs/notebooks").items():
        (OUTPUT / "notebooks" / name).write_text(text)
    problems: list[str] = []
    for path in sorted(OUTPUT.rglob("*.md")):
        page = path.relative_to(OUTPUT).as_posix()
        path.write_text(with_repository_links(path.read_text(), page, repo_url, problems))
    for page, make in GENERATED.items():
        (OUTPUT / page).parent.mkdir(exist_ok=True)
        (OUTPUT / page).write_text(make())
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


def with_repository_links(text: str, page: str, repo_url: str | None, problems: list[str]) -> str:
    """Return a page whose links to files outside of `docs/` lead to the repository.

    Args:
      text: The page.
      page: Its path in `docs/`.
      repo_url: Address of the repository; None: unknown.
      problems: Links to files that do not exist are added.
    """
    folder = posixpath.dirname(f"docs/{page}")

    def replacement(match: re.Match[str]) -> str:
        label, target, anchor = match.groups()
        path = posixpath.normpath(posixpath.join(folder, target))
        if path.startswith("docs/"):
            return match[0]
        if not (REPOSITORY / path).exists():
            problems.append(f"docs/{page}: found a link to {path}, expected a file of the repository")
        if repo_url:
            return f"[{label}]({repo_url.rstrip('/')}/blob/HEAD/{path}{anchor or ''})"
        return label if path.endswith(label.strip("`")) else f"{label} (`{path}`)"

    # Fenced blocks are left as they are.
    parts = re.split(r"(^```.*?^```)", text, flags=re.M | re.S)
    return "".join(part if part.startswith("```") else _LINK.sub(replacement, part) for part in parts)


if __name__ == "__main__":
    sys.exit(main())
