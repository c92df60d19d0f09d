#!/bin/sh
# Retrains everything: bash tools/train/run.sh [work folder] [output folder]
#
# About four hours on two cores.  MINUTES_* change the budgets; with each of them
# at 0.3 and MOST=300 the whole way is tried in a few minutes.  Needs the Debian
# packages fonts-noto-color-emoji, unicode-data, gcc and python3-venv.  Every
# learning rate follows the wall clock, so a busy machine gives a worse model in
# the same time, never a half-decayed one.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
work=$(realpath -m "${1:-$here/../../build/train}")
out=$(realpath -m "${2:-$here/../../weights/emoji}")
mkdir -p "$work" "$out"
export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1

sh "$here/venv.sh" "$work"
if [ ! -d "$work/clip" ]; then
	"$work/venv/bin/pip" download --quiet --no-deps -d "$work" $(grep open_clip "$here/requirements.txt")
	"$work/venv/bin/python" -m zipfile -e "$work"/open_clip_torch-*.whl "$work/clip"
fi
py="nice -n 10 $work/venv/bin/python"

$py "$here/tokenizer.py" --bpe "$work/clip/open_clip/bpe_simple_vocab_16e6.txt.gz" --out "$out/tokenizer"
$py "$here/heldout.py"

# One core trains the VAE, the other the text encoder and then the judge.
$py "$here/vae.py" --out "$work/vae" --minutes "${MINUTES_VAE:-33}" >"$work/vae.log" 2>&1 &
vae=$!
$py "$here/text.py" --tokenizer "$out/tokenizer" --out "$work/text" --minutes "${MINUTES_TEXT:-17}" >"$work/text.log" 2>&1
$py "$here/judge_train.py" --minutes "${MINUTES_JUDGE:-10}" >"$work/judge.log" 2>&1
wait $vae

# Latents: every glyph on every colour in one pose; some in varied poses; and many pairs, which are the hardest to learn.
latents() {
	kind=$1
	shift
	for part in 0 1; do
		$py "$here/latents.py" --vae "$work/vae" "$@" ${MOST:+--most "$MOST"} --part $part --parts 2 \
			--out "$work/$kind$part.npz" >"$work/latents-$kind$part.log" 2>&1 &
	done
	wait
}
latents c --canonical --plain 1 --pairs 6000
latents varied
latents p --canonical --plain 0 --coloured 0 --pairs 20000

# The UNet: first everything in equal measure, then mostly pairs.
unet() {
	out_unet=$1
	shift
	$py "$here/unet.py" --latents "$work/c0.npz" "$work/c1.npz" "$work/varied0.npz" "$work/varied1.npz" "$work/p0.npz" "$work/p1.npz" \
		--text "$work/text" --tokenizer "$out/tokenizer" --out "$out_unet" "$@"
}
unet "$work/unet-first" --minutes "${MINUTES_UNET:-110}" --lr 1.5e-3 --pairs 0.4 >"$work/unet-first.log" 2>&1
unet "$work/unet" --init "$work/unet-first" --minutes "${MINUTES_PAIRS:-30}" --lr 7e-4 --warm 15 --pairs 0.75 >"$work/unet.log" 2>&1

$py "$here/vae.py" --decoder-only --init "$work/vae" --out "$work/vae-final" --minutes "${MINUTES_DECODER:-13}" \
	--pool 3000 --lr 8e-4 --noise 0.35 >"$work/decoder.log" 2>&1
$py "$here/export.py" --vae "$work/vae-final" --text "$work/text" --unet "$work/unet" --out "$out"

$py "$here/judge.py" eval
$py "$here/sample.py" --model "$out" --out "$work/heldout"
$py "$here/judge.py" score --manifest "$work/heldout/manifest.tsv" | cut -c1-200
