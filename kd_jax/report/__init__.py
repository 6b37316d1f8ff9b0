"""Finished runs for people: tables, plots, cards, one page."""
