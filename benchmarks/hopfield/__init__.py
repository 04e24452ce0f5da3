"""A Hopfield memory by five gradient methods."""
