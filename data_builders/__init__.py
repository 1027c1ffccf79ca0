"""Builders: media in, typed preference records out."""
