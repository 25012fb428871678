"""The memory in models' own code."""
