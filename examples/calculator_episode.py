"""An episode with a tool: `rollout.protocol=examples.calculator_episode:ask`.

    atlas-train --config rlvr_gsm8k --config.rollout.protocol=examples.calculator_episode:ask

The policy may write `calc(12 * 7)`. It then reads the result and goes on, until it writes an answer
without a call. The results are in the row that trains the policy, and are not trained themselves.
"""

import ast
import operator
import re

PROMPT = "{question}\n\nWrite calc(2 * 3) to have something calculated. End with the answer alone."
CALL = re.compile(r"calc\(([^()]*)\)")
OPERATIONS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


async def ask(policy, question):
    """Leads one episode.

    Args:
        policy: `await policy.say(text)` adds a message and returns the policy's next turn.
        question: `text`, `ground_truth`, and `row` with all columns of its row.

    Returns:
        The answer that rewards see; None takes the policy's last turn.
    """
    policy.facts["calls"] = 0
    reply = await policy.say(PROMPT.format(question=question.text))
    while call := CALL.search(reply):
        policy.facts["calls"] += 1
        reply = await policy.say(calculate(call[1]))


def calculate(text):
    """Returns the value of a sum or a product as text, or what is wrong with it."""
    try:
        return f"{text} = {_value(ast.parse(text.strip(), mode='eval').body):g}"
    except (SyntaxError, ValueError, ArithmeticError, RecursionError) as error:
        return f"{text} cannot be calculated: {error}"


def _value(node):
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError("use numbers and + - * /")
