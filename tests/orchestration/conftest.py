from tests.serving import other_model, sglang_engine, shared_server, tiny_model  # noqa: F401
from tests.training.conftest import two_ranks  # noqa: F401
