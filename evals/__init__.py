"""Evaluation: a checkpoint in, scores with their uncertainty out."""
