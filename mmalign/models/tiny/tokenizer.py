"""Tokenizers made from a word list, or from bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def tokenizer_of(
    words: tuple[str, ...] | None,
    special: tuple[str, ...],
    bos: str | None,
    named: Mapping[str, str] = {},
) -> Any:
    """A fast tokenizer: one token per word, or per byte; `special[0]` pads, `special[1]` ends.

    named: special tokens that the processor looks up by an attribute, such as image_token.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    if words is None:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocab = {token: index for index, token in enumerate((*special, *alphabet))}
        core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
    else:
        unique = dict.fromkeys((*special, "<unk>", *words))
        vocab = {token: index for index, token in enumerate(unique)}
        core = Tokenizer(models.WordLevel(vocab=vocab, unk_token="<unk>"))
        core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos is not None:
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, vocab[bos])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=special[0],
        bos_token=bos,
        eos_token=special[1],
        unk_token="<unk>" if words is not None else None,
        additional_special_tokens=list(special[2:]),
        model_specific_special_tokens=dict(named),
        clean_up_tokenization_spaces=False,
    )
