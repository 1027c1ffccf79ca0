"""Three decoders of clips in one shape: first count the frames, then decode the wanted ones.

No header is trusted. Frames are counted by reading a file's packets without decoding them, and each
wanted frame is taken by its number in the order of presentation. Where a decoder would give other
frames than PyAV, it refuses (CannotDecode):

- torchcodec seeks by presentation time, so it is not given files that store none (AVI), and the
  time of each of its frames is compared with the time wanted. PyAV counts the frames for it.
- decord seeks by numbers of packets, which are no numbers of frames where frames are reordered, so
  it is led through a file from the start. It begins some containers in the middle; it is given only
  those that it begins well. Its times are in single precision, and number / rate for AVI.

The pixels are the same for 8-bit 4:2:0 clips with even sides. In others the colour conversions
differ at sharp edges of colour, because they place chroma samples differently.
"""

from __future__ import annotations

from collections.abc import Callable

from mmalign.decoders import decord, pyav, torchcodec
from mmalign.decoders.base import ClipLimits, Decoder, Source

# In the order in which `auto` prefers them.
BACKENDS: dict[str, tuple[Callable[[], str | None], Callable[[Source, ClipLimits], Decoder]]] = {
    "torchcodec": (torchcodec.why_not, torchcodec.Torchcodec),
    "pyav": (pyav.why_not, pyav.PyAV),
    "decord": (decord.why_not, decord.Decord),
}


def why_not(name: str) -> str | None:
    """Why a backend does not work here, in one line; None where it does."""
    return BACKENDS[name][0]()


def working_backends() -> dict[str, str | None]:
    """Each backend: None where it works here, else why it does not."""
    return {name: why_not(name) for name in BACKENDS}


__all__ = ["BACKENDS", "why_not", "working_backends"]
