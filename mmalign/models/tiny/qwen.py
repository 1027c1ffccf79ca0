"""Small Qwen2-VL, Qwen2.5-VL and Qwen3-VL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmalign.models.tiny.tokenizer import tokenizer_of

if TYPE_CHECKING:
    from mmalign.models.tiny import TinyModel

# The ChatML layout of Qwen2-VL and its successors.
QWEN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for block in message['content'] %}"
    "{% if block['type'] == 'image' %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif block['type'] == 'video' %}"
    "{{ '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{% elif block['type'] == 'text' %}{{ block['text'] }}{% endif %}"
    "{% endfor %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


# Placeholders and what stands around them, by their names in a config.
_MEDIA_TOKENS = {
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
}


def qwen2vl(config: TinyModel) -> tuple[Any, Any]:
    """Its own tower, M-RoPE, pictures of any size, clips without seconds."""
    from transformers import (
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer = _tokenizer(config)
    model = Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(
            vision_config={
                "depth": config.vision.layers,
                "embed_dim": config.vision.hidden,
                "hidden_size": config.text.hidden,
                "mlp_ratio": max(1, config.vision.mlp // config.vision.hidden),
                "num_heads": config.vision.heads,
                "patch_size": config.patch_size,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
            },
            text_config=_text(config, tokenizer) | {"rope_parameters": _rope(config)},
            tie_word_embeddings=False,
            **_media_ids(tokenizer),
        )
    )
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**_pixels(config)),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**_pixels(config)),
        chat_template=QWEN_TEMPLATE,
    )
    return model, processor


def qwen25vl(config: TinyModel) -> tuple[Any, Any]:
    """Its own tower with windows, M-RoPE, pictures of any size, clips."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer = _tokenizer(config)
    model = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            vision_config={
                **_tower(config),
                "window_size": 4 * config.patch_size,
                "fullatt_block_indexes": [config.vision.layers - 1],
            },
            text_config=_text(config, tokenizer) | {"rope_parameters": _rope(config)},
            tie_word_embeddings=False,
            **_media_ids(tokenizer),
        )
    )
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**_pixels(config)),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**_pixels(config)),
        chat_template=QWEN_TEMPLATE,
    )
    return model, processor


def qwen3vl(config: TinyModel) -> tuple[Any, Any]:
    """DeepStack, interleaved M-RoPE, normed queries and keys, clips with their times in words."""
    from transformers import (
        Qwen2VLImageProcessor,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    tokenizer = _tokenizer(config)
    # As published, heads are wider than a share of the hidden state, and share keys.
    head = 2 * config.text.hidden // config.text.heads
    # Frequencies of height and of width, in the published model's proportion 20 of 64.
    side = 5 * (head // 2) // 16
    model = Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(
            vision_config={
                **_tower(config),
                "num_position_embeddings": (config.image_size // config.patch_size) ** 2,
                "deepstack_visual_indexes": list(range(config.vision.layers))[:3],
            },
            text_config={
                **_text(config, tokenizer),
                "num_key_value_heads": max(1, config.text.heads // 2),
                "head_dim": head,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": [head // 2 - 2 * side, side, side],
                    "mrope_interleaved": True,
                },
            },
            tie_word_embeddings=False,
            **_media_ids(tokenizer),
        )
    )
    processor = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**_pixels(config)),
        tokenizer=tokenizer,
        # This processor limits the pixels of all frames together.
        video_processor=Qwen3VLVideoProcessor(
            cap_pixels_per_frame=False, **_pixels(config, frames=16)
        ),
        chat_template=QWEN_TEMPLATE,
    )
    return model, processor


def _tokenizer(config: TinyModel) -> Any:
    special = ("<|endoftext|>", "<|im_end|>", "<|im_start|>", *_MEDIA_TOKENS.values())
    words = None if config.words is None else ("user", "assistant", "system", *config.words)
    return tokenizer_of(words, special, bos=None)


def _media_ids(tokenizer: Any) -> dict[str, Any]:
    return {name: tokenizer.convert_tokens_to_ids(t) for name, t in _MEDIA_TOKENS.items()}


def _pixels(config: TinyModel, *, frames: int = 1) -> dict[str, Any]:
    most = frames * config.image_size**2
    return {
        "size": {"shortest_edge": (2 * config.patch_size) ** 2, "longest_edge": most},
        "patch_size": config.patch_size,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "image_mean": [config.pixel_mean] * 3,
        "image_std": [config.pixel_std] * 3,
    }


def _tower(config: TinyModel) -> dict[str, Any]:
    return {
        "depth": config.vision.layers,
        "hidden_size": config.vision.hidden,
        "intermediate_size": config.vision.mlp,
        "num_heads": config.vision.heads,
        "patch_size": config.patch_size,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": config.text.hidden,
    }


def _rope(config: TinyModel) -> dict[str, Any]:
    head = config.text.hidden // config.text.heads
    # Rotary sections (time, height, width) of a head, in the published model's proportion 2:3:3.
    section = [head // 8, 3 * head // 16, 3 * head // 16]
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": section}


def _text(config: TinyModel, tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": config.text.hidden,
        "intermediate_size": config.text.mlp,
        "num_hidden_layers": config.text.layers,
        "num_attention_heads": config.text.heads,
        "num_key_value_heads": config.text.heads,
        "max_position_embeddings": config.max_tokens,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "tie_word_embeddings": False,
    }
