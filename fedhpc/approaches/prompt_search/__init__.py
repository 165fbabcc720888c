"""Prompt engineering: a search for the best words."""
