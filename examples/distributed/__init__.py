"""A deep equilibrium network, trained on one process or on many."""
