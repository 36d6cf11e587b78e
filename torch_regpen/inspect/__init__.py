"""Looking at weights: which parameters there are, their zeros and histograms, what an optimizer does to them."""
