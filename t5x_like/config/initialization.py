"""Initial parameters from another model, and rename rules for the usual changes of architecture."""

from __future__ import annotations

from typing import Annotated, Literal, assert_never

import pydantic

from t5x_like.config.bounds import NonEmptyStr, NonNegativeInt
from t5x_like.config.dataclass import config_dataclass

IDENTITY = (("(.*)", r"\1"),)


@config_dataclass
class InitializeFrom:
    """Initialization from the parameters of another run or of an imported model.

    The source is read at step 0 only: a resumed run reads its own checkpoint, and the source may have been deleted.
    """

    directory: NonEmptyStr
    """A run directory, or the output of `t5x-like convert --from`."""
    step: NonNegativeInt | None = None
    """Step of the checkpoint; None: the newest."""
    rename_rules: Annotated[tuple[tuple[str, str], ...], pydantic.Field(min_length=1)] = IDENTITY
    """(regular expression, replacement): a parameter of the source whose whole path matches is copied to the path that
    the replacement gives. A parameter may be copied to several paths. If several rules give the same path, the first
    one applies. A rule that gives no parameter of the new model is refused, and so is a parameter of the new model that
    no rule gives."""
    reinit: tuple[str, ...] = ()
    """Regular expressions for whole paths of parameters of the new model that keep their random initialization,
    regardless of the rules."""
    resize: tuple[str, ...] = ()
    """Regular expressions for whole paths of tables that may have more rows than the source's, for new sentinels and
    mode tokens. A new row is, for each column, the mean of the old rows plus a tenth of their standard deviation times
    a normal random number."""
    restore_optimizer: bool = False
    """Also restore the optimizer state, into a run with the same model and optimizer. The step starts at 0; only
    Adafactor's own step count continues."""


_CROSS = ("decoder/layers/self_attention(|_norm|_post_norm)/(.*)", r"decoder/layers/cross_attention\1/\2")


def decoder_to_encoder_decoder(
    directory: str,
    *,
    cross_attention: Literal["from_self_attention", "fresh", "merged"] = "from_self_attention",
    separate_tables: bool = True,
    step: int | None = None,
    fresh: tuple[str, ...] = (),
    grow: tuple[str, ...] = (),
) -> InitializeFrom:
    """Initialize both stacks of an encoder-decoder from a decoder.

    Args:
      directory: See `InitializeFrom`.
      cross_attention: from_self_attention: copy the self-attention, as in T5Gemma with equal stacks. fresh: random
        initialization; `training.freeze` with `ALL_BUT_CROSS_ATTENTION` trains it alone for the first steps. merged:
        T5Gemma 2, whose cross-attention has no parameters of its own, so that every parameter is a copy.
      separate_tables: The encoder has its own token embedding table, as in T5Gemma; T5Gemma 2 shares one table.
      step: See `InitializeFrom`.
      fresh: `InitializeFrom.reinit`.
      grow: `InitializeFrom.resize`.
    """
    merged = cross_attention == "merged"
    rules = [("((?:token_embedder|decoder|head)/.*)", r"\1"), ("decoder/(.*)", r"encoder/\1")]
    if separate_tables and not merged:
        rules.append(("token_embedder/(.*)", r"encoder_token_embedder/\1"))
    match cross_attention:
        case "from_self_attention":
            rules.append(_CROSS)
        case "fresh":
            fresh = ("decoder/layers/cross_attention.*", *fresh)
        case "merged":
            pass
        case unknown:
            assert_never(unknown)
    return InitializeFrom(directory=directory, step=step, rename_rules=tuple(rules), reinit=fresh, resize=grow)


ALL_BUT_CROSS_ATTENTION = "(?!.*/cross_attention).*"
"""Pattern for `training.freeze`: with until_step 1000, T5Gemma's warm-up of a fresh cross-attention."""


def decoder_to_encoder(
    directory: str, *, step: int | None = None, fresh: tuple[str, ...] = (), grow: tuple[str, ...] = ()
) -> InitializeFrom:
    """Initialize a bidirectional encoder from a decoder: the same parameters with another attention mask."""
    rules = (("((?:token_embedder|head)/.*)", r"\1"), ("decoder/(.*)", r"encoder/\1"))
    return InitializeFrom(directory=directory, step=step, rename_rules=rules, reinit=fresh, resize=grow)


def encoder_decoder_to_encoder(
    directory: str,
    *,
    separate_tables: bool = False,
    step: int | None = None,
    fresh: tuple[str, ...] = (),
    grow: tuple[str, ...] = (),
) -> InitializeFrom:
    """Initialize an encoder from the encoder of an encoder-decoder. A new head must be in `fresh`.

    Args:
      separate_tables: The encoder has its own token embedding table, as in T5Gemma.
    """
    rules = (("(encoder/.*)", r"\1"), ("encoder_token_embedder/(.*)", r"token_embedder/\1"))
    if not separate_tables:
        rules = (rules[0], ("(token_embedder/.*)", r"\1"))
    return InitializeFrom(directory=directory, step=step, rename_rules=rules, reinit=fresh, resize=grow)
