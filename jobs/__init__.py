"""The login node and the node agent: planning, submission, supervision. Never imports torch or ray."""
