"""A convolutional network at equilibrium, on images of digits."""
