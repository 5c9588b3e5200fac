"""The passes, one file each, in families."""
