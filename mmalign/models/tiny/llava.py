"""Small LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmalign.models.tiny.tokenizer import tokenizer_of

if TYPE_CHECKING:
    from mmalign.models.tiny import TinyModel

# The layout that llava-hf/llava-1.5 and llava-v1.6-vicuna checkpoints carry:
# "USER: <image>\ntext ASSISTANT:".
LLAVA_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'] | upper + ': ' }}{% endif %}"
    "{% for block in message['content'] if block['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for block in message['content'] if block['type'] == 'text' %}"
    "{{ block['text'] + ' ' }}{% endfor %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# The layout of llava-hf/llava-onevision checkpoints.
ONEVISION_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for block in message['content'] if block['type'] == 'image' %}{{ '<image>' }}{% endfor %}"
    "{% for block in message['content'] if block['type'] == 'video' %}{{ '<video>' }}{% endfor %}"
    "{% for block in message['content'] if block['type'] == 'text' %}"
    "{{ '\n' + block['text'] }}{% endfor %}"
    "{{ '<|im_end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def llava15(config: TinyModel) -> tuple[Any, Any]:
    """CLIP tower, LLaMA language model, one size of picture."""
    from transformers import (
        CLIPImageProcessor,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = _llama_tokenizer(config)
    side = config.image_size
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            image_seq_length=(side // config.patch_size) ** 2,
            **_clip_and_llama(config, tokenizer),
        )
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(**_clip_pixels(config)),
        tokenizer=tokenizer,
        **_llava_processing(config),
    )
    return model, processor


def llava_next(config: TinyModel) -> tuple[Any, Any]:
    """CLIP tower, LLaMA language model, a picture whole and in tiles."""
    from transformers import (
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessor,
        LlavaNextProcessor,
    )

    tokenizer = _llama_tokenizer(config)
    side = config.image_size
    # The published shapes of tiles: two, two by two, and three.
    shapes = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
    pinpoints = [[rows * side, columns * side] for rows, columns in shapes]
    model = LlavaNextForConditionalGeneration(
        LlavaNextConfig(
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            image_grid_pinpoints=pinpoints,
            **_clip_and_llama(config, tokenizer),
        )
    )
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            image_grid_pinpoints=pinpoints, **_clip_pixels(config)
        ),
        tokenizer=tokenizer,
        **_llava_processing(config),
    )
    return model, processor


def _llama_tokenizer(config: TinyModel) -> Any:
    words = None if config.words is None else ("USER:", "ASSISTANT:", *config.words)
    return tokenizer_of(words, ("<pad>", "</s>", "<s>", "<image>"), bos="<s>")


def _clip_pixels(config: TinyModel) -> dict[str, Any]:
    side = config.image_size
    return {
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        "image_mean": [config.pixel_mean] * 3,
        "image_std": [config.pixel_std] * 3,
    }


def _llava_processing(config: TinyModel) -> dict[str, Any]:
    return {
        "patch_size": config.patch_size,
        "vision_feature_select_strategy": "default",
        "image_token": "<image>",
        "num_additional_image_tokens": 1,
        "chat_template": LLAVA_TEMPLATE,
    }


def _clip_and_llama(config: TinyModel, tokenizer: Any) -> dict[str, Any]:
    """Tower, language model and what is taken from the tower, for a transformers config."""
    from transformers import CLIPVisionConfig, LlamaConfig

    return {
        "vision_config": CLIPVisionConfig(
            hidden_size=config.vision.hidden,
            intermediate_size=config.vision.mlp,
            num_hidden_layers=config.vision.layers,
            num_attention_heads=config.vision.heads,
            image_size=config.image_size,
            patch_size=config.patch_size,
            projection_dim=config.vision.hidden,
        ),
        "text_config": LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.text.hidden,
            intermediate_size=config.text.mlp,
            num_hidden_layers=config.text.layers,
            num_attention_heads=config.text.heads,
            num_key_value_heads=config.text.heads,
            max_position_embeddings=config.max_tokens,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            tie_word_embeddings=False,
        ),
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
    }


def llava_onevision(config: TinyModel) -> tuple[Any, Any]:
    """SigLIP tower, Qwen2 language model, tiles and clips."""
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
        Qwen2Config,
        SiglipVisionConfig,
    )

    special = ("<|endoftext|>", "<|im_end|>", "<|im_start|>", "<image>", "<video>")
    words = None if config.words is None else ("user", "assistant", "system", *config.words)
    tokenizer = tokenizer_of(words, special, bos=None)
    side = config.image_size
    # A picture is seen whole and in tiles; these shapes of tiles are offered.
    pinpoints = [[side, side], [side, 2 * side], [2 * side, side], [2 * side, 2 * side]]
    size = {"height": side, "width": side}
    pixels: dict[str, Any] = {
        "image_mean": [config.pixel_mean] * 3,
        "image_std": [config.pixel_std] * 3,
    }
    vision = SiglipVisionConfig(
        hidden_size=config.vision.hidden,
        intermediate_size=config.vision.mlp,
        num_hidden_layers=config.vision.layers,
        num_attention_heads=config.vision.heads,
        image_size=side,
        patch_size=config.patch_size,
        vision_use_head=False,
    )
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=config.text.hidden,
        intermediate_size=config.text.mlp,
        num_hidden_layers=config.text.layers,
        num_attention_heads=config.text.heads,
        num_key_value_heads=config.text.heads,
        max_position_embeddings=config.max_tokens,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in ("<image>", "<video>")}
    model = LlavaOnevisionForConditionalGeneration(
        LlavaOnevisionConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=ids["<image>"],
            video_token_index=ids["<video>"],
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            image_grid_pinpoints=pinpoints,
            tie_word_embeddings=False,
        )
    )
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(
            size=size, image_grid_pinpoints=pinpoints, **pixels
        ),
        tokenizer=tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(size=size, **pixels),
        num_image_tokens=(side // config.patch_size) ** 2,
        vision_feature_select_strategy="full",
        image_token="<image>",
        video_token="<video>",
        chat_template=ONEVISION_TEMPLATE,
    )
    return model, processor
