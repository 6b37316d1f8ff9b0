"""Sources, tokenised blocks, masking and the stream of batches."""
