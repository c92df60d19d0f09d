#!/bin/sh
# Trains the safety adapters of weights/safety: bash tools/train/experts.sh [work folder] [output folder]
#
# After run.sh, whose work folder it reads (latents, text, unet: the fp32 weights that were exported).  Times are of
# processor time, two single-thread processes: about 30 minutes.  The experts come first alone, then together; the adapter
# that is required is trained on all categories at once, and written by the product (which must have been built).  Manifests
# are written by `safelight adapter sign` afterwards.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
work=$(realpath -m "${1:-$here/../../build/train}")
out=$(realpath -m "${2:-$here/../../weights/safety}")
x=$work/experts
mkdir -p "$x/alone" "$out/experts"
export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1
py="$work/venv/bin/python"

[ -f "$x/pairs.npz" ] || $py "$here/experts.py" pairs --vae "$work/vae-final" --each 20 --out "$x/pairs.npz"

learn() {
	command=$1
	log=$2
	shift 2
	$py "$here/experts.py" "$command" --unet "$work/unet" --text "$work/text" --tokenizer "$here/../../weights/emoji/tokenizer" \
		--pairs "$x/pairs.npz" --latents "$work/c0.npz" "$work/c1.npz" "$work/p0.npz" "$work/p1.npz" "$@" >"$x/$log.log" 2>&1
}

alone() {
	name=$(echo "$1" | tr ' ' -)
	learn train "$name" --category "$1" --rank 4 --seconds 110 --out "$x/alone/$name.safetensors"
}

everything() {
	learn train all-1 --category all --rank 28 --seconds 420 --keep 60 --duels 14 --keeps 28 --out "$x/all-1.safetensors"
	learn train all-2 --category all --rank 28 --seconds 330 --keep 90 --duels 16 --keeps 32 --lr 1.2e-3 --seed 2 \
		--init "$x/all-1.safetensors" --out "$x/all-2.safetensors"
	learn train all-3 --category all --rank 28 --seconds 380 --keep 90 --duels 18 --keeps 30 --lr 1.2e-3 --pair-share 0.5 --seed 3 \
		--init "$x/all-2.safetensors" --out "$x/all.safetensors"
}

together() {
	learn join join-1 --seconds 360 --keep 60 --duels 14 --keeps 28 --lr 1e-3 --alone 0.33 --init "$x/alone" --out "$x/join-1"
	learn join join-2 --seconds 330 --keep 120 --duels 14 --keeps 32 --lr 1e-3 --alone 0.2 --init "$x/join-1" --out "$x/join-2"
	learn join join-3 --seconds 380 --keep 90 --duels 18 --keeps 30 --lr 1.2e-3 --alone 0.15 --pair-share 0.5 --seed 3 \
		--init "$x/join-2" --out "$out/experts"
}

(alone hate && alone harassment && alone violence && alone "illegal activity") &
first=$!
alone self-harm && alone sexual && alone shocking
wait $first
everything &
first=$!
together
wait $first
"$here/../../build/release/safelight" adapter merge --method concat --weight all=1.15 --out "$out/merged.safetensors" "$x/all.safetensors"
tail -qn 1 "$x"/*.log
