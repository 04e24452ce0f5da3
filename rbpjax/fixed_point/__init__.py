"""The convergent regime: gradients of h* = f(θ, x, h*) without the way to it."""
