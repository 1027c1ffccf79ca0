"""Scoring: candidates in, per-token log-probabilities out, in one of two layouts."""
