"""Beneath all packages: strategies, pytrees, sharding, step functions, convolutions."""
