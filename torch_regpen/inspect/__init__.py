"""Inspect a model: its parameters, their zeros and histograms, and the units that can be removed."""
