"""What two examples need: the training loop, batches, the command line."""
