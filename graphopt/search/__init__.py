"""Search: what each part of a model gets under a budget."""
