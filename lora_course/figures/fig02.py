"""Figures of notebook 02: one layer."""
