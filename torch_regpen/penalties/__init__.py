"""The penalties: the parameters, the scalar function of their magnitudes, and lambda."""
