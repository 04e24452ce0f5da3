"""What every experiment shares, one thing a file."""
