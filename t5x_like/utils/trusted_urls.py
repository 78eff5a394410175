"""URLs that requests are sent to only after a word of the user.

A configuration in JSON may come from others: reading it, or looking at its data, must not send requests to a place that
its author has chosen. The user names the URL on the command line (as the value of a field, or by --trust), or in a
Python recipe, which is the user's own code. A trusted URL includes what lies below it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from t5x_like.errors import ConfigError, ConfigProblem, SafetyError

LOCAL_SCHEMES = ("file", "memory")
STORE_SCHEMES = ("gs", "s3", "memory")
"""Object stores that hold token stores."""
_noted: set[str] = set()
"""URLs that a configuration in JSON names, and that therefore need trust."""
_trusted: set[str] = set()


def scheme_of(text: str) -> str:
    """Return the scheme of a URL in lower case; an empty string for a path."""
    scheme, separator, _ = text.partition("://")
    return scheme.lower() if separator else ""


def urls_in(value: Any) -> set[str]:
    """Return the URLs, except those of local places, at all depths of a JSON document."""
    if isinstance(value, str):
        return set() if scheme_of(value) in ("", *LOCAL_SCHEMES) else {value}
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return set().union(*map(urls_in, children))


def note(document: Any) -> None:
    """Note the URLs of a configuration in JSON, which need trust from now on."""
    _noted.update(urls_in(document))


def noted() -> set[str]:
    """Return the URLs that configurations in JSON have named."""
    return set(_noted)


def trust(words: Iterable[str]) -> None:
    """Allow requests to the URLs among these words, because the user has named them."""
    _trusted.update(word.rstrip("/") for word in words if scheme_of(word))


def require_trusted(url: str, schemes: tuple[str, ...], what: str) -> None:
    """Check a URL before a request is sent to it.

    Args:
      url: The URL.
      schemes: Schemes that are supported.
      what: What the URL names, for the message.

    Raises:
      ConfigError: the scheme is not supported, or the URL combines several.
      SafetyError: only a configuration in JSON names the URL, not the user.
    """
    if problems := unsupported_url(url, schemes, what):
        raise ConfigError(problems)
    is_noted = any(url == noted or url.startswith(f"{noted.rstrip('/')}/") for noted in _noted)
    is_trusted = any(url == trusted or url.startswith(f"{trusted}/") for trusted in _trusted)
    if is_noted and not is_trusted:
        raise SafetyError(
            f"{what}: found {url!r}, which only the configuration's author has named, so no request was sent. If you "
            f"trust it, run the same command with --trust {url}"
        )


def unsupported_url(url: str, schemes: tuple[str, ...], where: str) -> list[ConfigProblem]:
    """Return the problem of a URL with another scheme, or one that combines several; else none."""
    place = url.partition("?")[0]
    if scheme_of(place) in schemes and not ("|" in place or "::" in place or place.count("://") > 1):
        return []
    supported = ", ".join(f"{scheme}://" for scheme in schemes)
    return [ConfigProblem(where, repr(url), f"a path, or a URL of {supported}")]


def location_problems(text: str, where: str) -> list[ConfigProblem]:
    """Return the problem of a location that is neither a path nor a URL of a file or an object store; else none."""
    return unsupported_url(text, (*STORE_SCHEMES, "file"), where) if scheme_of(text) else []


def url_as_path(text: str, where: str) -> list[ConfigProblem]:
    """Return the problem of a URL in place of a local path, of which a folder of that name would be made; else none."""
    if not scheme_of(text):
        return []
    return [ConfigProblem(where, repr(text), "a local path", "copy it to this machine")]


def require_local(text: str, where: str) -> None:
    """Raise ConfigError for a URL in place of a local path."""
    if problems := url_as_path(text, where):
        raise ConfigError(problems)
