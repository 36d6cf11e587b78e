"""Looking at weights: where they are in a model, their histograms."""
