"""Ids of fairseq's SentencePiece models: XLM-R, mBART, mBART-50 and CamemBERT number the pieces in their own ways.

Their `sentencepiece.bpe.model` has the pieces only. Special tokens come before them, language codes and the mask token
after them.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from t5x_like.data.tokenizers import sentencepiece_proto

_MBART_CODES = (
    "ar_AR cs_CZ de_DE en_XX es_XX et_EE fi_FI fr_XX gu_IN hi_IN it_IT ja_XX kk_KZ ko_KR lt_LT lv_LV my_MM ne_NP nl_XX "
    "ro_RO ru_RU si_LK tr_TR vi_VN zh_CN"
).split()
_MBART_50_CODES = [
    *_MBART_CODES,
    *(
        "af_ZA az_AZ bn_IN fa_IR he_IL hr_HR id_ID ka_GE km_KH mk_MK ml_IN mn_MN mr_IN pl_PL ps_AF pt_XX sv_SE sw_KE "
        "ta_IN te_IN th_TH tl_XX uk_UA ur_PK xh_ZA gl_ES sl_SI"
    ).split(),
]
_MASK = "<mask>"


@dataclasses.dataclass(frozen=True)
class FairseqLayout:
    """Ids around the pieces of a model, and how text is split before it is encoded.

    Attributes:
      single, pair: Special tokens of a text and of two; `{language}` is the code of the tokenizer's `src_lang`.
      first: Tokens with the first ids.
      skipped: Number of pieces at the beginning of the model that `first` replaces.
      languages: Language codes, which follow the pieces.
      splits_at_whitespace: Every whitespace separates words; otherwise spaces alone do.
      mask_takes_space: The mask token includes the space in front of it.
    """

    single: str
    pair: str
    first: tuple[str, ...] = ("<s>", "<pad>", "</s>", "<unk>")
    skipped: int = 3
    languages: tuple[str, ...] = ()
    splits_at_whitespace: bool = True
    mask_takes_space: bool = True

    @property
    def special(self) -> list[str]:
        """Special tokens that text may spell."""
        return ["<s>", "<pad>", "</s>", "<unk>", *self.languages, _MASK]


_XLM_ROBERTA = FairseqLayout("<s> $A </s>", "<s> $A </s> </s> $B </s>", mask_takes_space=False)
_LAYOUTS = {
    "XLMRobertaTokenizer": _XLM_ROBERTA,
    # Tokens of fairseq's own come first. The <s> and </s> around texts are pieces of the model.
    "CamembertTokenizer": dataclasses.replace(
        _XLM_ROBERTA,
        first=("<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>NOTUSED"),
        skipped=1,
        mask_takes_space=True,
    ),
    "MBartTokenizer": FairseqLayout("$A </s> {language}", "$A $B </s> {language}", languages=tuple(_MBART_CODES)),
    "MBart50Tokenizer": FairseqLayout(
        "{language} $A </s>",
        "{language} $A $B </s>",
        languages=tuple(_MBART_50_CODES),
        splits_at_whitespace=False,
    ),
}
"""Layouts by `tokenizer_class` of tokenizer_config.json."""
SPECIAL_TOKENS = {
    "bos_token": "<s>", "cls_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "sep_token": "</s>",
    "unk_token": "<unk>", "mask_token": _MASK,
}  # fmt: skip
"""Fields of tokenizer_config.json that hold for all layouts."""


def tokenizer_json(model: bytes, config: dict[str, Any]) -> dict[str, Any]:
    """Return the tokenizer.json of a SentencePiece model, as transformers converts it.

    The text is normalized by the model's own table. transformers 5 leaves this out for mBART, whose published
    tokenizer.json has it.

    Args:
      model: Contents of `sentencepiece.bpe.model`.
      config: tokenizer_config.json, whose `tokenizer_class` names the layout.

    Raises:
      ValueError: the layout or the language is not known.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    name = str(config.get("tokenizer_class")).removesuffix("Fast")
    if name not in _LAYOUTS:
        raise ValueError(
            f"a fairseq SentencePiece model alone with tokenizer_class {name!r}: the ids of {', '.join(_LAYOUTS)} are "
            "known, save others with tokenizer.json"
        )
    layout = _LAYOUTS[name]
    language = config.get("src_lang") or "en_XX"
    if layout.languages and language not in layout.languages:
        raise ValueError(f"src_lang: found {language!r}, expected one of {', '.join(layout.languages)}")
    pieces, charsmap = sentencepiece_proto.pieces(model), sentencepiece_proto.settings(model).charsmap
    names = [
        *((token, -100.0 if token == "<unk>NOTUSED" else 0.0) for token in layout.first),
        *((piece.piece, piece.score) for piece in pieces[layout.skipped :]),
        *((token, 0.0) for token in (*layout.languages, _MASK)),
    ]
    tokenizer = Tokenizer(models.Unigram(names, layout.first.index("<unk>"), False))
    spaces = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    normalizer: list[Any] = [normalizers.Precompiled(charsmap)] if charsmap else []
    if layout.splits_at_whitespace:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), spaces])
    else:
        tokenizer.pre_tokenizer = spaces
        normalizer.append(normalizers.Replace(Regex(" {2,}"), " "))
    if normalizer:
        tokenizer.normalizer = normalizers.Sequence(normalizer)
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    ids = {token: index for index, (token, _) in enumerate(names)}
    added = [token for token in ("<s>", "</s>", language) if token in layout.special]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=layout.single.format(language=language),
        pair=layout.pair.format(language=language),
        special_tokens=[(token, ids[token]) for token in added],
    )
    plain = [AddedToken(token, special=True, normalized=False) for token in layout.special[:-1]]
    tokenizer.add_special_tokens(
        [*plain, AddedToken(_MASK, lstrip=layout.mask_takes_space, special=True, normalized=False)]
    )
    result: dict[str, Any] = json.loads(tokenizer.to_str())
    return result
