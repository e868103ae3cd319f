"""Renders chat templates as transformers does, with jinja2 alone. jinja2 is slow to import:
this file is loaded only where there is a template."""

from collections.abc import Callable
from datetime import datetime
from functools import partial
from json import dumps
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class _GenerationBlock(Extension):
    """`{% generation %}`, which marks the assistant's words: its content is what it holds."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def compile_template(source: str, variables: dict[str, Any]) -> Callable[[Any], str]:
    """A function from messages to text that ends where the answer begins.

    Raises what jinja2 raises, here and in the function.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    # jinja2's own filter writes for HTML.
    environment.filters["tojson"] = partial(dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    template = environment.from_string(source)

    def render(messages: Any) -> str:
        given = {"tools": None, "documents": None, **variables}
        return template.render(messages=messages, add_generation_prompt=True, **given)

    return render


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)
