"""Slow float64 twins of the package, written as loops from the method and not from its code."""
