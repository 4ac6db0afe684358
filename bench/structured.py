"""Answers held to a format, with the bundled model: how many parse and validate, and what a mask costs.

python bench/structured.py [--model DIR] [--count 1000] [--write FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import jsonschema
import numpy as np

from router.text import ModelText
from workers.engine import EngineConfig, FinishReason, Grammar, Request, Sampling, SequenceOutput
from workers.engine.build import build_engine
from workers.engine.core import EngineCore
from workers.engine.formats import mask_words
from workers.grammar.formats import CheckpointFormats

ROOT = Path(__file__).resolve().parent.parent
WORD = {"type": "string", "maxLength": 12}
# Of bounded size, so that every answer ends by itself.
SCHEMAS = {
    "person": {
        "type": "object",
        "properties": {
            "name": WORD,
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "here": {"type": "boolean"},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    "order": {
        "type": "object",
        "properties": {
            "id": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
            "items": {
                "type": "array",
                "minItems": 1,
                "maxItems": 3,
                "items": {
                    "type": "object",
                    "properties": {
                        "sku": {"enum": ["pen", "ink", "nib"]},
                        "n": {"type": "integer", "minimum": 1, "maximum": 9},
                    },
                    "required": ["sku", "n"],
                    "additionalProperties": False,
                },
            },
        },
        "required": ["id", "items"],
        "additionalProperties": False,
    },
    "choice of shapes": {
        "anyOf": [
            {
                "type": "object",
                "properties": {"kind": {"const": "circle"}, "r": {"type": "integer", "minimum": 1, "maximum": 99}},
                "required": ["kind", "r"],
                "additionalProperties": False,
            },
            {
                "type": "object",
                "properties": {
                    "kind": {"const": "box"},
                    "sides": {
                        "type": "array",
                        "items": {"type": "integer", "minimum": 1, "maximum": 99},
                        "minItems": 2,
                        "maxItems": 2,
                    },
                },
                "required": ["kind", "sides"],
                "additionalProperties": False,
            },
        ]
    },
    "references": {
        "$defs": {"id": {"type": "string", "format": "uuid"}},
        "type": "object",
        "properties": {
            "from": {"$ref": "#/$defs/id"},
            "to": {"$ref": "#/$defs/id"},
            "note": {"anyOf": [WORD, {"type": "null"}]},
        },
        "required": ["from", "to", "note"],
        "additionalProperties": False,
    },
}


def request(text: ModelText, id: str, seed: int, eos: list[int], grammar: Grammar | None, max_tokens: int) -> Request:
    prompt = text.encode("Here is what was asked for: ")
    return Request(
        id=id, prompt=prompt, max_tokens=max_tokens, sampling=Sampling(seed=seed), eos_ids=eos, grammar=grammar
    )


def run(engine: EngineCore, requests: Sequence[Request]) -> dict[str, SequenceOutput]:
    whole = {r.id: SequenceOutput(r.id, []) for r in requests}
    for r in requests:
        engine.add(r)
    while engine.has_work():
        for output in engine.step():
            whole[output.id].token_ids += output.token_ids
            whole[output.id].finish = output.finish or whole[output.id].finish
            whole[output.id].error = output.error or whole[output.id].error
    return whole


def fault(output: SequenceOutput, text: ModelText, schema: object) -> str:
    """Why an answer does not count; empty where it does."""
    if output.finish is not FinishReason.EOS:
        return f"ended by {output.finish!r} {output.error}"
    try:
        jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker()).validate(
            json.loads(text.decode(output.token_ids))
        )
    except (ValueError, jsonschema.ValidationError) as error:
        return str(error).splitlines()[0]
    return ""


def mask_times(formats: CheckpointFormats, grammar: Grammar, answers: list[list[int]], vocab: int) -> list[float]:
    """Microseconds of every mask of some answers, walked again."""
    row, times = np.zeros(mask_words(vocab), np.uint32), []
    for ids in answers:
        matcher = formats.open(grammar)
        for id in ids:
            start = time.perf_counter()
            matcher.mask_into(row)
            times.append((time.perf_counter() - start) * 1e6)
            if not row[id >> 5] >> np.uint32(id & 31) & np.uint32(1):
                break  # the end
            matcher.accept(id)
    return times


def step_costs(engine: EngineCore, text: ModelText, eos: list[int], grammar: Grammar) -> tuple[float, float]:
    """Milliseconds per token of 16 free answers, and of 16 held ones, each as long; the best of three, in turns."""
    best = [float("inf"), float("inf")]
    for _ in range(3):
        for which, given in enumerate((None, grammar)):
            requests = [request(text, str(i), i, [] if given is None else eos, given, 24) for i in range(16)]
            start = time.perf_counter()
            tokens = sum(len(o.token_ids) for o in run(engine, requests).values())
            best[which] = min(best[which], (time.perf_counter() - start) * 1e3 / tokens)
    return best[0], best[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "demo")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--write", type=Path, help="a Markdown file to write as well")
    args = parser.parse_args()
    text = ModelText((args.model / "tokenizer.json").read_bytes())
    given = json.loads((args.model / "generation_config.json").read_bytes())["eos_token_id"]
    eos = given if isinstance(given, list) else [given]
    engine = build_engine(EngineConfig(str(args.model), max_context=512, max_running=64, threads=1))
    vocab = engine.info.vocab_size
    formats = CheckpointFormats(args.model, vocab)
    lines, good, all_times = (
        ["| schema | valid | tokens of an answer | µs per mask, median | 99 % |", "|---|---:|---:|---:|---:|"],
        0,
        [],
    )
    share = -(-args.count // len(SCHEMAS))
    for number, (name, schema) in enumerate(SCHEMAS.items()):
        count = min(share, args.count - number * share)
        grammar = Grammar("json_schema", json.dumps(schema))
        requests = [request(text, str(i), 1000 * number + i, eos, grammar, 400) for i in range(count)]
        told = run(engine, requests)
        faults = [f for o in told.values() if (f := fault(o, text, schema))]
        for one in faults[:3]:
            print(f"{name}: {one}")
        times = mask_times(formats, grammar, [o.token_ids for o in list(told.values())[:30]], vocab)
        all_times += times
        good += count - len(faults)
        mean = statistics.mean(len(o.token_ids) for o in told.values())
        valid, middle, slow = f"{count - len(faults)} of {count}", np.median(times), np.percentile(times, 99)
        lines.append(f"| {name} | {valid} | {mean:.0f} | {middle:.0f} | {slow:.0f} |")
    free, held = step_costs(engine, text, eos, Grammar("json_schema", json.dumps(SCHEMAS["order"])))
    lines += [
        "",
        f"**{good} of {args.count}** answers at temperature 1 parse and validate.",
        f"16 streams: {free:.2f} ms per token free, {held:.2f} ms held to a schema, one thread.",
        f"{platform.processor() or platform.machine()}, load {os.getloadavg()[0]:.1f}, vocabulary of {vocab:,}.",
    ]
    engine.close()
    print("\n".join(lines))
    if args.write:
        head = "# bench/structured.py\n\nMade by `python bench/structured.py --write bench/results/structured.md`.\n\n"
        args.write.write_text(head + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
