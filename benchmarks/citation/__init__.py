"""Node classification on citation graphs."""
