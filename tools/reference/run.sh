#!/bin/sh
# Rebuild all golden data: sh tools/reference/run.sh [folder for the Python environment]
# Needs python3 with venv and pip, and about 6 GB there unless torch comes as a CPU build. Takes about a minute afterwards.
set -eu
cd "$(dirname "$0")"
venv=${1:-../../.venv/reference}
if [ ! -x "$venv/bin/python" ]; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install -q -r requirements.txt
fi
export OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1 PYTHONWARNINGS=ignore
# Adapter files: a later PEFT, LyCORIS, and for one file the diffusers that first wrote metadata.
if [ ! -d "$venv/adapters" ]; then
    "$venv/bin/pip" install -q --no-deps --target "$venv/adapters" -r requirements-adapters.txt
    "$venv/bin/pip" install -q --no-deps --target "$venv/diffusers-0.34" diffusers==0.34.0
fi
rm -f ../../tests/golden/manifest.json
for script in checkpoints gen_rng gen_tokenizer gen_networks gen_lora gen_samplers gen_weighting gen_pipelines gen_first bundled; do
    echo "== $script"
    "$venv/bin/python" "$script.py"
done
echo "== adapters"
PYTHONPATH="$venv/adapters" "$venv/bin/python" adapters.py
PYTHONPATH="$venv/diffusers-0.34:$venv/adapters" "$venv/bin/python" adapters.py metadata
