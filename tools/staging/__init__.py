"""What an agent has copied to its node's own disk before Ray starts.

jobs/staging.py starts -> model.py or environment.py -> copies.py: one reader, hashes, eviction
"""
