"""Teachers: all of them map a batch to a teacher signal."""
