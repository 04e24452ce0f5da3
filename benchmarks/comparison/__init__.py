"""Rules against each other, against other libraries, and against what is exact."""
