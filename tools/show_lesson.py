"""Prints a lesson that a teacher writes: `python tools/show_lesson.py MODEL [--row 0]`.

The question is one of the held-out demonstrations of the quickstart; decoding is greedy, with
transformers, so it also shows that the model loads there as it is.
"""

from __future__ import annotations

import _checkout  # noqa: F401  (comes first: see there)

from atlas_jax import cli, config, extras, preflight
from atlas_jax.configs.data import quickstart_sft
from atlas_jax.data import examples, sources


def main() -> None:
    """Generates and prints."""
    parser = cli.ToolParser(__doc__)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--row", type=int, default=0, help="of the held-out demonstrations")
    parser.add_argument("--max_new_tokens", type=int, default=160)
    args = parser.parse_args()
    preflight.check_model(args.model)
    messages = prompt(args.row)
    print(f"--- prompt\n{messages[-1]['content']}")
    print(f"--- written by {args.model}\n{generate(args.model, messages, args.max_new_tokens)}")


def prompt(row: int) -> list[dict[str, str]]:
    """Returns the conversation of a held-out demonstration up to the teacher's turn."""
    options = config.defaults(config.SFTConfig)
    quickstart_sft.apply(options)
    frozen = config.freeze(options)
    data = frozen.data
    rows = sources.read_rows(data, data.eval_path).rows
    if not 0 <= row < len(rows):
        raise ValueError(f"--row {row} must be 0 to {len(rows) - 1}")
    return list(examples.to_sample(rows[row], data, frozen.teaching).messages[:-1])


def generate(model_path: str, messages: list[dict[str, str]], max_new_tokens: int) -> str:
    """Returns the greedy continuation by transformers."""
    with extras.importing("hf", "an answer by transformers"):
        import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    cli.tool(main)
