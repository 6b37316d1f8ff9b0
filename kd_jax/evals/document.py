"""Names at their old place."""

from kd_jax.evals.page import Document

markdown = Document.markdown
