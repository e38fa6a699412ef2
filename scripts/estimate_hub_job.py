"""What a job on the Hub's smallest machine takes to publish a model in many quantizations: an estimate, on paper.

    python scripts/estimate_hub_job.py            E4B, every preset that needs no importance matrix
    python scripts/estimate_hub_job.py --size E2B --n 12

Time is that of `gguf3n publish --executor hf-jobs --dry-run`: the measured rates of docs/speed.md at a quarter, and a
network whose speed is assumed (gguf3n/publishing/hf_jobs.py). No such job was run.
"""

from __future__ import annotations

import argparse

from gguf3n.deciding import estimate
from gguf3n.gemma3n.published import PUBLISHED
from gguf3n.publishing.hf_jobs import FLAVOR, NETWORK_BYTES_A_SECOND, dollars_of, seconds_of
from gguf3n.recipes import find_recipe, preset_names

BF16_BYTES = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=PUBLISHED, default="E4B")
    parser.add_argument("--n", type=int, help="the largest files, so many")
    options = parser.parse_args()
    files = {name: estimate(find_recipe(name), PUBLISHED[options.size]) for name in preset_names()}
    files = {name: file for name, file in files.items() if not file.needs_imatrix}
    chosen = sorted(files.items(), key=lambda pair: -pair[1].total_bytes)[: options.n]
    download = BF16_BYTES * sum(chosen[0][1].weights.values())
    upload = sum(file.total_bytes for _, file in chosen)
    seconds = seconds_of(download + upload, [file.weights for _, file in chosen])
    network = (download + upload) / NETWORK_BYTES_A_SECOND / 60
    print(f"{options.size}, {len(chosen)} files: {', '.join(name for name, _ in chosen)}")
    print(f"down {download / 1e9:.1f} GB (the text model), up {upload / 1e9:.1f} GB")
    minutes, dollars = seconds / 60, dollars_of(seconds)
    print(f"{minutes:.0f} minutes on {FLAVOR}, {network:.0f} of them the network; {dollars:.3f} dollars")


if __name__ == "__main__":
    main()
