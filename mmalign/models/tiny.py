"""Small models from scratch: real architectures and processors, saved like any checkpoint.

Tests, the quickstart and the lab build them, so that the loading code is the one users run.
Nothing is downloaded: weights are random and the tokenizer is made from a word list or from bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveInt, model_validator

from mmalign.config import Strict
from mmalign.errors import ModelError
from mmalign.log import quiet_libraries
from mmalign.store import write_atomically

# Written last: the settings that a folder's model was made from.
RECIPE = "made_from.json"

# The layout that llava-hf/llava-1.5 checkpoints carry: "USER: <image>\ntext ASSISTANT:".
LLAVA_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'] | upper + ': ' }}{% endif %}"
    "{% for block in message['content'] if block['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for block in message['content'] if block['type'] == 'text' %}"
    "{{ block['text'] + ' ' }}{% endfor %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
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


class Tower(Strict):
    """Sizes of one transformer."""

    hidden: PositiveInt = 64
    layers: PositiveInt = 2
    heads: PositiveInt = 4
    mlp: PositiveInt = 128


class TinyModel(Strict):
    """A small vision-language model to be made from scratch.

    words: the vocabulary of a one-word-one-token tokenizer; None gives one token per byte, which
        reads any text.
    pixel_mean, pixel_std: what the image processor subtracts and divides by, after scaling to 0..1.
    """

    output: str
    family: Literal["llava15", "qwen25vl", "llava_onevision"] = "llava15"
    seed: int = 0
    words: tuple[str, ...] | None = None
    image_size: PositiveInt = 32
    patch_size: PositiveInt = 8
    vision: Tower = Tower()
    text: Tower = Tower(layers=3)
    max_tokens: PositiveInt = 4096
    pixel_mean: float = 0.5
    pixel_std: float = 0.5

    @model_validator(mode="after")
    def _heads_fit(self) -> TinyModel:
        head = self.text.hidden // self.text.heads
        if self.family == "qwen25vl" and head % 16:
            raise ValueError(f"qwen25vl needs heads of a multiple of 16 wide, not {head}")
        return self

    def build(self) -> Path:
        """Make the model and its processor, save both, and return the folder.

        A folder that holds this very model is left alone. Raises ModelError where it holds another.
        """
        import torch

        path = Path(self.output)
        recipe = self.model_dump_json(exclude={"output"}, indent=2)
        if (path / RECIPE).exists():
            if (path / RECIPE).read_text() == recipe:
                return path
            raise ModelError(
                "holds a model made from other settings",
                where=str(path),
                fix="choose another output, or delete the folder",
            )
        quiet_libraries()
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            make = {"llava15": _llava15, "qwen25vl": _qwen25vl, "llava_onevision": _onevision}
            model, processor = make[self.family](self)
            _reset(model)
        path.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(path)
        processor.save_pretrained(path)
        write_atomically(path / RECIPE, recipe)
        return path


def _reset(model: Any) -> None:
    """Xavier for every matrix: transformers' 0.02 learns slowly in a model this small."""
    import torch

    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and "embed" not in name:
            torch.nn.init.xavier_uniform_(parameter.data.view(parameter.shape[0], -1))


def _tokenizer(words: tuple[str, ...] | None, special: tuple[str, ...], bos: str | None) -> Any:
    """A fast tokenizer: one token per word, or per byte; `special[0]` pads."""
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
        clean_up_tokenization_spaces=False,
    )


def _llava15(config: TinyModel) -> tuple[Any, Any]:
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    words = None if config.words is None else ("USER:", "ASSISTANT:", *config.words)
    tokenizer = _tokenizer(words, ("<pad>", "</s>", "<s>", "<image>"), bos="<s>")
    side = config.image_size
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=[config.pixel_mean] * 3,
        image_std=[config.pixel_std] * 3,
    )
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    vision = CLIPVisionConfig(
        hidden_size=config.vision.hidden,
        intermediate_size=config.vision.mlp,
        num_hidden_layers=config.vision.layers,
        num_attention_heads=config.vision.heads,
        image_size=side,
        patch_size=config.patch_size,
        projection_dim=config.vision.hidden,
    )
    text = LlamaConfig(
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
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=image_id,
            image_seq_length=(side // config.patch_size) ** 2,
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
            tie_word_embeddings=False,
        )
    )
    processor = LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=config.patch_size,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    return model, processor


def _qwen25vl(config: TinyModel) -> tuple[Any, Any]:
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
    tokenizer = _tokenizer(words, special, bos=None)
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


def _onevision(config: TinyModel) -> tuple[Any, Any]:
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
    tokenizer = _tokenizer(words, special, bos=None)
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
