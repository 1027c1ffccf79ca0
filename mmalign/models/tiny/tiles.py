"""Small InternVL, Idefics3 and SmolVLM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmalign.models.tiny.tokenizer import tokenizer_of

if TYPE_CHECKING:
    from mmalign.models.tiny import TinyModel

# The ChatML layout of OpenGVLab's InternVL3-hf checkpoints.
INTERNVL_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for block in message['content'] %}"
    "{% if block['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% elif block['type'] == 'text' %}{{ block['text'] }}{% endif %}"
    "{% endfor %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The layout of SmolVLM-Instruct, and of Idefics3 but for the token that it starts with.
IDEFICS_TEMPLATE = (
    "START{% for message in messages %}"
    "{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for block in message['content'] %}"
    "{% if block['type'] == 'image' %}{{ '<image>' }}"
    "{% elif block['type'] == 'text' %}{{ block['text'] }}{% endif %}"
    "{% endfor %}"
    "{{ '<end_of_utterance>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# Pictures are drawn up to two tiles high or wide.
MOST_TILES = 2
# Neighbouring patches, by each side, that become one token.
SHUFFLED = 2


def internvl(config: TinyModel) -> tuple[Any, Any]:
    """Its own tower, Qwen2 language model, tiles and a thumbnail."""
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVideoProcessor,
        InternVLVisionConfig,
        Qwen2Config,
    )

    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    special = ("<|endoftext|>", "<|im_end|>", "<|im_start|>", *names.values())
    words = None if config.words is None else ("user", "assistant", "system", *config.words)
    tokenizer = tokenizer_of(words, special, bos=None, named=names)
    side = config.image_size
    size = {"height": side, "width": side}
    pixels: dict[str, Any] = {
        "image_mean": [config.pixel_mean] * 3,
        "image_std": [config.pixel_std] * 3,
    }
    num_tokens = (side // config.patch_size // SHUFFLED) ** 2
    vision = InternVLVisionConfig(
        hidden_size=config.vision.hidden,
        intermediate_size=config.vision.mlp,
        num_hidden_layers=config.vision.layers,
        num_attention_heads=config.vision.heads,
        image_size=(side, side),
        patch_size=(config.patch_size, config.patch_size),
    )
    text = Qwen2Config(**_text(config, tokenizer))
    model = InternVLForConditionalGeneration(
        InternVLConfig(
            vision_config=vision,
            text_config=text,
            image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
            image_seq_length=num_tokens,
            downsample_ratio=1 / SHUFFLED,
            tie_word_embeddings=False,
        )
    )
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=size, max_patches=MOST_TILES**2, **pixels),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size=size, **pixels),
        image_seq_length=num_tokens,
        chat_template=INTERNVL_TEMPLATE,
    )
    return model, processor


def idefics3(config: TinyModel) -> tuple[Any, Any]:
    """SigLIP's tower, LLaMA language model; a turn ends with another token than a text."""
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3ImageProcessor,
        Idefics3Processor,
        Idefics3VisionConfig,
    )

    special = ("<|reserved|>", "<|end_of_text|>", "<|begin_of_text|>", "<end_of_utterance>")
    tokenizer = _idefics_tokenizer(config, special)
    model = Idefics3ForConditionalGeneration(
        Idefics3Config(
            vision_config=Idefics3VisionConfig(**_idefics_vision(config)),
            **_idefics(config, tokenizer),
        )
    )
    processor = Idefics3Processor(
        image_processor=Idefics3ImageProcessor(**_idefics_pictures(config)),
        tokenizer=tokenizer,
        image_seq_len=_idefics_tokens(config),
        chat_template=IDEFICS_TEMPLATE.replace("START", "<|begin_of_text|>"),
    )
    return model, processor


def smolvlm(config: TinyModel) -> tuple[Any, Any]:
    """Idefics3's architecture in the dress of SmolVLM2."""
    from transformers import (
        SmolVLMConfig,
        SmolVLMForConditionalGeneration,
        SmolVLMImageProcessor,
        SmolVLMProcessor,
        SmolVLMVideoProcessor,
        SmolVLMVisionConfig,
    )

    special = ("<|im_end|>", "<end_of_utterance>", "<|im_start|>")
    tokenizer = _idefics_tokenizer(config, special)
    model = SmolVLMForConditionalGeneration(
        SmolVLMConfig(
            vision_config=SmolVLMVisionConfig(**_idefics_vision(config)),
            **_idefics(config, tokenizer),
        )
    )
    pictures = _idefics_pictures(config)
    processor = SmolVLMProcessor(
        image_processor=SmolVLMImageProcessor(**pictures),
        tokenizer=tokenizer,
        video_processor=SmolVLMVideoProcessor(**pictures),
        image_seq_len=_idefics_tokens(config),
        chat_template=IDEFICS_TEMPLATE.replace("START", "<|im_start|>"),
    )
    return model, processor


def _idefics_tokenizer(config: TinyModel, special: tuple[str, ...]) -> Any:
    """special: the padding, the end and the beginning of a text, and what else there is."""
    sides = range(1, MOST_TILES + 1)
    places = [f"<row_{row}_col_{column}>" for row in sides for column in sides]
    special += ("<image>", "<fake_token_around_image>", "<global-img>", *places)
    words = None if config.words is None else ("User:", "Assistant:", "System:", *config.words)
    tokenizer = tokenizer_of(words, special, bos=None)
    # It is the template that writes it.
    tokenizer.bos_token = special[2]
    return tokenizer


def _idefics_tokens(config: TinyModel) -> int:
    return (config.image_size // config.patch_size // SHUFFLED) ** 2


def _idefics_vision(config: TinyModel) -> dict[str, Any]:
    return {
        "hidden_size": config.vision.hidden,
        "intermediate_size": config.vision.mlp,
        "num_hidden_layers": config.vision.layers,
        "num_attention_heads": config.vision.heads,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
    }


def _idefics_pictures(config: TinyModel) -> dict[str, Any]:
    return {
        "size": {"longest_edge": MOST_TILES * config.image_size},
        "max_image_size": {"longest_edge": config.image_size},
        "image_mean": [config.pixel_mean] * 3,
        "image_std": [config.pixel_std] * 3,
    }


def _idefics(config: TinyModel, tokenizer: Any) -> dict[str, Any]:
    from transformers import LlamaConfig

    return {
        "text_config": LlamaConfig(bos_token_id=tokenizer.bos_token_id, **_text(config, tokenizer)),
        "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
        "scale_factor": SHUFFLED,
        "tie_word_embeddings": False,
    }


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
        "tie_word_embeddings": False,
    }
