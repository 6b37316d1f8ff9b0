"""Defines models: an encoder and a decoder module, and a small file for each model family."""
