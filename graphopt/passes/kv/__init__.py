"""Passes that make the key/value cache of a decoder smaller."""
