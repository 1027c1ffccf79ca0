"""Diffusion models: noise, the parts of a pipeline, and how errors are read."""
