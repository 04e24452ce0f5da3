"""Beneath all rooms: strategies, pytrees, sharding, step functions, convolutions."""
