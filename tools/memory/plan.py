"""A layout that also has the memory for what goes there."""

from nanoslime import layout as layouts
from nanoslime.config import RunConfig
from nanoslime.layout import Layout
from nanoslime.models.shape import ModelShape
from tools.memory.checks import check_memory


def plan(config: RunConfig, shape: ModelShape) -> Layout:
    """Where everything goes. Raises RunError, with value, place and way out, where it cannot, and
    where a GPU or a node cannot hold it.
    """
    layout = layouts.plan(config, shape)
    check_memory(config, shape, layout.parallel)
    return layout
