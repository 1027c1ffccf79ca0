"""Small Gemma 3 and PaliGemma."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmalign.models.tiny.tokenizer import tokenizer_of

if TYPE_CHECKING:
    from mmalign.models.tiny import TinyModel

# Shorter than a prompt with a picture, so that it hides something.
SLIDING_WINDOW = 12

# The layout of google/gemma-3 checkpoints: a system message opens the first turn.
GEMMA3_TEMPLATE = (
    "{{ bos_token }}"
    "{% set opening = namespace(text='') %}"
    "{% if messages[0]['role'] == 'system' %}"
    "{% set opening.text = messages[0]['content'][0]['text'] + '\n\n' %}"
    "{% set messages = messages[1:] %}"
    "{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('turns of user and assistant must alternate') }}"
    "{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + (opening.text if loop.first else '') }}"
    "{% for block in message['content'] %}"
    "{% if block['type'] == 'image' %}{{ '<start_of_image>' }}"
    "{% elif block['type'] == 'text' %}{{ block['text'] | trim }}{% endif %}"
    "{% endfor %}"
    "{{ '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def gemma3(config: TinyModel) -> tuple[Any, Any]:
    """SigLIP tower pooled two by two, layers with a sliding window and one that sees all."""
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3ImageProcessor,
        Gemma3Processor,
        Gemma3TextConfig,
    )

    named = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    special = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", *named.values())
    words = None if config.words is None else ("user", "model", *config.words)
    tokenizer = tokenizer_of(words, special, bos="<bos>", named=named)
    num_tokens = (config.image_size // config.patch_size // 2) ** 2
    text = Gemma3TextConfig(
        **_language_model(config, tokenizer),
        query_pre_attn_scalar=config.text.hidden // config.text.heads,
        sliding_window=SLIDING_WINDOW,
        layer_types=[
            "full_attention" if layer % 2 else "sliding_attention"
            for layer in range(config.text.layers)
        ],
    )
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(
            vision_config=_tower(config),
            text_config=text,
            mm_tokens_per_image=num_tokens,
            boi_token_index=tokenizer.boi_token_id,
            eoi_token_index=tokenizer.eoi_token_id,
            image_token_index=tokenizer.image_token_id,
        )
    )
    processor = Gemma3Processor(
        image_processor=Gemma3ImageProcessor(**_pixels(config)),
        tokenizer=tokenizer,
        image_seq_length=num_tokens,
        chat_template=GEMMA3_TEMPLATE,
    )
    return model, processor


def paligemma(config: TinyModel) -> tuple[Any, Any]:
    """SigLIP tower, Gemma language model with one key head for all queries."""
    from transformers import (
        GemmaConfig,
        PaliGemmaConfig,
        PaliGemmaForConditionalGeneration,
        PaliGemmaProcessor,
        SiglipImageProcessor,
    )

    named = {"image_token": "<image>"}
    special = ("<pad>", "<eos>", "<bos>", "<image>")
    # Its processor writes <bos> itself, and adds words for places and segments.
    tokenizer = tokenizer_of(config.words, special, bos=None, named=named)
    tokenizer.bos_token = "<bos>"
    num_tokens = (config.image_size // config.patch_size) ** 2
    processor = PaliGemmaProcessor(
        image_processor=SiglipImageProcessor(**_pixels(config), image_seq_length=num_tokens),
        tokenizer=tokenizer,
    )
    text = GemmaConfig(**{**_language_model(config, tokenizer), "num_key_value_heads": 1})
    model = PaliGemmaForConditionalGeneration(
        PaliGemmaConfig(
            vision_config=_tower(config),
            text_config=text,
            projection_dim=config.text.hidden,
            hidden_size=config.text.hidden,
            vocab_size=len(tokenizer),
            image_token_index=tokenizer.image_token_id,
        )
    )
    return model, processor


def _tower(config: TinyModel) -> Any:
    from transformers import SiglipVisionConfig

    return SiglipVisionConfig(
        hidden_size=config.vision.hidden,
        intermediate_size=config.vision.mlp,
        num_hidden_layers=config.vision.layers,
        num_attention_heads=config.vision.heads,
        image_size=config.image_size,
        patch_size=config.patch_size,
        vision_use_head=False,
    )


def _language_model(config: TinyModel, tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": config.text.hidden,
        "intermediate_size": config.text.mlp,
        "num_hidden_layers": config.text.layers,
        "num_attention_heads": config.text.heads,
        "num_key_value_heads": max(1, config.text.heads // 2),
        "head_dim": config.text.hidden // config.text.heads,
        "max_position_embeddings": config.max_tokens,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def _pixels(config: TinyModel) -> dict[str, Any]:
    return {
        "size": {"height": config.image_size, "width": config.image_size},
        "image_mean": [config.pixel_mean] * 3,
        "image_std": [config.pixel_std] * 3,
    }
