"""Classic fixed points, solved with defaults only, and judged in float64."""
