"""Whether a fixed point can be differentiated, how well, and by which rule."""
