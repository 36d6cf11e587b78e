"""The penalties: which parameters, which scalar function of which magnitudes, which lambda."""
