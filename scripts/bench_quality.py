"""What every recipe does to a small trained model: size, KL divergence, top-1, perplexity; ours beside llama.cpp's.

    python scripts/train_tiny.py -o /tmp/trained --steps 1000
    python scripts/bench_quality.py /tmp/trained                            every recipe, with and without importances
    python scripts/bench_quality.py /tmp/trained --recipe Q4_K_M IQ4_XS     some
    python scripts/bench_quality.py /tmp/trained --json quality.json        all figures too
    python scripts/bench_quality.py --from quality.json --write-docs        the table of docs/quality.md
    python scripts/bench_quality.py /tmp/trained --same-bytes Q4_K_M        tuned files against stock ones of their size

The reference is transformers, in float32 on the checkpoint's weights, run once over its held_out.txt; every file is run
over the same tokens in llama.cpp. Windows of --ctx tokens are read alone and the second half of each is scored, as
llama-perplexity does. Importances are measured on train.txt, never on the text that judges. Beside ours stands
NAME@llama.cpp, whose tensors have the bytes that llama-quantize writes (scripts/compare_llama_cpp.py shows it), unless
that program refuses the mixture for Gemma 3n. Files of the same bytes are measured once.

The last lines, on stderr, are what one would not expect: importances that make a recipe worse, a larger file that is
worse than a smaller one, a mixture of ours that is worse than llama.cpp's.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from workshop import same_bytes
from workshop.pages import QUALITY, filled
from workshop.quality import Options, caption, measure_all, read_rows, surprises, table


def main() -> None:
    default = Options()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?", help="what scripts/train_tiny.py made")
    parser.add_argument("--from", dest="known", type=Path, metavar="FILE", help="figures of an earlier run, in JSON")
    parser.add_argument("--recipe", dest="recipes", nargs="+", default=[], metavar="NAME", help="all by default")
    parser.add_argument("--imatrix", type=Path, metavar="FILE", help="importances that have been measured already")
    parser.add_argument("--imatrix-chunks", type=int, default=default.imatrix_chunks, metavar="N")
    parser.add_argument("--ctx", type=int, default=default.ctx, help="tokens a window")
    parser.add_argument("--windows", type=int, default=default.windows, help="of the held-out text")
    parser.add_argument("--threads", type=int, default=default.threads, help="files that are run at once")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument(
        "--write-docs", "--write-readme", action="store_true", help="put the table into docs/quality.md"
    )
    parser.add_argument("--same-bytes", nargs="+", metavar="NAME", help="what can be made of these mixtures instead")
    parser.add_argument("--calibrations", type=int, default=same_bytes.Options().calibrations, help="of --same-bytes")
    parser.add_argument(
        "--sensitivity-chunks", type=int, default=same_bytes.Options().sensitivity_chunks, help="of --same-bytes"
    )
    parser.add_argument("--work", type=Path, metavar="DIR", help="of --same-bytes: keep what was measured there")
    values = vars(parser.parse_args())
    checkpoint, known, json_file, write_docs, mixtures = (
        values.pop(name) for name in ("checkpoint", "known", "json", "write_docs", "same_bytes")
    )
    of_calibration = {name: values.pop(name) for name in ("calibrations", "sensitivity_chunks", "work")}
    if (checkpoint is None) == (known is None):
        parser.error("name a checkpoint, or figures with --from")
    if known is not None:
        facts = json.loads(known.read_text("utf-8"))
    elif mixtures is not None:
        shared = {name: values[name] for name in ("ctx", "windows", "imatrix_chunks", "threads")}
        options = same_bytes.Options(mixtures=tuple(mixtures), **of_calibration, **shared)
        for facts in same_bytes.compare_all(checkpoint, options):
            if json_file is not None:
                json_file.write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
    else:
        facts = measure_all(checkpoint, Options(**values | {"recipes": tuple(values["recipes"])}))
    if json_file is not None:
        json_file.write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
    if "results" in facts:
        marker, rows = "same-bytes", []
        content = same_bytes.caption(facts) + "\n" + same_bytes.table(same_bytes.read_results(facts))
    else:
        marker, rows = "quality", read_rows(facts)
        content = caption(facts) + "\n" + table(rows)
    print(content, end="")
    for line in surprises(rows):
        print(line, file=sys.stderr)
    if write_docs:
        QUALITY.write_text(filled(QUALITY.read_text("utf-8"), marker, content), "utf-8")


if __name__ == "__main__":
    main()
