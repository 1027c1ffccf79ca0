"""Small Qwen2.5-VL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmalign.models.tiny.tokenizer import tokenizer_of

if TYPE_CHECKING:
    from mmalign.models.tiny import TinyModel

# The ChatML layout of Qwen2.5-VL.
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


def qwen25vl(config: TinyModel) -> tuple[Any, Any]:
    """Its own tower with windows, M-RoPE, pictures of any size, clips."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    special = ("<|endoftext|>", "<|im_end|>", "<|im_start|>", "<|vision_start|>")
    special += ("<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    words = None if config.words is None else ("user", "assistant", "system", *config.words)
    tokenizer = tokenizer_of(words, special, bos=None)
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in special}
    side = config.image_size
    shared = {
        "patch_size": config.patch_size,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "image_mean": [config.pixel_mean] * 3,
        "image_std": [config.pixel_std] * 3,
    }
    limits = {"shortest_edge": (2 * config.patch_size) ** 2, "longest_edge": side * side}
    head = config.text.hidden // config.text.heads
    # Rotary sections (time, height, width) of a head, in the published model's proportion 2:3:3.
    section = [head // 8, 3 * head // 16, 3 * head // 16]
    model = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            vision_config={
                "depth": config.vision.layers,
                "hidden_size": config.vision.hidden,
                "intermediate_size": config.vision.mlp,
                "num_heads": config.vision.heads,
                "patch_size": config.patch_size,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "out_hidden_size": config.text.hidden,
                "window_size": 4 * config.patch_size,
                "fullatt_block_indexes": [config.vision.layers - 1],
            },
            text_config={
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
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": section,
                },
                "tie_word_embeddings": False,
            },
            image_token_id=ids["<|image_pad|>"],
            video_token_id=ids["<|video_pad|>"],
            vision_start_token_id=ids["<|vision_start|>"],
            vision_end_token_id=ids["<|vision_end|>"],
            tie_word_embeddings=False,
        )
    )
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=limits, **shared),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=limits, **shared),
        chat_template=QWEN_TEMPLATE,
    )
    return model, processor
