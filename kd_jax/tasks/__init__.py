"""Tasks: which text, which labels, which head."""
