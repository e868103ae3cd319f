"""The model may ask a calculator: <calc>12 * (3 + 4)</calc> is answered by <result>84</result>.

Calls and results are plain text in the response, so that any model can learn them.
"""

import ast
import math
import operator
from collections.abc import Callable

from nanoslime.rollout.policy import Policy
from nanoslime.rollout.sample_builder import SampleBuilder
from nanoslime.types import Prompt, Sample, Status

_BEGIN = "<calc>"
_END = "</calc>"
_MAX_CHARS = 200
_MAX_BITS = 4096
_OPERATORS: dict[type[ast.AST], Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


async def run(prompt: Prompt, policy: Policy, *, max_calls: int = 4) -> list[Sample]:
    """A response with up to `max_calls` calls of the calculator in it."""
    builder = SampleBuilder(prompt, policy)
    for _ in range(max_calls):
        generation = await policy.generate(builder.token_ids, stop=[_END])
        builder.generated(generation)
        expression = _call(policy.tokenizer.decode(generation.token_ids))
        if generation.status is not Status.COMPLETED or expression is None:
            return [builder.build()]
        builder.observed(policy.encode(f"<result>{answer(expression)}</result>"))
    builder.generated(await policy.generate(builder.token_ids))
    return [builder.build()]


def _call(text: str) -> str | None:
    """The expression of the call that ends `text`, if one does."""
    before, has_end, _ = text.partition(_END)
    _, has_begin, expression = before.rpartition(_BEGIN)
    return expression if has_end and has_begin else None


def answer(expression: str) -> str:
    """The value of an arithmetic expression as text, or what is wrong with it."""
    try:
        value = evaluate(expression)
    except (ValueError, ArithmeticError) as error:
        return f"error: {error}"
    return str(value) if isinstance(value, int) else f"{value:.12g}"


def evaluate(expression: str) -> int | float:
    """The value of numbers with + - * / // % ** and parentheses.

    Nothing of it is run as Python. Raises ValueError for anything else and for numbers that
    are too large, and ArithmeticError as Python's operators do.
    """
    if len(expression) > _MAX_CHARS:
        raise ValueError(f"more than {_MAX_CHARS} characters")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError("not an arithmetic expression") from error
    return _checked(_value(tree.body))


def _value(node: ast.expr) -> int | float:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return number
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(operand))
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(_value(left), _value(right))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left), _value(right))
    raise ValueError("only numbers, + - * / // % ** and parentheses")


def _power(base: float, exponent: float) -> float:
    if isinstance(base, int) and base.bit_length() * abs(exponent) > _MAX_BITS:
        raise ValueError("the result is too large")
    value = base**exponent
    if isinstance(value, complex):
        raise ValueError("the result is not a real number")
    return value


def _checked(value: int | float) -> int | float:
    """`value`, unless it is too long to be written or is no number."""
    too_large = value.bit_length() > _MAX_BITS if isinstance(value, int) else math.isinf(value)
    if too_large or value != value:
        raise ValueError("the result is too large")
    return value
