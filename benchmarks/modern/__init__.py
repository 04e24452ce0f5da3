"""The newer gradients of fixed points, at equal budget."""
