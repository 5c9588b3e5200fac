"""Real small models for examples, tests and benchmarks, and the recipes that ship."""
