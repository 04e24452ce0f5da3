"""Graph networks at a fixed point: a citation graph, and chains with a far label."""
