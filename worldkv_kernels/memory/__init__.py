"""Where the world is kept: the pool, the window onto it, the bank, and what decides who comes back."""
