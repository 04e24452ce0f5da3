"""Solvers of h = f(h): one a file, each also a way to solve the adjoint equation."""
