"""mmalign: preference alignment for vision-language and diffusion models."""

__version__ = "0.1.0"
