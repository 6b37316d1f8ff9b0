"""Teachers other than a single model that reads the same rows, and their logits on disk."""
