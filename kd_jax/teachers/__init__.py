"""Teachers: what answers beside the student, besides a single model that reads the same rows."""
