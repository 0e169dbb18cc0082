"""Figures of notebook 05: merging."""
