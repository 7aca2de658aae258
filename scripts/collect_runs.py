"""Copy what a report needs of finished runs, without weights: recipes, logs and results.

python scripts/collect_runs.py runs/study_cifar10 records/study/runs

A run is finished if it has its encoder.safetensors. Files that are already there and equal are left alone, so the same
command after each run adds what is new. `fastssl report` reads the copies as it reads the runs, but for the OOD scores
of single images, which are large: differences of AUROC then count the seeds alone.
"""

import argparse
import json
from pathlib import Path

KEPT = ("recipe.yaml", "environment.json", "metrics.jsonl", "profile.json", "eval/*.json", "eval/*.correct.npz")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("source", type=Path, help="folder of runs, as of a sweep")
    arguments.add_argument("out", type=Path, help="folder of the copies")
    options = arguments.parse_args()
    for weights in sorted(options.source.rglob("encoder.safetensors")):
        run = weights.parent
        if "eval" in run.relative_to(options.source).parts:  # a fine-tuned model below a run
            continue
        for file in sorted(file for pattern in KEPT for file in run.glob(pattern)):
            target = options.out / file.relative_to(options.source)
            content = file.read_bytes()
            if file.name == "environment.json":
                environment = json.loads(content)
                for start in (environment, *environment.get("earlier", [])):
                    if command := start.get("command"):
                        command[0] = "fastssl"  # else the path of the program on this machine
                content = json.dumps(environment, indent=2).encode()
            if not target.exists() or target.read_bytes() != content:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
                print(target)


if __name__ == "__main__":
    main()
