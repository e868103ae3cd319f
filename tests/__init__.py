"""The tests. Their environment is set here, since pytest imports plug-ins of this package, and
with them torch and transformers, before it imports conftest.py.
"""

import os

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
