"""Where a run takes its first parameters from, and ready-made maps for the usual changes of architecture."""

from __future__ import annotations

from typing import Literal

from t5x_like.config.base import configuration

SAME = (("(.*)", r"\1"),)


@configuration
class InitializeFrom:
    """Parameters of another run or of an imported model, by assignment maps. Read at step 0 only: a run that resumes
    reads its own checkpoint, and the source may be gone."""

    directory: str
    """A run's directory, or what `t5x-like convert --from` wrote."""
    step: int | None = None
    """Which checkpoint; None: the newest."""
    rules: tuple[tuple[str, str], ...] = SAME
    """(regular expression, replacement): a parameter of the source whose whole path matches goes to the path that the
    replacement makes of it. A parameter may go to several places. Where several rules lead to one place, the first
    counts. A rule that leads nowhere is refused, as is a parameter of the new model that no rule leads to."""
    fresh: tuple[str, ...] = ()
    """Regular expressions for whole paths of parameters of the new model that keep their initial values, whatever the
    rules say."""
    grow: tuple[str, ...] = ()
    """Regular expressions for whole paths of tables that may have more rows than the source's: for new sentinels and
    mode tokens. A new row is the mean of the old ones plus a tenth of their standard deviation times a normal random
    number, for each column."""
    optimizer: bool = False
    """Take the optimizer's state as well, into a run with the same model and optimizer. The step begins at 0; only
    Adafactor's own count goes on."""


_CROSS = ("decoder/layers/self_attention(|_norm|_post_norm)/(.*)", r"decoder/layers/cross_attention\1/\2")


def encoder_decoder_of_decoder(
    directory: str,
    *,
    cross_attention: Literal["from_self_attention", "fresh", "merged"] = "from_self_attention",
    separate_tables: bool = True,
    step: int | None = None,
    fresh: tuple[str, ...] = (),
    grow: tuple[str, ...] = (),
) -> InitializeFrom:
    """A decoder becomes both stacks of an encoder-decoder.

    Args:
      cross_attention: from_self_attention: T5Gemma with equal stacks. fresh: random; `training.freeze` with
        `ALL_BUT_CROSS_ATTENTION` trains it alone for the first steps. merged: T5Gemma 2, whose decoder has no
        parameters for it, so that all is a copy.
      separate_tables: The encoder has a token table of its own, as in T5Gemma; T5Gemma 2 has one for both.
    """
    merged = cross_attention == "merged"
    rules = [("((?:token_embedder|decoder|head)/.*)", r"\1"), ("decoder/(.*)", r"encoder/\1")]
    if separate_tables and not merged:
        rules.append(("token_embedder/(.*)", r"encoder_token_embedder/\1"))
    if cross_attention == "from_self_attention":
        rules.append(_CROSS)
    if cross_attention == "fresh":
        fresh = ("decoder/layers/cross_attention.*", *fresh)
    return InitializeFrom(directory=directory, step=step, rules=tuple(rules), fresh=fresh, grow=grow)


ALL_BUT_CROSS_ATTENTION = "(?!.*/cross_attention).*"
"""For `training.freeze`: with until_step 1000, T5Gemma's warm-up of a fresh cross-attention."""


def encoder_of_decoder(
    directory: str, *, step: int | None = None, fresh: tuple[str, ...] = (), grow: tuple[str, ...] = ()
) -> InitializeFrom:
    """A decoder becomes a bidirectional encoder: the same parameters, another mask."""
    rules = (("((?:token_embedder|head)/.*)", r"\1"), ("decoder/(.*)", r"encoder/\1"))
    return InitializeFrom(directory=directory, step=step, rules=rules, fresh=fresh, grow=grow)


def encoder_of_encoder_decoder(
    directory: str,
    *,
    separate_tables: bool = False,
    step: int | None = None,
    fresh: tuple[str, ...] = (),
    grow: tuple[str, ...] = (),
) -> InitializeFrom:
    """The encoder alone. A head that it gets is `fresh`.

    Args:
      separate_tables: The encoder has a token table of its own, as in T5Gemma.
    """
    rules = (("(encoder/.*)", r"\1"), ("encoder_token_embedder/(.*)", r"token_embedder/\1"))
    if not separate_tables:
        rules = (rules[0], ("(token_embedder/.*)", r"\1"))
    return InitializeFrom(directory=directory, step=step, rules=rules, fresh=fresh, grow=grow)
