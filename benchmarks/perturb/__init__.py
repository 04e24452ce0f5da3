"""Forward-only gradients."""
