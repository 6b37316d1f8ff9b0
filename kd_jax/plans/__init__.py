"""What a step takes on chips that are not there, read from compiled programs."""
