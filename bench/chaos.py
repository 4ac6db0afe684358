"""Faults by the hundred under steady streams: what was lost, what was different, how long streams had to wait.

    python bench/chaos.py --faults 200 --seed 1

A real service: the bundled mixture with speculation, over two ranks that have its experts, and with them on hosts, at
two replicas each; two gateways, Redis, the router actor, Serve. 16 clients stream without end, with features of every
kind; each answer is compared, bit for bit, with the one that came when nothing happened. Meanwhile processes are
killed with SIGKILL, some two at once, or stopped for 1 to 6 seconds; the next fault comes up to 3 seconds after there
is one of everything again, and after every tenth when all is as before. Writes bench/results/chaos.md and .json.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "chaos"), str(ROOT / "tests")]

from campaign import Outcome, run, stage, table  # noqa: E402
from service_process import running  # noqa: E402


def report(result: Outcome, command: str) -> str:
    tally, memory = result.tally, [m / 2**20 for m in result.memory]
    kills = sum(len(f.targets) for f in result.faults if f.how == "kill")
    stops = sum(f.how == "stop" for f in result.faults)
    flat = f"{memory[0]:.0f} MiB after the first faults, {memory[-1]:.0f} at the end, {max(memory):.0f} at most"
    text = f"""# bench/chaos.py

Made by `{command}`, on {platform.processor() or platform.machine()}, Python {platform.python_version()}.

{kills} processes killed, {stops} stopped for a while, in {len(result.faults)} faults over {result.seconds / 60:.0f}
minutes, under 16 steady streams: {tally.finished} answers, {tally.tokens} tokens. Streams lost: {len(tally.lost)}.
Answers that differ in any token, bit or word: {len(tally.wrong)}. Memory of all processes together: {flat}.

{table(result)}

A pause is the longest time without a piece that a fault can have made, for each of the 16 clients and each fault; less
than 0.1 s was not taken down. Faults follow each other while the service still mends what the ones before have broken:
a pause that two of them may have made counts for both. Only every tenth waits until all is whole.
"""
    for said in (tally.lost + tally.wrong)[:20]:
        text += f"\n- {said}"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--text", type=Path, default=ROOT / "models/demo", help="checkpoint of the plain model, small")
    parser.add_argument("--write", type=Path, default=ROOT / "bench/results/chaos")
    args = parser.parse_args()
    told = stage(args.text, ROOT / "models/demo")
    wanted = {name: model["replicas"] for name, model in told["models"].items()}
    with tempfile.TemporaryDirectory() as place:
        config = Path(place) / "service.yaml"
        config.write_text(json.dumps(told))
        with running(Path(place), ["--config", str(config)]) as service:
            service.wait_until_ready()
            begun = time.monotonic()

            def say(text: str) -> None:
                print(f"{time.monotonic() - begun:7.0f} s  {text}", flush=True)

            result = run(service, wanted, "demo", faults=args.faults, streams=args.streams, seed=args.seed, say=say)
            service.stop()
    command = f"python bench/chaos.py --faults {args.faults} --seed {args.seed}"
    args.write.with_suffix(".md").write_text(report(result, command))
    figures = asdict(result)
    figures["tally"].pop("gaps")
    args.write.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n")
    print(report(result, command))
    return 1 if result.tally.lost or result.tally.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
