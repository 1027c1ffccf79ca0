"""The local backend: transformers' generate, batched by length, seeded per request."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.generate.base import (
    Corruption,
    Generation,
    NoisePixels,
    Request,
    Sampling,
    request_seed,
)
from mmalign.generate.corrupt import noised, visible_tokens
from mmalign.generate.shared import (
    Encoder,
    Row,
    block,
    can_share,
    cuts,
    prefix_cache,
    side_by_side,
)
from mmalign.models.load import ModelConfig, Policy, base_model, load_policy, resolve_adapter
from mmalign.scoring.candidates import Condition, EncodedMedia
from mmalign.scoring.plan import joined

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image


class LocalGenerator:
    """Generates with a model in this process.

    Sampling adds Gumbel noise to the logits and takes the maximum (which is drawing from their
    softmax); every request has its own noise, drawn from (seed, its id). So its text does not
    depend on which other requests share its batch, on their order, or on the sharding of a job,
    but for rounding: two tokens that tie to the last bits may fall either way.
    """

    def __init__(self, policy: Policy, *, name: str = "policy", batch_size: int = 32) -> None:
        self.policy, self._name, self.batch_size = policy, name, batch_size
        self._banned, self._end = banned_ids(policy), end_ids(policy)
        self._pad = policy.preparer.pad_token_id

    @classmethod
    def from_checkpoint(
        cls, config: ModelConfig | str, *, batch_size: int = 32, device: str | None = None
    ) -> LocalGenerator:
        """Load a checkpoint, an adapter folder or a hub name, onto the GPU if there is one."""
        import torch

        config = ModelConfig(path=config) if isinstance(config, str) else config
        policy = load_policy(config, merge=False)
        policy.model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        policy.model.eval()
        base, adapter = resolve_adapter(config)
        parts = [base, adapter] if adapter else [base]
        name = "+".join(f"{part}@{fingerprint(part) or commit_of(policy)}" for part in parts)
        return cls(policy, name=name, batch_size=batch_size)

    @property
    def name(self) -> str:
        """Path or hub name, with the revision or a hash of the local weights."""
        return self._name

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Generation]:
        """Answer every request, in the order asked; batches hold prompts of like length."""
        rows = [self._row(request, sampling.seed) for request in requests]
        longest: dict[Hashable, int] = {}
        first: dict[Hashable, int] = {}
        for number, row in enumerate(rows):
            longest[row.seen] = max(longest.get(row.seen, 0), row.num_prompt)
            first.setdefault(row.seen, number)

        def place(i: int) -> tuple[int, ...]:
            # Rows that share a beginning stay together, among others of like length.
            seen = rows[i].seen
            return requests[i].num_tokens or 0, longest[seen], first[seen], rows[i].num_prompt, i

        results: list[Generation | None] = [None] * len(requests)
        alike = [(q.num_tokens, _frames(row)) for q, row in zip(requests, rows, strict=True)]
        encoder = Encoder(self.policy)
        for batch in _batches(sorted(range(len(rows)), key=place), alike, self.batch_size):
            some = [requests[i] for i in batch]
            made = self._run(some, [rows[i] for i in batch], encoder, sampling)
            for index, generation in zip(batch, made, strict=True):
                results[index] = generation
        return [generation for generation in results if generation is not None]

    def count_tokens(self, text: str) -> int:
        """Tokens of a piece of text, without any the tokenizer adds at its ends."""
        return len(self.policy.preparer.tokenizer(text, add_special_tokens=False)["input_ids"])

    def image_features(self, images: Sequence[Image]) -> torch.Tensor:
        """Mean over each picture's projected features, at the processor's own resolution.

        Returns [N, H] float32 on the CPU: the retrieval embedding of Re-Align's text.
        """
        import torch

        family, preparer = self.policy.family, self.policy.preparer
        device = next(self.policy.model.parameters()).device
        rows = []
        with torch.inference_mode():
            for start in range(0, len(images), self.batch_size):
                some = images[start : start + self.batch_size]
                made = [preparer.encoder.processed(image) for image in some]
                inputs = {
                    name: joined(name, [one[name] for one in made]).to(device)
                    for name in family.image_inputs
                }
                encoded = self.policy.model.get_image_features(**inputs, return_dict=True)  # type: ignore[operator]
                pieces = iter(encoded.pooler_output)
                for one in made:
                    count = 1 if family.num_pieces is None else family.num_pieces(one)
                    features = torch.cat(list(islice(pieces, count)))
                    rows.append(features.float().mean(0).cpu())
        return torch.stack(rows)

    def _prepare(self, request: Request) -> tuple[Condition, list[int]]:
        preparer = self.policy.preparer
        condition = preparer.condition(
            request.prompt,
            request.images,
            request.media_root,
            videos=request.videos,
            id=request.id,
        )
        return condition, preparer.prefill(request.prompt, request.prefill)

    def _row(self, request: Request, seed: int) -> Row:
        import torch

        condition, prefill = self._prepare(request)
        ids = condition.prompt_ids + prefill
        prompt = torch.tensor(condition.prompt_ids)
        kinds = torch.zeros(len(ids), dtype=torch.long)  # 0 text, 1 picture, 2 clip
        kinds[: len(prompt)] = (prompt == self.policy.preparer.image_token_id).long()
        if condition.videos:
            is_clip = prompt == self.policy.preparer.video_token_id
            kinds[: len(prompt)] += 2 * is_clip.long()
        media = kinds.nonzero().squeeze(-1)
        visible = torch.ones_like(kinds)
        visible[media] = visible_tokens(request.corruption, len(media), seed).long()
        follow = condition.positions[:, -1:] + 1 + torch.arange(len(prefill))
        keys = tuple(one.key for one in condition.images + condition.videos)
        return Row(
            ids=ids,
            num_prompt=len(prompt),
            kinds=kinds,
            visible=visible,
            positions=torch.cat([condition.positions, follow], -1),
            images=tuple(_corrupted(condition.images, request.corruption, seed)),
            videos=tuple(_corrupted(condition.videos, request.corruption, seed)),
            # Texts begin alike only where they are the same.
            seen=(keys or tuple(ids), request.corruption),
        )

    def _run(
        self, requests: list[Request], rows: list[Row], encoder: Encoder, sampling: Sampling
    ) -> list[Generation]:
        import torch
        from transformers import GenerationConfig, LogitsProcessorList

        family = self.policy.family
        device = next(self.policy.model.parameters()).device
        starts = [0] * len(rows)
        if can_share(family, self.policy.model.config):
            starts = cuts(rows)
        heads = block(rows, [0] * len(rows), starts, self._pad)
        tails = block(rows, starts, [len(row.ids) for row in rows], self._pad)
        # Every row's next token is in the same column.
        whole = side_by_side(heads, tails)
        width = whole.ids.shape[1]
        given: dict[str, Any] = {}
        if family.token_types is not None:
            given |= family.token_types(whole.kinds, whole.is_response)
        # generate adds it by itself.
        positions = whole.positions - family.first_position
        given["position_ids"] = positions if family.num_axes > 1 else positions[0]
        given = {name: tensor.to(device) for name, tensor in given.items()}
        fixed = requests[0].num_tokens
        end = self._end
        processors: list[Any] = [_ban(self._banned + (end if fixed else []))]
        if sampling.temperature > 0:
            seeds = [request_seed(sampling.seed, request.id) for request in requests]
            processors.append(_gumbel(seeds, sampling.temperature, sampling.top_p))
        with torch.inference_mode(), _plain_decoding(self.policy.model):
            if any(starts):
                given["past_key_values"] = prefix_cache(self.policy, rows, heads, encoder, device)
            else:
                given |= encoder(rows, device)
            out = self.policy.model.generate(  # type: ignore[operator]
                input_ids=whole.ids.to(device),
                attention_mask=whole.mask.to(device),
                logits_processor=LogitsProcessorList(processors),
                generation_config=GenerationConfig(
                    max_new_tokens=fixed or sampling.max_new_tokens,
                    do_sample=False,
                    num_beams=1,
                    eos_token_id=end,
                    pad_token_id=self._pad,
                ),
                **given,
            )
        return [
            self._finish(request, row.ids[row.num_prompt :], new.tolist())
            for request, row, new in zip(requests, rows, out[:, width:], strict=True)
        ]

    def _finish(self, request: Request, prefill: list[int], new: list[int]) -> Generation:
        cut = next((i for i, token in enumerate(new) if token in self._end), None)
        kept = new if cut is None else new[:cut]
        decode = self.policy.preparer.tokenizer.decode
        if not prefill:
            text = decode(kept, skip_special_tokens=True).strip()
        else:
            # What the new tokens add to the text of the old ones: decoding them apart would lose
            # the blank between two words of some tokenizers.
            before = decode(prefill, skip_special_tokens=True)
            whole = decode(prefill + kept, skip_special_tokens=True)
            text = whole[len(before) :] if whole.startswith(before) else decode(kept)
        return Generation(
            id=request.id,
            text=text,
            num_tokens=len(kept),
            finished=cut is not None or bool(request.num_tokens),
            token_ids=tuple(new if cut is None else new[: cut + 1]),
        )


@contextmanager
def _plain_decoding(model: Any) -> Iterator[None]:
    """Set a checkpoint's own decoding settings aside.

    transformers fills what our settings leave open from the model's, so that a repetition penalty
    shipped with a checkpoint would change greedy answers without anybody having asked for it.
    """
    from transformers import GenerationConfig

    base = base_model(model)
    shipped, base.generation_config = base.generation_config, GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = shipped


def end_ids(policy: Policy) -> list[int]:
    """Tokens that end a turn: the template's, the tokenizer's, those the checkpoint declares."""
    declared = base_model(policy.model).generation_config.eos_token_id
    declared = declared if isinstance(declared, list) else [declared]
    preparer = policy.preparer
    return sorted({preparer.tokenizer.eos_token_id, preparer.end_token_id, *declared} - {None})


def commit_of(policy: Policy) -> str:
    """The hub commit that a model was loaded from."""
    return getattr(policy.model.config, "_commit_hash", None) or "unknown"


def fingerprint(path: str) -> str | None:
    """Sixteen hex digits that change with what a local folder computes; None for a hub name.

    Hashes name, size and content of weights, configs, tokenizer and templates; of files over
    64 MiB, 64 blocks of 1 MiB spread evenly.
    """
    folder = Path(path)
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    kinds = ("*.safetensors", "*.bin", "*.json", "*.jinja", "*.model", "*.txt")
    for file in sorted(file for kind in kinds for file in folder.glob(kind)):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size};".encode())
        with open(file, "rb") as source:
            if size <= 64 * 2**20:
                digest.update(source.read())
                continue
            for block in range(64):
                source.seek(block * (size - 2**20) // 63)
                digest.update(source.read(2**20))
    return digest.hexdigest()[:16]


def _corrupted(
    media: Sequence[EncodedMedia], corruption: Corruption | None, seed: int
) -> Iterator[EncodedMedia]:
    """The media with the noise that is asked for, each with noise and a key of its own."""
    for number, one in enumerate(media):
        if not isinstance(corruption, NoisePixels):
            yield one
            continue
        noise = replace(corruption, key=f"{corruption.key}/{number}")
        inputs = {
            name: noised(tensor, noise, seed) if "pixel" in name else tensor
            for name, tensor in one.inputs.items()
        }
        yield replace(one, key=f"{one.key} {noise}", inputs=inputs)


def _frames(row: Row) -> tuple[int, ...]:
    """Frames of each clip, where a family needs as many of each in a batch; else nothing."""
    pixels = [clip.inputs["pixel_values_videos"] for clip in row.videos]
    return tuple(tensor.shape[1] for tensor in pixels if tensor.dim() == 5)


def _batches(order: list[int], alike: Sequence[object], size: int) -> list[list[int]]:
    """Consecutive runs of at most `size` of equal `alike`: what can be decoded in step."""
    batches: list[list[int]] = []
    for index in order:
        last = batches[-1] if batches else None
        if last is None or len(last) == size or alike[last[0]] != alike[index]:
            batches.append([])
        batches[-1].append(index)
    return batches


def banned_ids(policy: Policy) -> list[int]:
    """Tokens a response may never hold: what pictures are written with, padding, a beginning."""
    config, tokenizer = policy.model.config, policy.preparer.tokenizer
    ids = {
        policy.preparer.image_token_id,
        getattr(config, "video_token_id", None),
        getattr(config, "vision_start_token_id", None),
        getattr(config, "vision_end_token_id", None),
        getattr(config, "boi_token_id", None),
        getattr(config, "eoi_token_id", None),
        tokenizer.pad_token_id,
        tokenizer.bos_token_id,
    }
    added, markers = tokenizer.added_tokens_decoder.items(), policy.family.markers
    ids |= {number for number, token in added if re.fullmatch(markers, str(token))}
    return sorted(ids - {None, tokenizer.eos_token_id, policy.preparer.end_token_id})


def _ban(ids: list[int]) -> Any:
    def process(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, ids] = float("-inf")
        return scores

    return process


def _gumbel(seeds: list[int], temperature: float, top_p: float) -> Any:
    """A logits processor after which the maximum is a sample, each row from its own stream."""
    import torch

    streams = [torch.Generator().manual_seed(seed) for seed in seeds]

    def process(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.float() / temperature
        if top_p < 1.0:
            ranked, order = scores.softmax(-1).sort(-1, descending=True)
            # The token that crosses top_p stays, so that at least one does.
            outside = ranked.cumsum(-1) - ranked > top_p
            scores = scores.masked_fill(outside.scatter(-1, order, outside), float("-inf"))
        noise = torch.stack([torch.rand(scores.shape[-1], generator=s) for s in streams])
        return scores - (-noise.clamp_min(1e-20).log()).log().to(scores.device)

    return process
