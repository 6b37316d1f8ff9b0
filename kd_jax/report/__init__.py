"""Shows finished runs to people: tables, plots, model cards, one page."""
