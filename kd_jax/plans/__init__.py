"""Estimates what a step costs on accelerators that are not present, from compiled programs."""
