"""Operations on terms and on many tensors at once: value, gradient, proximal map, subdifferential."""
