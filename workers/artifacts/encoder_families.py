"""Know the families of text encoders, and what sets each apart from BERT: the names of its tensors and settings, where positions begin,
and its classifiers' heads.

All of them are BERT to the graph (`workers.artifacts.bert`), which their tensors are renamed for. RoBERTa and its kin count positions from
behind the padding token's id, and their table has rows that no text reaches. DistilBERT has no segments.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from workers.artifacts.bert import BertShape
from workers.artifacts.errors import ConversionError

_BERT_SETTINGS = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "activation": "hidden_act",
}
_DISTILBERT_SETTINGS = {"layers": "n_layers", "hidden": "dim", "heads": "n_heads", "activation": "activation"}
_DISTILBERT_EPSILON = 1e-12
_PADDING = 1
"""The padding token's id in RoBERTa's vocabularies, where the configuration leaves it out."""


@dataclass(frozen=True)
class Family:
    """Say how a family differs. ``renamed`` is applied in order; what becomes an empty name is dropped."""

    prefix: str
    settings: Mapping[str, str]
    renamed: tuple[tuple[str, str], ...] = ()
    head: Literal["Tanh", "Relu"] = "Tanh"
    counts_from_padding: bool = False


_ROBERTA = Family(
    prefix="roberta.",
    settings=_BERT_SETTINGS,
    # a pooler, where there is one beside a head, is left over from training
    renamed=(
        (r"^pooler\..*", ""),
        (r"^classifier\.dense\.", "pooler.dense."),
        (r"^classifier\.out_proj\.", "classifier."),
    ),
    counts_from_padding=True,
)
FAMILIES: Mapping[str, Family] = {
    "bert": Family(prefix="bert.", settings=_BERT_SETTINGS),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "distilbert": Family(
        prefix="distilbert.",
        settings=_DISTILBERT_SETTINGS,
        renamed=(
            (r"^transformer\.layer\.", "encoder.layer."),
            (r"\.attention\.q_lin\.", ".attention.self.query."),
            (r"\.attention\.k_lin\.", ".attention.self.key."),
            (r"\.attention\.v_lin\.", ".attention.self.value."),
            (r"\.attention\.out_lin\.", ".attention.output.dense."),
            (r"\.sa_layer_norm\.", ".attention.output.LayerNorm."),
            (r"\.ffn\.lin1\.", ".intermediate.dense."),
            (r"\.ffn\.lin2\.", ".output.dense."),
            (r"\.output_layer_norm\.", ".output.LayerNorm."),
            (r"^pre_classifier\.", "pooler.dense."),
        ),
        head="Relu",
    ),
}


def read_shape(
    config: Mapping[str, Any],
    pooling: Literal["mean", "cls"] = "mean",
    labels: tuple[str, ...] = (),
    scores: Literal["one", "each"] = "one",
) -> BertShape:
    """Read the dimensions. Raises: ConversionError for another architecture or activation."""
    family = FAMILIES.get(str(config.get("model_type")))
    said = {ours: config.get(theirs) for ours, theirs in family.settings.items()} if family is not None else {}
    if family is None or said["activation"] != "gelu":
        raise ConversionError(
            f"the configuration describes a {str(config.get('model_type'))[:40]} with {str(said.get('activation'))[:40]}; "
            f"of encoders {', '.join(FAMILIES)} with the exact GELU are converted"
        )
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise ConversionError("the configuration asks for relative positions; only absolute ones are converted")
    epsilon = _DISTILBERT_EPSILON if family.settings is _DISTILBERT_SETTINGS else config.get("layer_norm_eps")
    padding = config.get("pad_token_id", _PADDING)
    try:
        shape = BertShape(
            layers=int(said["layers"]),  # type: ignore[arg-type]  # None and words are refused below
            hidden=int(said["hidden"]),  # type: ignore[arg-type]
            heads=int(said["heads"]),  # type: ignore[arg-type]
            positions=int(config["max_position_embeddings"]),
            vocab_size=int(config["vocab_size"]),
            norm_epsilon=float(epsilon),  # type: ignore[arg-type]
            pooling=pooling,
            labels=labels,
            scores=scores,
            first_position=int(padding) + 1 if family.counts_from_padding else 0,
            head=family.head,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConversionError(f"the configuration is not an encoder's: {error!r}"[:200]) from error
    if not 0 <= shape.first_position < shape.positions:
        raise ConversionError(
            f"the configuration leaves no positions: {shape.positions} in all, the first for a text is {shape.first_position}"
        )
    return shape


def rename(tensors: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Give a family's tensors BERT's names."""
    family, named = FAMILIES[str(config.get("model_type"))], {}
    for name, tensor in tensors.items():
        ours = name.removeprefix(family.prefix)
        for pattern, replacement in family.renamed:
            ours = re.sub(pattern, replacement, ours)
        if ours:
            named[ours] = tensor
    return named
