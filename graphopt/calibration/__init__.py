"""Data for passes that need it. Runs models, never edits them."""
