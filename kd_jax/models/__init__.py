"""Model families: one small file each, over one encoder and one decoder module."""
