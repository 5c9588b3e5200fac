"""The graph: load, save, edit. Knows no pass."""
