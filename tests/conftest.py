"""Shared fixtures; `exactness` beside this file is imported by the tests of passes."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
