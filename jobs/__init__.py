"""Login node and node agent: planning, submission, supervision. Never imports torch or ray."""
