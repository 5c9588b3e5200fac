"""What changed and what it cost: terminal, JSON, HTML."""
