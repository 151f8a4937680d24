"""``ptq bench`` from a checkout: time the linear layers of a model, or predict them for a named
GPU.

python scripts/bench_layers.py llama-3.1-8b --tokens 1,16,128,2048 --out runs.jsonl --plot runs.svg
python scripts/bench_layers.py --predict h200 --sum           # rooflines, on any machine
"""

import sys

from ptq.cli.commands import main

if __name__ == "__main__":
    sys.argv.insert(1, "bench")
    main()
