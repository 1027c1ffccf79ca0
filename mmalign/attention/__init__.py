"""Attention over prompts that several responses share, and the kernels that compute it."""

from typing import Literal

AttentionName = Literal["auto", "sdpa", "eager", "flash", "flex", "xformers"]
