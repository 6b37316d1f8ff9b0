"""Held-out figures, cost, and the programs that measure them."""
