from tests.serving import other_model, sglang_engine, shared_server, tiny_model  # noqa: F401
