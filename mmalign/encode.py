"""Pictures and clips as a family's processor makes them, the most recent ones kept."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.clips import Clip, FrameSampling, open_clip
from mmalign.errors import MediaError
from mmalign.media import media_key, open_image
from mmalign.models.families import Family
from mmalign.records import Media
from mmalign.scoring.candidates import EncodedMedia

if TYPE_CHECKING:
    from PIL.Image import Image

# Processed pictures kept in memory, since the rows of one picture usually come together.
KEPT_IMAGES = 64
# Clips are many pictures each.
KEPT_CLIPS = 4


class MediaEncoder:
    """Runs the processor of one checkpoint over pictures and clips."""

    def __init__(self, processor: Any, config: Any, family: Family) -> None:
        self.processor, self.config, self.family = processor, config, family
        self._images = _Recent(KEPT_IMAGES)
        self._clips = _Recent(KEPT_CLIPS)

    def image(self, media: Media, root: Path | None, max_pixels: int | None) -> EncodedMedia:
        """A picture, shrunk to `max_pixels` where it is larger. Raises MediaError."""
        name = f"{_place(media, root)} {max_pixels}"
        if (known := self._images.get(name)) is not None:
            return known
        image = open_image(media, root, verify=media.sha256 is not None)
        if max_pixels is not None:
            image = shrink(image, max_pixels)
        try:
            made = self.processed(image)
        except ValueError as error:
            where = media.path or f"embedded image {(media.sha256 or '')[:12]}"
            raise MediaError(f"the image processor refuses it ({error})", where=where) from None
        inputs = {key: made[key] for key in self.family.image_inputs}
        num_tokens = self.family.num_image_tokens(inputs, self.config)
        text = self.family.picture_text and self.family.picture_text(made, self.processor)
        return self._images.keep(name, inputs, num_tokens, text)

    def processed(self, image: Image) -> Any:
        """What the image processor makes of a picture, with the options of the family."""
        return self.processor.image_processor(
            images=[image], return_tensors="pt", **self.family.image_options
        )

    def clip(
        self, clip: Media | Clip, root: Path | None, max_pixels: int | None, frames: FrameSampling
    ) -> EncodedMedia:
        """A clip on disk, sampled by `frames`, or one that is decoded already. Raises MediaError.

        The frames are sampled by us, so the processor is told not to sample again, and gets the
        clip's own timing: seconds per temporal patch come from the source's rate and the frames
        that were kept.
        """
        assert self.family.num_video_tokens is not None
        key = clip.key if isinstance(clip, Clip) else f"{_place(clip, root)} {frames!r}"
        name = f"{key} {max_pixels}"
        if (known := self._clips.get(name)) is not None:
            return known
        if isinstance(clip, Media):
            clip = open_clip(clip, root, frames, verify=clip.sha256 is not None)
        made = self._clip_inputs(clip, max_pixels)
        inputs = {key: made[key] for key in self.family.video_inputs}
        num_tokens = self.family.num_video_tokens(inputs, self.config)
        text = self.family.video_text and self.family.video_text(made, self.processor)
        return self._clips.keep(name, inputs, num_tokens, text)

    def _clip_inputs(self, clip: Clip, max_pixels: int | None) -> dict[str, Any]:
        """All that the video processor makes of a clip, and its `video_metadata`."""
        import numpy as np
        import torch
        from PIL import Image
        from transformers.video_utils import VideoMetadata

        frames = clip.frames
        if max_pixels is not None and frames.shape[1] * frames.shape[2] > max_pixels:
            small = [shrink(Image.fromarray(frame), max_pixels) for frame in frames]
            frames = np.stack([np.asarray(frame) for frame in small])
        metadata = VideoMetadata(
            total_num_frames=clip.num_source_frames,
            fps=clip.source_fps,
            duration=clip.duration_seconds,
            frames_indices=list(clip.indices),
        )
        # Channels first: the processor would have to guess where a frame is three pixels high.
        stacked = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)
        processor = self.processor.video_processor
        try:
            made = processor(
                videos=[stacked],
                video_metadata=[metadata],
                do_sample_frames=False,
                return_tensors="pt",
            )
        except ValueError as error:
            where = f"clip {clip.key[:12]}"
            raise MediaError(f"the video processor refuses it ({error})", where=where) from None
        if "second_per_grid_ts" in self.family.video_inputs:
            seconds = processor.temporal_patch_size / clip.sampled_fps
            made["second_per_grid_ts"] = torch.tensor([seconds])
        return {**made, "video_metadata": [metadata]}


class _Recent:
    """The latest `size` encoded media by name."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._kept: OrderedDict[str, EncodedMedia] = OrderedDict()

    def get(self, name: str) -> EncodedMedia | None:
        if name in self._kept:
            self._kept.move_to_end(name)
        return self._kept.get(name)

    def keep(
        self, name: str, inputs: dict[str, Any], num_tokens: int, text: str | None = None
    ) -> EncodedMedia:
        key = hashlib.sha256(name.encode()).hexdigest()
        self._kept[name] = EncodedMedia(key=key, inputs=inputs, num_tokens=num_tokens, text=text)
        if len(self._kept) > self.size:
            self._kept.popitem(last=False)
        return self._kept[name]


def _place(media: Media, root: Path | None) -> str:
    """A path names a file only together with its root; a hash names it anywhere."""
    return ("" if media.sha256 or media.bytes is not None else str(root)) + media_key(media)


def thinned(frames: FrameSampling, most: int) -> FrameSampling:
    """The same sampling with at most so many frames."""
    if frames.num_frames is not None:
        return frames.model_copy(update={"num_frames": min(frames.num_frames, most)})
    return frames.model_copy(update={"max_frames": min(frames.max_frames, most)})


def shrink(image: Image, max_pixels: int) -> Image:
    """The picture itself, or a smaller one of the same shape with at most `max_pixels` pixels."""
    width, height = image.size
    if width * height <= max_pixels:
        return image
    scale = (max_pixels / (width * height)) ** 0.5
    return image.resize((max(1, int(width * scale)), max(1, int(height * scale))))
