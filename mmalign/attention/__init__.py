"""Attention over prompts that several responses share, and the kernels that compute it."""
