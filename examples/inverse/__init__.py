"""Compressed sensing by a learned iteration that is run until it rests."""
