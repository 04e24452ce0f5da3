"""The fuzz of the streaming, perturbation and unitary rooms."""
