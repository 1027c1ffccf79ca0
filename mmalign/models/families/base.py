"""What the library must know of a model family, and how positions count in most of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

ImageInputs = Mapping[str, "Tensor"]

# The linear layers of a language model; vision towers have some of these names too.
LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What the library must know of one family of vision-language models.

    towers, texts: vision and text architectures under which the other facts hold; empty for the
        family's own one.
    vision, projector, language_model: module paths under the multimodal body (`model.model`), for
        freezing, for the parameter table and for LoRA; what is in none of them counts as language
        model.
    image_inputs, video_inputs: what the processor makes of a picture and of a clip; no
        video_inputs where the family takes no clips.
    image_options: what the image processor is told by the family's processor.
    num_image_tokens, num_video_tokens: placeholder tokens of one processed picture or clip, from
        its own inputs.
    chat_template: renders one question and its answer, for a family whose processor has no
        template: what that processor makes of the question.
    picture_text: what stands for one picture in the rendered prompt, from all that the image
        processor made of it and the processor, where that is more than its placeholder repeated.
    video_text: the same for a clip, whose `video_metadata` comes along.
    markers: regular expression of the tokens beside placeholders that these texts are made of,
        which a response never holds.
    num_pieces: rows of the tower's output that one picture takes, where that is not one.
    positions: position ids [A, S] of a prompt (A axes: 1, or 3 for M-RoPE).
    first_position: what the model counts from. transformers' generate adds it to the positions that
        it is given.
    prompt_attention: which later tokens of the prompt a prompt token sees: none (causal), all
        (bidirectional), or those of its own picture (picture_blocks).
    token_types: what else the model's own forward must be told of its tokens, by name, from their
        kinds (0 text, 1 picture, 2 clip) and whether they belong to a response, both [R, S].
    token_pixels: pixels that one image token stands for, where a smaller picture gives fewer
        tokens; None where it gives as many, whatever its size.
    max_images: most pictures in one prompt; None for any number.
    """

    name: str
    model_types: tuple[str, ...]
    towers: tuple[str, ...]
    texts: tuple[str, ...] = ()
    vision: str
    projector: str
    language_model: str = "language_model"
    image_inputs: tuple[str, ...]
    num_image_tokens: Callable[[ImageInputs, Any], int]
    video_inputs: tuple[str, ...] = ()
    num_video_tokens: Callable[[ImageInputs, Any], int] | None = None
    image_options: Mapping[str, Any] = field(default_factory=dict)
    chat_template: str | None = None
    picture_text: Callable[[Mapping[str, Any], Any], str] | None = None
    video_text: Callable[[Mapping[str, Any], Any], str] | None = None
    markers: str = ""
    num_pieces: Callable[[ImageInputs], int] | None = None
    positions: Callable[[Tensor, list[ImageInputs], list[ImageInputs], Any], Tensor]
    first_position: int = 0
    prompt_attention: Literal["causal", "bidirectional", "picture_blocks"] = "causal"
    token_types: Callable[[Tensor, Tensor], dict[str, Tensor]] | None = None
    token_pixels: Callable[[Any], int] | None = None
    max_images: int | None = None

    @property
    def num_axes(self) -> int:
        """Rows of the position ids: 3 for M-RoPE, else 1."""
        return 3 if self.positions in (mrope_positions, mrope_positions_by_frame) else 1

    @property
    def lora_targets(self) -> str:
        """What LoRA adapts by default: every linear layer of the language model, by its name."""
        return self.language_layers(LINEAR_LAYERS)

    def language_layers(self, names: Sequence[str]) -> str:
        """Regular expression of the language model's modules of these names.

        The vision tower and the projector, which may have modules of the same names, stay out.
        """
        return rf".*\b{self.language_model}\..*\.({'|'.join(names)})"


def linear_positions(
    prompt_ids: Tensor, images: list[ImageInputs], videos: list[ImageInputs], config: Any
) -> Tensor:
    """0, 1, 2, …: [1, S] int64."""
    import torch

    return torch.arange(len(prompt_ids))[None]


def mrope_positions(
    prompt_ids: Tensor, images: list[ImageInputs], videos: list[ImageInputs], config: Any
) -> Tensor:
    """Multimodal rotary positions of a prompt: time, height and width of each token, [3, S] int64.

    Text advances all three axes by one. An image of t x h x w merged patches starts at the next
    free position p: its tokens get (p + time, p + row, p + column), and text resumes at
    p + max(h, w) (Qwen2-VL, arXiv 2409.12191, section 2.1). A clip's time advances by
    tokens_per_second * (seconds per temporal patch), each time cut to a whole number (Qwen2.5-VL,
    arXiv 2502.13923, section 2.1.3), or by one where the family knows no seconds (Qwen2-VL). Equal
    to transformers' get_rope_index; ours runs where batches are made, without the model.
    """
    clips: list[_Grid] = []
    for clip in videos:
        seconds = clip.get("second_per_grid_ts")
        pace = 1 if seconds is None else config.vision_config.tokens_per_second * float(seconds[0])
        clips.append((clip["video_grid_thw"][0].tolist(), pace))
    return _mrope(prompt_ids, images, clips, config)


def mrope_positions_by_frame(
    prompt_ids: Tensor, images: list[ImageInputs], videos: list[ImageInputs], config: Any
) -> Tensor:
    """The same where a clip's frames stand apart, each after its time in words: [3, S] int64.

    Each frame (a temporal patch) then counts as a picture does (Qwen3-VL, arXiv 2511.21631).
    """
    clips: list[_Grid] = []
    for clip in videos:
        time, height, width = clip["video_grid_thw"][0].tolist()
        clips += [([1, height, width], 1)] * time
    return _mrope(prompt_ids, images, clips, config)


# Patches of one run of placeholders in time, height and width, and positions from time to time.
_Grid = tuple[list[int], float]


def _mrope(
    prompt_ids: Tensor, images: list[ImageInputs], clips: list[_Grid], config: Any
) -> Tensor:
    import torch

    merge = config.vision_config.spatial_merge_size
    kinds = (prompt_ids == config.image_token_id) + 2 * (prompt_ids == config.video_token_id)
    result = torch.empty(3, len(prompt_ids), dtype=torch.long)
    index = position = 0
    pictures: list[_Grid] = [(image["image_grid_thw"][0].tolist(), 1) for image in images]
    runs = {1: iter(pictures), 2: iter(clips)}
    while index < len(prompt_ids):
        kind = int(kinds[index])
        if kind == 0:
            result[:, index] = position
            index, position = index + 1, position + 1
            continue
        (time, height, width), pace = next(runs[kind])
        height, width = height // merge, width // merge
        grid = torch.cartesian_prod(
            (torch.arange(time) * pace).long(), torch.arange(height), torch.arange(width)
        ).reshape(-1, 3)
        result[:, index : index + len(grid)] = position + grid.T
        index, position = index + len(grid), position + max(height, width)
    return result


def modality_types(kinds: Tensor, is_response: Tensor) -> dict[str, Tensor]:
    """What models with M-RoPE ask for: 0 text, 1 picture, 2 clip."""
    return {"mm_token_type_ids": kinds}
