"""Objectives: rows to candidates and a loss, one module for each shape of batch."""
